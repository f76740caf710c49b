"""Which recipe to use, a line for every model, data set and task."""

from collections.abc import Sequence

from lyapft.verdict import sentences
from lyapft.verdict.page.common import FLIPPED, Common, cut
from lyapft.verdict.page.layout import Topic, by_turns, line, topic
from lyapft.verdict.recipes import Row
from lyapft.verdict.recommendation import Recommendation, doubts
from lyapft.verdict.sentences.advice import at_cost, cost_needed, memory_of, times_cost, unfinished
from lyapft.verdict.words import EMULATED, joined, margin, more_than_now, needed, p_value, ratio

LEAST = 3  # settings that are named before more is said of anything else
KINDS = {"dear": "with the reference", "outside": "with the reference", "better": "with none equivalent and cheaper"}


def title(common: Common) -> str:
    """The heading, which also says what recipes are compared with, and where."""
    if not common.found.recommendations:
        return "Which recipe to use"
    return f"Which recipe to use{common.everywhere} instead of {common.reference} (the reference)"


def recommendations(common: Common) -> Topic:
    """The largest models of each outcome first."""
    found, heading = common.found, title(common)
    if not found.recommendations:
        return line(heading, *sentences.recommendations((), found.settings, found.references_only))
    ordered = by_turns(found.recommendations, _kind, lambda one: common.size(one.setting[0]), LEAST)
    return topic(
        heading, ordered, lambda one: f"{common.where(one.setting)}: {_advice(one, common)}.", "settings", _kind, LEAST
    )


def _kind(one: Recommendation) -> str:
    if one.chosen:
        return f"with {cut(one.chosen.recipe.label)} to use"
    return KINDS.get(one.advice, "undecided")


def _advice(one: Recommendation, common: Common) -> str:
    if one.chosen:
        return _use(one, one.chosen, common)
    if one.advice == "cost_open":
        return f"undecided. {_cost_open(one, common)}{_better(one, common)}"
    dear = f"{_one_of(one.dear)} is equivalent, but {_no_less(one.dear[0])}" if one.dear else ""
    if one.advice == "open":
        return f"undecided. {_open(one, common)}{_better(one, common)}{f'; {dear}' * bool(dear)}"
    if one.advice == "unsound":
        row = one.unsound[0]
        return (
            f"undecided. {cut(row.recipe.label)} is equivalent on {row.n} seed{'s' * (row.n != 1)} "
            f"({_numbers(row, common)}), but {joined(doubts(row))}{_better(one, common)}{f'; {dear}' * bool(dear)}"
        )
    if one.advice == "better":
        return f"no recipe is equivalent{' and cheaper' * bool(dear)}{_better(one, common)}"
    if one.advice == "dear":
        row = one.dear[0]
        return (
            f"stay with the reference. {_one_of(one.dear)} is equivalent ({_numbers(row, common)}), but "
            f"{_no_less(row)}: {_savings(row)}"
        )
    return f"stay with the reference: every other recipe is shown to lie outside {margin(common.found.settings)}"


def _cost_open(one: Recommendation, common: Common) -> str:
    """What is equivalent at a cost that the seeds do not decide."""
    row, settings = one.cost_open[0], common.found.settings
    n = row.cost.index.n
    left = f"; {len(one.open)} more undecided" if one.open else ""
    p = f", {p_value(row.cost.p)}" if n > 1 else ""
    numbers = f"{times_cost(row, settings)}{p}; " if n else ""
    return (
        f"{_one_of(one.cost_open)} is equivalent ({_numbers(row, common)}); whether it costs less is open "
        f"({numbers}{cost_needed(row.cost, settings, briefly=True)}){left}"
    )


def _open(one: Recommendation, common: Common) -> str:
    """The cheapest of the undecided, and that which would be shown to be equivalent with the fewest seeds."""
    settings, row = common.found.settings, one.open[0]
    rank = "Left" if len(one.open) == 1 else "Cheapest left" if row.cost.index.n else "First left"
    text = (
        f"{rank}: {cut(row.recipe.label)} ({_numbers(row, common)}), {at_cost(row, settings)}: "
        f"{needed(row.comparison, settings, conditions=False)}"
    )
    soonest = one.soonest(settings)
    if soonest is None or soonest[0] is row:
        return text
    row, count = soonest
    dearer = " (dearer on average)" * (row.cost.index.mean > 1)
    seeds = more_than_now(count, row.comparison.estimate)
    return f"{text}; fewest for equivalence: about {seeds}, with {cut(row.recipe.label)}{dearer}"


def _one_of(found: Sequence[Row]) -> str:
    """The first, and how many more there are."""
    return cut(found[0].recipe.label) + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _no_less(row: Row) -> str:
    return "costs as much on every seed" if row.cost.alike else f"is shown to cost more ({p_value(row.cost.p)})"


def _use(one: Recommendation, row: Row, common: Common) -> str:
    tied = ""
    if one.tied:
        more = f" and {len(one.tied) - 1} more" if len(one.tied) > 1 else ""
        tied = f"; {cut(one.tied[0].recipe.label)}{more} cannot be told from it in cost"
    left = f"; {unfinished(row).strip(' .')}" if unfinished(row) else ""
    cheaper = f"; {len(one.open)} undecided may be cheaper" if one.open else ""
    return (
        f"use {cut(row.recipe.label)}, equivalent ({_numbers(row, common)}), at {_savings(row)}{tied}{cheaper}"
        f"{_better(one, common)}{left}"
    )


def _savings(row: Row) -> str:
    cost = row.cost
    speed = f"{ratio(cost.speed.mean)} the tokens/s" if cost.speed.n else "a speed that was not measured"
    memory = f"{memory_of(cost)} per token" if cost.memory.n else "a memory that was not measured"
    return f"{speed} and {memory}{' (one seed)' * (cost.index.n == 1)}{f' {EMULATED}' * cost.emulated}"


def _better(one: Recommendation, common: Common) -> str:
    """What is no loss, though not equivalent."""
    if not one.better:
        return ""
    row = one.better[0]
    return f"; {cut(row.recipe.label)} scores higher ({_numbers(row, common)}), {at_cost(row, common.found.settings)}"


def _numbers(row: Row, common: Common) -> str:
    scores = (row.score, row.counterpart_score)
    flipped = f"; {row.flips.mean:.0%} {FLIPPED}" if row.flips else ""
    return f"{common.numbers(row.comparison.estimate, scores, bool(row.beyond))}{flipped}"
