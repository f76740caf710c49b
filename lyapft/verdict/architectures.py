"""Models with a recurrent state beside the Transformer of their size: whose divergence is smaller."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lyapft.divergence import Comparison, Estimate, adjusted, compare, estimate
from lyapft.verdict.evidence import PRECISION_ONLY, Evidence, Settings
from lyapft.verdict.pairing import mean_scores, resolution
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
    scores: tuple[float, float]  # mean scores of the model and of its counterparts, fractions
    twin_scores: tuple[float, float]
    comparison: Comparison
    beyond: bool  # whether any score is of items longer than what the base model was trained on
    overall: bool  # whether it stands for all recipes that the two share
    pooled: int = 1  # recipes of which it is the mean
    left_out: tuple[str, ...] = ()  # shared recipes that either model has under another name as well

    def steadier(self, settings: Settings) -> str | None:
        """Which of the two is shown to diverge less; None where the seeds do not show it."""
        if not self.comparison.p_different <= settings.alpha:  # NaN shows nothing
            return None
        return self.twin if self.comparison.estimate.mean > 0 else self.model


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

    A recipe that repeats another one under its own name keeps its row, but counts once in the one over all.

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
            own = [both for both in shared if _place(both[0]) == place]
            if any(not _said_already(row) for row, _ in own):
                raw += _contrasts(model, twin, own, settings)
    return _adjusted([one for one in raw if one.overall]) + _adjusted([one for one in raw if not one.overall])


def _place(row: Row) -> tuple[str, str, str]:
    """What two rows must share to be compared across models."""
    return row.recipe.data, row.recipe.task, row.counterpart


def _said_already(row: Row) -> bool:
    """Whether its other counterpart is the same: with all weights, full precision of the same peft is the paper's."""
    return row.counterpart == PRECISION_ONLY and row.recipe.peft == "none"


def _adjusted(raw: Sequence[Contrast]) -> list[Contrast]:
    """The answer to the question and its details are families of their own: details must not blur the answer."""
    comparisons = adjusted([contrast.comparison for contrast in raw])
    return [replace(contrast, comparison=new) for contrast, new in zip(raw, comparisons, strict=True)]


def _contrasts(model: str, twin: str, shared: Sequence[tuple[Row, Row]], settings: Settings) -> list[Contrast]:
    sizes: dict[str, tuple[Sizes, Sizes]] = {
        ours.recipe.label: (_sizes(ours), _sizes(theirs)) for ours, theirs in shared
    }
    behind = {both[0].recipe.label: [both] for both in shared}
    once = _once(shared)
    kept = [ours.recipe.label for ours, _ in once]
    left_out = tuple(label for label in sizes if label not in kept)
    if len(once) > 1:
        pool = [sizes[label] for label in kept]
        sizes = {ALL_RECIPES: (_pooled(pool, 0), _pooled(pool, 1))} | sizes
        behind[ALL_RECIPES] = once
    grain = max(resolution(pair) for both in shared for row in both for pair in row.pairs)
    row = shared[0][0]
    made: list[Contrast] = []
    for recipe, (ours, theirs) in sizes.items():
        if seeds := sorted(ours.keys() & theirs.keys()):
            own, twins_ = ([both[side] for both in behind[recipe]] for side in (0, 1))
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
                    scores=_scores(own, seeds),
                    twin_scores=_scores(twins_, seeds),
                    comparison=compare([ours[seed] - theirs[seed] for seed in seeds], settings.margin, grain),
                    beyond=any(one.beyond for one in (*own, *twins_)),
                    overall=not made,
                    pooled=len(behind[recipe]),
                    left_out=left_out if recipe == ALL_RECIPES else (),
                )
            )
    return made


def _once(shared: Sequence[tuple[Row, Row]]) -> list[tuple[Row, Row]]:
    """Without those in which either model repeats a recipe under another name, which would weigh twice in a mean."""
    named = [{both[side].recipe.key for both in shared} for side in (0, 1)]
    return [
        both
        for both in shared
        if not any(row.same_as and row.same_as.key in names for row, names in zip(both, named, strict=True))
    ]


def _scores(rows: Sequence[Row], seeds: Sequence[int]) -> tuple[float, float]:
    """Mean scores of the rows and of their counterparts on these seeds."""
    wanted = set(seeds)
    return mean_scores([pair for row in rows for pair in row.pairs if pair.seed in wanted])


def _sizes(row: Row) -> Sizes:
    return {pair.seed: pair.mean_abs for pair in row.pairs}


def _pooled(sizes: Sequence[tuple[Sizes, Sizes]], side: int) -> Sizes:
    """Mean over recipes, on the seeds that all have on both sides, so that no recipe weighs more on some seeds."""
    common = set.intersection(*(set(one) for both in sizes for one in both))
    return {seed: math.fsum(both[side][seed] for both in sizes) / len(sizes) for seed in common}
