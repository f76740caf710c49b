"""Models with a recurrent state beside the Transformer of their size: divergence, and in-context learning."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lyapft.divergence import Comparison, Estimate, adjusted, compare, estimate, icl_gains, ratio_of_means
from lyapft.records import Record
from lyapft.verdict.evidence import Evidence, Recipe, Settings, is_own_counterpart, resolution, seed_of
from lyapft.verdict.recipes import Row

ALL_RECIPES = "all shared recipes"
ALIKE = 3.0  # times as many parameters, beyond which two models are not of one size
Sizes = dict[int, float]  # mean absolute divergence in points, by seed


@dataclass(frozen=True)
class Contrast:
    """Mean absolute divergence of a recurrent model minus its Transformer twin's, seed by seed, in points.

    Unlike a divergence itself, its mean is 0 when both diverge alike, so its sign can be tested.
    """

    model: str
    twin: str
    data: str
    task: str
    recipe: str
    counterpart: str
    size: Estimate  # of the model
    twin_size: Estimate
    comparison: Comparison
    overall: bool  # whether it stands for all recipes that the two share


@dataclass(frozen=True)
class Gain:
    """In-context learning gain of one recipe on one task, and relative to the same recipe of the Transformer twin."""

    recipe: Recipe
    task: str
    gain: Estimate
    twin: str | None
    relative: Estimate | None
    reference: bool  # whether the recipe is full precision with every weight trained


def twins(evidence: Evidence) -> dict[str, str]:
    """For each model with a recurrent state, the study's Transformer that is nearest to it in parameters.

    One without a Transformer of about its size, and one with a recurrence that nothing here watches, have no twin.
    """
    recurrent: dict[str, int] = {}
    transformers: dict[str, int] = {}
    for recipe in evidence.recipes:
        for run in recipe.runs:
            if run.get("recurrences_unknown"):
                continue
            if count := (run.get("model") or {}).get("parameters_total"):
                (recurrent if run.get("kernels") else transformers)[recipe.model] = int(count)
    if not transformers:
        return {}

    def off(name: str, size: int) -> float:
        return abs(math.log(transformers[name] / size))

    nearest = {model: min(transformers, key=lambda name: off(name, size)) for model, size in recurrent.items()}
    return {model: name for model, name in nearest.items() if off(name, recurrent[model]) <= math.log(ALIKE)}


def contrasts(evidence: Evidence, found: Sequence[Row], settings: Settings) -> list[Contrast]:
    """A row per recipe that both have on at least one common seed, and one over all such recipes together.

    Args:
        found: rows against any kinds of counterparts; each kind is compared by itself.
    """
    by_key = {(row.recipe.model, *_place(row), row.recipe.label): row for row in found}
    raw: list[Contrast] = []
    for model, twin in twins(evidence).items():
        shared = [
            (row, by_key[twin, *key[1:]])
            for key, row in by_key.items()
            if key[0] == model and (twin, *key[1:]) in by_key
        ]
        for place in dict.fromkeys(_place(row) for row, _ in shared):
            raw += _contrasts(model, twin, [both for both in shared if _place(both[0]) == place], settings)
    return _adjusted([one for one in raw if one.overall]) + _adjusted([one for one in raw if not one.overall])


def _place(row: Row) -> tuple[str, str, str]:
    """What two rows must share to be compared across models."""
    return row.recipe.data, row.recipe.task, row.counterpart


def _adjusted(raw: Sequence[Contrast]) -> list[Contrast]:
    """The answer to the question and its details are families of their own: details must not blur the answer."""
    comparisons = adjusted([contrast.comparison for contrast in raw])
    return [replace(contrast, comparison=new) for contrast, new in zip(raw, comparisons, strict=True)]


def _contrasts(model: str, twin: str, shared: Sequence[tuple[Row, Row]], settings: Settings) -> list[Contrast]:
    sizes: dict[str, tuple[Sizes, Sizes]] = {
        ours.recipe.label: (_sizes(ours), _sizes(theirs)) for ours, theirs in shared
    }
    if len(sizes) > 1:
        sizes = {ALL_RECIPES: (_pooled(sizes, 0), _pooled(sizes, 1))} | sizes
    grain = max(resolution(pair) for both in shared for row in both for pair in row.pairs)
    row = shared[0][0]
    made: list[Contrast] = []
    for recipe, (ours, theirs) in sizes.items():
        if seeds := sorted(ours.keys() & theirs.keys()):
            made.append(
                Contrast(
                    model=model,
                    twin=twin,
                    data=row.recipe.data,
                    task=row.recipe.task,
                    recipe=recipe,
                    counterpart=row.counterpart,
                    size=estimate([ours[seed] for seed in seeds], grain, least=0.0),
                    twin_size=estimate([theirs[seed] for seed in seeds], grain, least=0.0),
                    comparison=compare([ours[seed] - theirs[seed] for seed in seeds], settings.margin, grain),
                    overall=not made,
                )
            )
    return made


def _sizes(row: Row) -> Sizes:
    return {pair.seed: pair.mean_abs for pair in row.pairs}


def _pooled(sizes: Mapping[str, tuple[Sizes, Sizes]], side: int) -> Sizes:
    """Mean over recipes, on the seeds that all have on both sides, so that no recipe weighs more on some seeds."""
    common = set.intersection(*(set(one) for both in sizes.values() for one in both))
    return {seed: math.fsum(both[side][seed] for both in sizes.values()) / len(sizes) for seed in common}


def gains(evidence: Evidence) -> list[Gain]:
    """In-context learning of every recipe and task that was scored with and without shots."""
    twin_of, found = twins(evidence), []
    by_key = {(recipe.model, recipe.data, recipe.task, recipe.label): recipe for recipe in evidence.recipes}
    gained = {key: _gains(recipe.runs) for key, recipe in by_key.items()}
    for key, recipe in by_key.items():
        own, twin = gained[key], twin_of.get(recipe.model)
        theirs = gained.get((twin, *key[1:]), {}) if twin else {}
        for task, by_seed in own.items():
            both = sorted(by_seed.keys() & theirs.get(task, {}).keys())
            relative = ratio_of_means([by_seed[s] for s in both], [theirs[task][s] for s in both]) if both else None
            gain = estimate(list(by_seed.values()))
            found.append(Gain(recipe, task, gain, twin if both else None, relative, is_own_counterpart(recipe)))
    return found


def _gains(runs: Iterable[Record]) -> Mapping[str, dict[int, float]]:
    by_task: dict[str, dict[int, float]] = {}
    for run in runs:
        for task, gain in icl_gains(run.get("scores") or []).items():
            by_task.setdefault(task, {})[seed_of(run)] = gain
    return by_task
