"""Stability margins by recipe, beside those of full-precision fine-tuning of all weights, seed by seed."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from lyapft.divergence import Comparison, Estimate, adjusted, compare_each, estimate
from lyapft.records import Record
from lyapft.verdict.evidence import Evidence, Recipe
from lyapft.verdict.recipes import Row


@dataclass(frozen=True)
class Margins:
    """−λ_max of a recipe's runs in nats per token: each run's smallest over layers and training steps."""

    recipe: Recipe
    mean: Estimate  # over seeds
    lowest: float
    highest: float
    counterpart: float | None  # mean margin of the counterparts of the seeds that have one
    comparison: Comparison | None  # of the differences from them; p adjusted by Holm over all recipes


def margins(evidence: Evidence, rows: Sequence[Row]) -> list[Margins]:
    """A row per recipe with a measured margin; recipes that are one under two names and came out alike count once.

    Args:
        rows: against the paper's counterpart, whose pairs are compared.
    """
    beside = {row.recipe.key: row for row in rows}
    found, differences, names = [], [], []
    for recipe in evidence.recipes:
        own = [value for run in recipe.runs if (value := _margin(run)) is not None]
        if not own:
            continue
        row = beside.get(recipe.key)
        both = _both(row) if row else []
        counterpart = math.fsum(theirs for _, theirs in both) / len(both) if both else None
        found.append(Margins(recipe, estimate(own), min(own), max(own), counterpart, None))
        differences.append([ours - theirs for ours, theirs in both])
        names.append((*((row and row.same_as) or recipe).key, tuple(differences[-1])))
    return _compared(found, differences, names)


def _both(row: Row) -> list[tuple[float, float]]:
    """Margins of the runs and of their counterparts, where both were measured."""
    sides = [(_margin(pair.run), _margin(pair.counterpart)) for pair in row.pairs]
    return [(ours, theirs) for ours, theirs in sides if ours is not None and theirs is not None]


def _compared(
    found: Sequence[Margins], differences: Sequence[Sequence[float]], names: Sequence[Hashable]
) -> list[Margins]:
    """The same with their tests, where there are differences to test."""
    places = [place for place, own in enumerate(differences) if own]
    tests = adjusted(compare_each([differences[place] for place in places]), [names[place] for place in places])
    by_place = dict(zip(places, tests, strict=True))
    return [replace(one, comparison=by_place.get(place)) for place, one in enumerate(found)]


def _margin(run: Record) -> float | None:
    value = (run.get("stability") or {}).get("margin")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
