"""Stability margins by recipe, beside those of full-precision fine-tuning of all weights, seed by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lyapft.divergence import Comparison, Estimate, adjusted, compare, estimate
from lyapft.records import Record
from lyapft.verdict.duplicates import first_of_its_kind
from lyapft.verdict.evidence import PAPER, Evidence, Recipe
from lyapft.verdict.pairing import pairs


@dataclass(frozen=True)
class Margins:
    """−λ_max of a recipe's runs in nats per token: each run's smallest over layers and training steps."""

    recipe: Recipe
    mean: Estimate  # over seeds
    lowest: float
    highest: float
    counterpart: float | None  # mean margin of the counterparts of the seeds that have one
    comparison: Comparison | None  # of the differences from them; p adjusted by Holm over all recipes


def margins(evidence: Evidence) -> list[Margins]:
    """A row per recipe with a measured margin; recipes that are one under two names and came out alike count once."""
    same = first_of_its_kind(evidence.recipes)
    found, tests = [], []
    for recipe in evidence.recipes:
        own = [value for run in recipe.runs if (value := _margin(run)) is not None]
        if not own:
            continue
        sides = [(_margin(pair.run), _margin(pair.counterpart)) for pair in pairs(evidence, recipe, PAPER)]
        both = [(ours, theirs) for ours, theirs in sides if ours is not None and theirs is not None]
        differences = tuple(ours - theirs for ours, theirs in both)
        counterpart = math.fsum(theirs for _, theirs in both) / len(both) if both else None
        comparison = compare(differences) if both else None
        found.append(Margins(recipe, estimate(own), min(own), max(own), counterpart, comparison))
        tests.append((*same.get(recipe.key, recipe).key, differences))
    return _adjusted(found, tests)


def _adjusted(found: Sequence[Margins], tests: Sequence[tuple[object, ...]]) -> list[Margins]:
    compared = [(one.comparison, test) for one, test in zip(found, tests, strict=True) if one.comparison]
    new = iter(adjusted([comparison for comparison, _ in compared], [test for _, test in compared]) if compared else ())
    return [replace(one, comparison=next(new)) if one.comparison else one for one in found]


def _margin(run: Record) -> float | None:
    value = (run.get("stability") or {}).get("margin")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
