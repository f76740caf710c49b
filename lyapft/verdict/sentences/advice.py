"""Which recipe to use, as sentences."""

from collections.abc import Sequence

from lyapft.verdict.costs import Cost
from lyapft.verdict.evidence import Settings
from lyapft.verdict.recipes import Row
from lyapft.verdict.recommendation import Recommendation, doubts
from lyapft.verdict.words import (
    EMULATED,
    EMULATED_MEANS,
    MOST_LISTED,
    REFERENCE,
    beyond,
    chance,
    difference,
    interval,
    joined,
    margin,
    needed,
    p_value,
    ratio,
    raw,
    seeds_that_show,
    where_of,
)

COST_TOO = (
    "It is a ratio to the counterpart's, in brackets its 95% interval, uncorrected, where it is not shown to be lower. "
    "The weights (--speed-weight, --memory-weight) and the margin (--margin, in points) are the reader's."
)


def recommendations(found: Sequence[Recommendation], settings: Settings, references_only: bool = False) -> list[str]:
    """Which recipe to use for each model, what it saves, and what stays open.

    Args:
        references_only: whether the study has runs, and all of them are what others would be compared with.
    """
    if not found and references_only:
        return [f"Every recipe of this study is {REFERENCE}, or its base: there is none to recommend."]
    lines = []
    for one in found:
        lines.append(_recommended(one, settings) if one.chosen else _not_recommended(one, settings))
        if not one.chosen:
            lines += [_cost_open(row, settings) for row in one.cost_open]
            lines += [_dear(row, settings) for row in one.dear]
        lines += [
            f"Not equivalent but better: {row.recipe.name}, {at_cost(row, settings)}, {difference(row.comparison)}; "
            f"{scores_of(row)}."
            for row in one.better
        ]
        lines += _all_open(one, settings)
        lines += [_unsound(row) for row in one.unsound]
    if found:
        lines.append(f"{cost_means(settings)} {COST_TOO}")
    if any(EMULATED in line for line in lines):
        lines.append(EMULATED_MEANS)
    return lines or [f"No recipe has a counterpart to be compared with ({REFERENCE}): nothing can be recommended."]


def scores_of(row: Row) -> str:
    """The raw scores beside a row's difference, labelled where they also measure extrapolation."""
    return f"score {raw(row.score, row.counterpart_score)}{beyond(len(row.beyond), len(row.keys))}"


def _reference(one: Recommendation) -> str:
    return REFERENCE if one.trained else "the full-precision base (nothing was trained)"


def at_cost(row: Row, settings: Settings) -> str:
    """What a recipe costs."""
    return f"at {times_cost(row, settings, ' the cost')}" if row.cost.index.n else "its cost not measured"


def times_cost(row: Row, settings: Settings, noun: str = "") -> str:
    """The cost as a ratio, with its interval where it is not shown to be lower; one seed's cost is called so."""
    cost = row.cost.index
    reach = "" if cost.n < 2 or row.cost.saves(settings.alpha) else f" [{cost.low:.3g}, {cost.high:.3g}]"
    return f"{ratio(cost.mean)}{noun}{reach}" + " (one seed)" * (cost.n == 1) + f" {EMULATED}" * row.cost.emulated


def cost_needed(cost: Cost, settings: Settings, briefly: bool = False) -> str:
    """How many seeds would show whether a recipe costs less (see `words.needed`).

    Args:
        briefly: after words that ask whether it costs less.
    """
    if not cost.index.n:
        return "its cost was not measured"
    lower = cost.index.mean < 1
    how = "it" if briefly and lower else f"that it costs {'less' if lower else 'more'}"
    count = cost.seeds_needed(settings.alpha, settings.power)
    return seeds_that_show(how, count, cost.index, "" if briefly else chance(settings))


def cost_means(settings: Settings) -> str:
    """What a cost is, by the reader's weights.

    >>> cost_means(Settings(memory_weight=0.5))
    'Cost: geometric mean of time and memory per token, weighted 1:0.5.'
    >>> cost_means(Settings(speed_weight=0))
    'Cost: memory per token alone.'
    """
    speed, memory = settings.speed_weight, settings.memory_weight
    if not (speed and memory):
        return f"Cost: {'time' if speed else 'memory'} per token alone."
    return f"Cost: geometric mean of time and memory per token, weighted {speed:g}:{memory:g}."


def _recommended(one: Recommendation, settings: Settings) -> str:
    row = one.chosen
    assert row is not None
    what = "one of the cheapest recipes that are" if one.tied else "the cheapest recipe that is"
    return (
        f"{where_of(one.setting)}: use {row.recipe.label}, {what} equivalent to {_reference(one)} within "
        f"{margin(settings)}: {difference(row.comparison)}; TOST {p_value(row.comparison.p_equivalent)}"
        f"{_adjusted_for(row.comparison.family)}; {scores_of(row)}. "
        f"{_savings(row.cost)} It is cheaper at {p_value(row.cost.p)}{_adjusted_for(row.cost.family)}."
        f"{_ties(one, settings)}{unfinished(row)}"
    )


