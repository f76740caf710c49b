"""Noise floors: how far runs lie apart that differ in nothing that should matter."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lyapft.divergence import paired_divergence
from lyapft.records import Record, accuracies
from lyapft.verdict.evidence import Evidence, Recipe, is_own_counterpart, seed_of, threads, values_of

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
    distances: dict[str, Callable[[Recipe], Iterator[float]]] = {
        "replicate": lambda recipe: _apart(_replicates(recipe)),
        "threads": lambda recipe: _apart(_thread_counts(recipe)),
        "seeds": _seeds,
    }
    recipes: dict[tuple[str, str, str], list[Recipe]] = {}
    for recipe in evidence.recipes:
        recipes.setdefault(recipe.setting, []).append(recipe)
    found = []
    for setting, own in recipes.items():
        for kind, measure in distances.items():
            if apart := [distance for recipe in own for distance in measure(recipe)]:
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


def _seeds(recipe: Recipe) -> Iterator[float]:
    """Every run beside every other: n² / 2 pairs, so a row of them at a time."""
    if not is_own_counterpart(recipe):
        return
    scores = [values for run in recipe.runs if (values := values_of(run))]
    keys = list(dict.fromkeys(key for values in scores for key in values))
    table: np.ndarray[Any, Any] = 100.0 * np.array([[values.get(key, np.nan) for key in keys] for values in scores])
    for place in range(len(table) - 1):
        apart = np.abs(table[place + 1 :] - table[place])
        common = (~np.isnan(apart)).sum(axis=1)
        yield from (np.nansum(apart, axis=1)[common > 0] / common[common > 0]).tolist()


def _apart(pairs: Iterator[tuple[Record, Record]]) -> Iterator[float]:
    return (paired_divergence(accuracies(a), accuracies(b)).mean_abs_points for a, b in pairs)


def _scored(a: Record, b: Record) -> bool:
    return bool(accuracies(a) and accuracies(b))
