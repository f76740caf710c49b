"""Which recipe to use, as sentences."""

import math
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
    difference,
    interval,
    joined,
    margin,
    needed,
    p_value,
    ratio,
    raw,
    where_of,
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
        lines += [
            f"Not equivalent but better: {row.recipe.name}, {at_cost(row)}, {difference(row.comparison)}; "
            f"{scores_of(row)}."
            for row in one.better
        ]
        lines += [_open(row, settings) for row in one.open[:MOST_LISTED]]
        if more := one.open[MOST_LISTED:]:
            lines.append(f"Undecided too: {joined([row.recipe.name for row in more])}.")
        lines += [_unsound(row) for row in one.unsound]
    if any(EMULATED in line for line in lines):
        lines.append(EMULATED_MEANS)
    return lines or [f"No recipe has a counterpart to be compared with ({REFERENCE}): nothing can be recommended."]


def scores_of(row: Row) -> str:
    """The raw scores beside a row's difference, labelled where they also measure extrapolation."""
    return f"score {raw(row.score, row.counterpart_score)}{beyond(len(row.beyond), len(row.keys))}"


def _reference(one: Recommendation) -> str:
    return REFERENCE if one.trained else "the full-precision base (nothing was trained)"


def at_cost(row: Row) -> str:
    """What a recipe costs; one seed's cost shows nothing, and is called so."""
    cost = row.cost.index
    if math.isnan(cost.mean):
        return "its cost not measured"
    return f"at {ratio(cost.mean)} the cost" + " (one seed)" * (cost.n == 1) + f" {EMULATED}" * row.cost.emulated


def _recommended(one: Recommendation, settings: Settings) -> str:
    row = one.chosen
    assert row is not None
    what = "one of the cheapest recipes that are" if one.tied else "the cheapest recipe that is"
    return (
        f"{where_of(one.setting)}: use {row.recipe.label}, {what} equivalent to {_reference(one)} within "
        f"{margin(settings)}: {difference(row.comparison)}; TOST {p_value(row.comparison.p_equivalent)}"
        f"{_adjusted_for(row.comparison.family)}; {scores_of(row)}. "
        f"{_savings(row.cost)} It is cheaper at {p_value(row.cost.p)}{_adjusted_for(one.recipes)}.{_ties(one)}"
        f"{unfinished(row)}"
    )


def _adjusted_for(family: int) -> str:
    return f", adjusted for {family} recipes" if family > 1 else ""


def _ties(one: Recommendation) -> str:
    """The equivalent recipes that the measured costs do not tell from the one that is named."""
    if not one.tied:
        return ""
    shown = [f"{row.recipe.label} ({at_cost(row)}, {scores_of(row)})" for row in one.tied]
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
    where = where_of(one.setting)
    if one.advice == "dear":
        shown = [
            f"{row.recipe.label} ({at_cost(row)}, {difference(row.comparison)}, {scores_of(row)})" for row in one.dear
        ]
        return (
            f"{where}: stay with {_reference(one)}. Equivalent to it within {margin(settings)}, but not shown to cost "
            f"less: {joined(shown)}."
        )
    if one.advice == "open":
        return (
            f"{where}: undecided. No recipe is shown to be equivalent to {_reference(one)} within {margin(settings)}."
        )
    if one.advice == "unsound":
        return (
            f"{where}: undecided. No recipe with all of its seeds is shown to be equivalent to {_reference(one)} "
            f"within {margin(settings)}."
        )
    if one.advice == "better":
        return f"{where}: no recipe is equivalent to {_reference(one)} within {margin(settings)}."
    return f"{where}: stay with {_reference(one)}. Every other recipe is shown to lie outside {margin(settings)}."


def _unsound(row: Row) -> str:
    return (
        f"Undecided: {row.recipe.name} is equivalent on the {row.n} seed{'s' * (row.n != 1)} that could be compared, "
        f"{difference(row.comparison)}, {scores_of(row)}, but {joined(doubts(row))}: the seeds that are left may "
        "flatter it."
    )


def _open(row: Row, settings: Settings) -> str:
    doubted = f"; {joined(doubts(row))}" if doubts(row) else ""
    return (
        f"Undecided: {row.recipe.name}, {at_cost(row)}, {difference(row.comparison)}; {scores_of(row)}{doubted}; "
        f"{needed(row.comparison, settings)}."
    )
