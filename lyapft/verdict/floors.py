"""Noise floors: how far runs lie apart that differ in nothing that should matter."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lyapft.divergence import paired_divergence
from lyapft.records import Record, accuracies, costs
from lyapft.verdict.evidence import Evidence, Recipe, ScoreKey, is_own_counterpart, scores_of, seed_of, threads

KINDS = {
    "replicate": "the same cell again",
    "threads": "the same cell with another thread count",
    "seeds": "another seed of full-precision fine-tuning of all weights",
}


def measurable(recipes: Iterable[Recipe]) -> dict[str, str]:
    """The kinds of floors that a study of these recipes can have: a seed moves nothing where nothing was trained."""
    recipes = list(recipes)
    moved = not recipes or any(recipe.trained for recipe in recipes)
    return {kind: name for kind, name in KINDS.items() if moved or kind != "seeds"}


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
    scores: tuple[float, float] = (math.nan, math.nan)  # lowest and highest mean score of the runs, fractions
    by_score: Mapping[ScoreKey, float] = field(default_factory=dict)  # mean absolute difference of each
    costs: Mapping[str, float] = field(default_factory=dict)  # × by which a cost lies apart, of the same cell again


@dataclass
class _Apart:
    """What is added up over pairs of runs."""

    distances: list[float] = field(default_factory=list)  # mean over scores, a number per pair
    means: list[float] = field(default_factory=list)  # mean scores of the runs
    sums: dict[ScoreKey, float] = field(default_factory=dict)
    counts: dict[ScoreKey, int] = field(default_factory=dict)

    def add(self, key: ScoreKey, total: float, count: int) -> None:
        self.sums[key] = self.sums.get(key, 0.0) + total
        self.counts[key] = self.counts.get(key, 0) + count


def floors(evidence: Evidence) -> list[Floor]:
    """The floors that the study's runs allow to measure, of every model, data set and task."""
    recipes: dict[tuple[str, str, str], list[Recipe]] = {}
    for recipe in evidence.recipes:
        recipes.setdefault(recipe.setting, []).append(recipe)
    found = []
    for setting, own in recipes.items():
        for kind, measure in MEASURES.items():
            apart = _Apart()
            for recipe in own:
                measure(recipe, apart)
            if n := len(apart.distances):
                by_score = {key: total / apart.counts[key] for key, total in apart.sums.items()}
                reach = (min(apart.means), max(apart.means))
                dear = cost_floors(own) if kind == "replicate" else {}
                mean, largest = sum(apart.distances) / n, max(apart.distances)
                found.append(Floor(setting, kind, n, mean, largest, reach, by_score, dear))
    return found


def cost_floors(recipes: Iterable[Recipe]) -> dict[str, float]:
    """How far speed and memory per token of the same cell again lie apart: e^(root mean square of ln ratios), ≥ 1."""
    logs: dict[str, list[float]] = {}
    for recipe in recipes:
        first = {(seed_of(run), threads(run)): run for run in recipe.runs}
        for rerun in recipe.reruns:
            twin = first.get((seed_of(rerun), threads(rerun)))
            for name in ("tokens_per_s", "peak_bytes_per_token"):
                sides = [costs(run).get(name) for run in (twin, rerun) if run is not None]
                if len(sides) == 2 and sides[0] and sides[1]:
                    logs.setdefault(name, []).append(math.log(sides[1] / sides[0]))
    return {name: math.exp(math.sqrt(math.fsum(x**2 for x in own) / len(own))) for name, own in logs.items()}


def _replicates(recipe: Recipe, apart: _Apart) -> None:
    first = {(seed_of(run), threads(run)): run for run in recipe.runs}
    for rerun in recipe.reruns:
        twin = first.get((seed_of(rerun), threads(rerun)))
        if twin is not None and _scored(twin, rerun):
            _compare(twin, rerun, apart)


def _thread_counts(recipe: Recipe, apart: _Apart) -> None:
    first = {seed_of(run): run for run in recipe.runs}
    for rerun in recipe.reruns:
        twin = first.get(seed_of(rerun))
        if twin is not None and threads(twin) != threads(rerun) and not rerun.get("replicate") and _scored(twin, rerun):
            _compare(twin, rerun, apart)


def _seeds(recipe: Recipe, apart: _Apart) -> None:
    """Every run beside every other: n² / 2 pairs, so a row of them at a time."""
    if not is_own_counterpart(recipe) or not recipe.trained:  # an untrained base is the same whatever its seed
        return
    scores = [values for run in recipe.runs if (values := scores_of(run).values)]
    if len(scores) < 2:
        return
    keys = list(dict.fromkeys(key for values in scores for key in values))
    table: np.ndarray[Any, Any] = 100.0 * np.array([[values.get(key, np.nan) for key in keys] for values in scores])
    apart.means += (np.nanmean(table, axis=1) / 100.0).tolist()
    for place in range(len(table) - 1):
        points = np.abs(table[place + 1 :] - table[place])
        common = (~np.isnan(points)).sum(axis=1)
        apart.distances += (np.nansum(points, axis=1)[common > 0] / common[common > 0]).tolist()
        for key, total, count in zip(keys, np.nansum(points, axis=0), (~np.isnan(points)).sum(axis=0), strict=True):
            if count:
                apart.add(key, float(total), int(count))


def _compare(first: Record, rerun: Record, apart: _Apart) -> None:
    found = paired_divergence(accuracies(first), accuracies(rerun))
    apart.distances.append(found.mean_abs_points)
    for score in found.per_score:
        apart.add((score.task, score.shots), score.abs_points, 1)
    apart.means += [float(np.mean(list(scores_of(side).values.values()))) for side in (first, rerun)]


def _scored(a: Record, b: Record) -> bool:
    return bool(accuracies(a) and accuracies(b))


MEASURES: dict[str, Callable[[Recipe, _Apart], None]] = {
    "replicate": _replicates,
    "threads": _thread_counts,
    "seeds": _seeds,
}
