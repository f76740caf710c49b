"""Noise floors: how far runs lie apart that differ in nothing that should matter."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

from lyapft.divergence import paired_divergence
from lyapft.records import Record, accuracies
from lyapft.verdict.evidence import Evidence, Recipe, is_own_counterpart, seed_of, threads

KINDS = {
    "replicate": "the same cell again",
    "threads": "the same cell with another thread count",
    "seeds": "another seed of full-precision fine-tuning of all weights",
}


@dataclass(frozen=True)
class Floor:
    """Mean absolute difference in points between two runs that differ in one thing, over `n` pairs of runs.

    Pairs of seeds share runs, so they are not independent and get no interval.
    """

    setting: tuple[str, str, str]
    kind: str
    n: int
    mean_abs: float
    largest: float


def floors(evidence: Evidence) -> list[Floor]:
    """The floors that the study's runs allow to measure, of every model, data set and task."""
    pairs_of: dict[str, Callable[[Recipe], Iterator[tuple[Record, Record]]]] = {
        "replicate": _replicates,
        "threads": _thread_counts,
        "seeds": _seeds,
    }
    found = []
    for setting in dict.fromkeys(recipe.setting for recipe in evidence.recipes):
        recipes = [recipe for recipe in evidence.recipes if recipe.setting == setting]
        for kind, choose in pairs_of.items():
            apart = [
                paired_divergence(accuracies(a), accuracies(b)).mean_abs_points
                for recipe in recipes
                for a, b in choose(recipe)
            ]
            if apart:
                found.append(Floor(setting, kind, len(apart), sum(apart) / len(apart), max(apart)))
    return found


def _replicates(recipe: Recipe) -> Iterator[tuple[Record, Record]]:
    first = {(seed_of(run), threads(run)): run for run in recipe.runs}
    for rerun in recipe.reruns:
        twin = first.get((seed_of(rerun), threads(rerun)))
        if twin is not None and _scored(twin, rerun):
            yield twin, rerun


def _thread_counts(recipe: Recipe) -> Iterator[tuple[Record, Record]]:
    first = {seed_of(run): run for run in recipe.runs}
    for rerun in recipe.reruns:
        twin = first.get(seed_of(rerun))
        if twin is not None and threads(twin) != threads(rerun) and not rerun.get("replicate") and _scored(twin, rerun):
            yield twin, rerun


def _seeds(recipe: Recipe) -> Iterator[tuple[Record, Record]]:
    if is_own_counterpart(recipe):
        yield from ((a, b) for a, b in combinations(recipe.runs, 2) if _scored(a, b))


def _scored(a: Record, b: Record) -> bool:
    return bool(accuracies(a) and accuracies(b))