def _adjusted_for(family: int) -> str:
    return f", adjusted for {family} recipes" if family > 1 else ""


def _ties(one: Recommendation, settings: Settings) -> str:
    """The equivalent recipes that the measured costs do not tell from the one that is named."""
    if not one.tied:
        return ""
    shown = [f"{row.recipe.label} ({at_cost(row, settings)}, {scores_of(row)})" for row in one.tied]
    return f" Its cost cannot be told from that of {joined(shown)}: take any of them."


def _savings(cost: Cost) -> str:
    """What a recipe saves, in time and memory."""
    parts = ["its speed was not measured", "its memory was not measured"]
    if cost.speed.n:
        mark = f" {EMULATED}" * cost.emulated
        parts[0] = f"it trains {ratio(cost.speed.mean)} the tokens/s ({interval(cost.speed, '.2f')}){mark}"
    if cost.memory.n:
        parts[1] = f"needs {memory_of(cost)} per token"
    note = f" Memory ran out in {cost.halved} of its pairs, whose cost is left out." if cost.halved else ""
    text = " and ".join(parts)
    return f"{text[0].upper()}{text[1:]}.{note}"


def memory_of(cost: Cost) -> str:
    """How much less memory, or more; only where it was measured."""
    less = round(100 * (1 - cost.memory.mean))
    return "as much memory" if less == 0 else f"{abs(less)}% {'less' if less > 0 else 'more'} memory"


def unfinished(row: Row) -> str:
    """Seeds of a recipe that have not come to their end, for no reason of its own."""
    left = len(row.recipe.failed_seeds())
    return f" {left} of {left + len(row.recipe.runs)} of its runs did not finish." if left else ""


def _not_recommended(one: Recommendation, settings: Settings) -> str:
    where, equivalent = where_of(one.setting), f"equivalent to {_reference(one)} within {margin(settings)}"
    cheaper = " that may cost less" if one.dear else ""
    if one.advice == "cost_open":
        return f"{where}: undecided. No recipe that is {equivalent} is shown to cost less."
    if one.advice == "open":
        return f"{where}: undecided. No recipe{cheaper} is shown to be {equivalent}."
    if one.advice == "unsound":
        return f"{where}: undecided. No recipe with all of its seeds{cheaper} is shown to be {equivalent}."
    if one.advice == "better":
        return f"{where}: no recipe{cheaper} is {equivalent}."
    if one.advice == "dear":
        return f"{where}: stay with {_reference(one)}. No recipe that is {equivalent} costs less."
    return f"{where}: stay with {_reference(one)}. Every other recipe is shown to lie outside {margin(settings)}."


def _cost_open(row: Row, settings: Settings) -> str:
    return (
        f"Equivalent, but whether it costs less is undecided: {_priced(row, settings)}; "
        f"{cost_needed(row.cost, settings)}."
    )


def _dear(row: Row, settings: Settings) -> str:
    shown = "but its cost is the same on every seed" if row.cost.alike else "but shown to cost more"
    return f"Equivalent, {shown}: {_priced(row, settings)}."


def _priced(row: Row, settings: Settings) -> str:
    """An equivalent recipe with its numbers, and p of its cost."""
    p = f", {p_value(row.cost.p)}{_adjusted_for(row.cost.family)}" if row.cost.index.n > 1 else ""
    return f"{row.recipe.name}, {at_cost(row, settings)}{p}; {difference(row.comparison)}; {scores_of(row)}"


def _all_open(one: Recommendation, settings: Settings) -> list[str]:
    """The cheapest of the undecided, and that which the fewest seeds would show to be equivalent; then the others."""
    shown = list(one.open[:MOST_LISTED])
    soonest = one.soonest(settings)
    if soonest and not any(row is soonest[0] for row in shown):
        shown.append(soonest[0])
    listed = {row.recipe.key for row in shown}
    more = [row.recipe.name for row in one.open if row.recipe.key not in listed]
    lines = [_open(row, settings) for row in shown]
    return [*lines, f"Undecided too: {joined(more)}."] if more else lines


def _unsound(row: Row) -> str:
    return (
        f"Undecided: {row.recipe.name} is equivalent on the {row.n} seed{'s' * (row.n != 1)} that could be compared, "
        f"{difference(row.comparison)}, {scores_of(row)}, but {joined(doubts(row))}: the seeds that are left may "
        "flatter it."
    )


def _open(row: Row, settings: Settings) -> str:
    doubted = f"; {joined(doubts(row))}" if doubts(row) else ""
    return (
        f"Undecided: {row.recipe.name}, {at_cost(row, settings)}, {difference(row.comparison)}; {scores_of(row)}"
        f"{doubted}; {needed(row.comparison, settings)}."
    )
