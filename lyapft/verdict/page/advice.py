"""Which recipe to use, a line for every model, data set and task."""

from lyapft.verdict import sentences
from lyapft.verdict.page.common import Common, cut
from lyapft.verdict.page.layout import Topic, by_turns, line, topic
from lyapft.verdict.recipes import Row
from lyapft.verdict.recommendation import Recommendation, doubts
from lyapft.verdict.sentences.advice import at_cost, memory_of, unfinished
from lyapft.verdict.words import EMULATED, joined, margin, needed, p_value, ratio

LEAST = 3  # settings that are named before more is said of anything else
KINDS = {"dear": "with the reference", "outside": "with the reference", "better": "with no equivalent recipe"}


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
    if one.advice == "dear":
        row, *others = one.dear
        also = f" (and {len(others)} more)" if others else ""
        left = f"; {len(one.open)} others are undecided" if one.open else ""
        cost = f"to cost less is not shown ({p_value(row.cost.p)})" if row.cost.index.mean < 1 else "did not cost less"
        return (
            f"stay with the reference. {cut(row.recipe.label)}{also} is equivalent ({_numbers(row, common)}), but "
            f"{cost}: {_savings(row)}{left}{_better(one, common)}"
        )
    if near := one.nearest:
        return (
            f"undecided. Nearest is {cut(near.recipe.label)} ({_numbers(near, common)}), {at_cost(near)}: "
            f"{needed(near.comparison, common.found.settings, conditions=False)}{_better(one, common)}"
        )
    if one.unsound:
        row = one.unsound[0]
        return (
            f"undecided. {cut(row.recipe.label)} is equivalent on {row.n} seed{'s' * (row.n != 1)} "
            f"({_numbers(row, common)}), but {joined(doubts(row))}{_better(one, common)}"
        )
    if one.better:
        return f"no recipe is equivalent{_better(one, common)}"
    return f"stay with the reference: every other recipe is shown to lie outside {margin(common.found.settings)}"


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
    return f"; {cut(row.recipe.label)} scores higher ({_numbers(row, common)}), {at_cost(row)}"


def _numbers(row: Row, common: Common) -> str:
    scores = (row.score, row.counterpart_score)
    return common.numbers(row.comparison.estimate, scores, bool(row.beyond))
