"""Models with a recurrent state beside the Transformer of their size: whose divergence is smaller."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lyapft.divergence import Comparison, Estimate, adjusted, compare, estimate
from lyapft.verdict.evidence import PRECISION_ONLY, Evidence, Recipe, Settings
from lyapft.verdict.floors import Floor
from lyapft.verdict.pairing import mean_scores, resolution
from lyapft.verdict.recipes import Row

ALL_RECIPES = "all shared recipes"
ALIKE = 3.0  # times as many parameters, beyond which two models are not of one size
Sizes = dict[int, float]  # mean absolute divergence in points, by seed


@dataclass(frozen=True)
class LeftOut:
    """A shared recipe that is not in a mean, as one of the models has it under another name there."""

    recipe: Recipe  # of that model
    same_as: Recipe
    other: str  # the other model
    alike: bool  # whether the other model has it twice as well


@dataclass(frozen=True)
class Pooling:
    """Another mean that could as well have been taken: of these recipes, and what it gives."""

    recipes: tuple[str, ...]
    comparison: Comparison


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
    left_out: tuple[LeftOut, ...] = ()
    others: tuple[Pooling, ...] = ()  # where some are left out: with all of them, and with these instead
    trained: bool = True  # whether anything was, or bases are compared, of which a seed moves none

    @property
    def place(self) -> tuple[str, ...]:
        """What its mean over recipes shares with its single recipes."""
        return self.model, self.twin, self.data, self.task, self.counterpart

    def steadier(self, settings: Settings) -> str | None:
        """Which of the two is shown to diverge less; None where the seeds do not show it in whichever pooling."""
        return None if self.poolings_disagree(settings) else self.steadier_in(self.comparison, settings)

    def steadier_in(self, found: Comparison, settings: Settings) -> str | None:
        """The same in one pooling."""
        if not found.p_different <= settings.alpha:  # NaN shows nothing
            return None
        return self.twin if found.estimate.mean > 0 else self.model

    def poolings_disagree(self, settings: Settings) -> bool:
        """Whether one pooling shows what another does not: the answer is then that of the choice."""
        poolings = (self.comparison, *(one.comparison for one in self.rivals))
        return len({self.steadier_in(one, settings) for one in poolings}) > 1

    @property
    def rivals(self) -> list[Pooling]:
        """The other poolings that rest on as many seeds; of fewer, it may be these that show nothing."""
        return [one for one in self.others if one.comparison.estimate.n == self.comparison.estimate.n]

    def seed_floors(self, floors: Sequence[Floor]) -> tuple[float, float] | None:
        """By how many points another seed alone moves the scores of both; both sizes hold that noise too."""
        place = (self.data, self.task)
        own = {
            floor.setting[0]: floor.mean_abs for floor in floors if floor.kind == "seeds" and floor.setting[1:] == place
        }
        return (own[self.model], own[self.twin]) if {self.model, self.twin} <= own.keys() else None


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
    tests = [contrast.comparison for contrast in raw]
    return [
        replace(
            contrast,
            comparison=new,
            others=tuple(
                replace(one, comparison=adjusted([*tests[:at], one.comparison, *tests[at + 1 :]])[at])
                for one in contrast.others
            ),
        )
        for at, (contrast, new) in enumerate(zip(raw, adjusted(tests), strict=True))
    ]


def _contrasts(model: str, twin: str, shared: Sequence[tuple[Row, Row]], settings: Settings) -> list[Contrast]:
    sizes: dict[str, tuple[Sizes, Sizes]] = {
        ours.recipe.label: (_sizes(ours), _sizes(theirs)) for ours, theirs in shared
    }
    behind = {both[0].recipe.label: [both] for both in shared}
    left_out = _left_out(shared)
    kept = [label for label in sizes if label not in left_out]
    others = _other_poolings(sizes, kept, left_out)
    if len(kept) > 1:
        sizes = {ALL_RECIPES: _pooled([sizes[label] for label in kept])} | sizes
        behind[ALL_RECIPES] = [both for both in shared if both[0].recipe.label in kept]
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
                    comparison=_apart((ours, theirs), settings, grain),
                    beyond=any(one.beyond for one in (*own, *twins_)),
                    overall=not made,
                    pooled=len(behind[recipe]),
                    left_out=tuple(left_out.values()) if recipe == ALL_RECIPES else (),
                    others=tuple(Pooling(labels, _apart(both, settings, grain)) for labels, both in others.items())
                    if recipe == ALL_RECIPES
                    else (),
                    trained=any(one.recipe.trained for one in (*own, *twins_)),
                )
            )
    return made


def _apart(sizes: tuple[Sizes, Sizes], settings: Settings, grain: float) -> Comparison:
    """The model's sizes minus the twin's, on the seeds that both have."""
    ours, theirs = sizes
    return compare([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())], settings.margin, grain)


def _other_poolings(
    sizes: Mapping[str, tuple[Sizes, Sizes]], kept: Sequence[str], left_out: Mapping[str, LeftOut]
) -> dict[tuple[str, ...], tuple[Sizes, Sizes]]:
    """Where recipes are left out: all of them, and those that are left out instead of those that they repeat."""
    instead: dict[str, str] = {}
    for label, one in left_out.items():
        instead.setdefault(one.same_as.label, label)
    chosen = {tuple(sizes), tuple(instead.get(label, label) for label in kept)} if left_out else set()
    pooled = {labels: _pooled([sizes[label] for label in labels]) for labels in sorted(chosen, key=len, reverse=True)}
    return {labels: both for labels, both in pooled.items() if both[0] and both[1]}


def _left_out(shared: Sequence[tuple[Row, Row]]) -> dict[str, LeftOut]:
    """By label, what either model repeats under another name, as it would weigh twice in a mean."""
    named = [{both[side].recipe.key for both in shared} for side in (0, 1)]
    found = {}
    for both in shared:
        again = [
            row.same_as if row.same_as and row.same_as.key in names else None
            for row, names in zip(both, named, strict=True)
        ]
        for side, same in enumerate(again):
            if same is not None:
                found[both[0].recipe.label] = LeftOut(both[side].recipe, same, both[1 - side].recipe.model, all(again))
                break
    return found


def _scores(rows: Sequence[Row], seeds: Sequence[int]) -> tuple[float, float]:
    """Mean scores of the rows and of their counterparts on these seeds."""
    wanted = set(seeds)
    return mean_scores([pair for row in rows for pair in row.pairs if pair.seed in wanted])


def _sizes(row: Row) -> Sizes:
    return {pair.seed: pair.mean_abs for pair in row.pairs}


def _pooled(sizes: Sequence[tuple[Sizes, Sizes]]) -> tuple[Sizes, Sizes]:
    """Means over recipes, on the seeds that all have on both sides, so that no recipe weighs more on some seeds."""
    common = set.intersection(*(set(one) for both in sizes for one in both))
    ours, theirs = (
        {seed: math.fsum(both[side][seed] for both in sizes) / len(sizes) for seed in common} for side in (0, 1)
    )
    return ours, theirs
