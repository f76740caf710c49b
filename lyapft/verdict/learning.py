"""In-context learning: of each recipe, beside its Transformer twin, and of the tuned model beside its base."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd

from lyapft.divergence import (
    Estimate,
    ShotScores,
    estimate,
    gain_by_item,
    holm,
    p_different,
    ratio_of_means,
    shot_scores,
)
from lyapft.records import Record
from lyapft.verdict.architectures import twins
from lyapft.verdict.duplicates import first_of_its_kind
from lyapft.verdict.evidence import Evidence, Recipe, Settings, is_own_counterpart, seed_of


@dataclass(frozen=True)
class Raw:
    """The scores behind a gain, means over seeds: 0-shot, and the mean over the shots above 0; fractions."""

    zero: float
    few: float


@dataclass(frozen=True)
class Gain:
    """In-context learning gain of one recipe on one task, and relative to the same recipe of the Transformer twin.

    Over seeds; of a base, which is one cell whatever the seed, over its items, with n = 0 where its answers are not at
    hand. `relative` is NaN where the twin is not shown to gain: a ratio to what may be 0, or to a loss, says nothing.
    """

    recipe: Recipe
    task: str
    gain: Estimate
    raw: Raw
    twin: str | None
    relative: Estimate | None
    twin_raw: Raw | None
    reference: bool  # whether the recipe is full precision with every weight trained
    beyond: bool  # whether any of its scores is of items longer than what the base model was trained on


@dataclass(frozen=True)
class Learned:
    """In-context learning gain of a tuned recipe beside that of its base, on the seeds and shots that both have.

    A base is the same whatever its seed, so its gain has no interval of its own; the difference has one, over seeds.
    """

    recipe: Recipe
    base: Recipe
    task: str
    shots: tuple[int, ...]
    gain: Estimate
    raw: Raw
    base_gain: float
    base_raw: Raw
    difference: Estimate  # tuned minus base, as shares of the 0-shot score
    p: float  # two-sided, of a paired t test that the difference is 0; Holm over the table
    beyond: bool

    def more(self, settings: Settings) -> bool | None:
        """Whether the tuned model is shown to learn more in context, or less; None where the seeds show neither."""
        return self.difference.mean > 0 if self.p <= settings.alpha else None


class Measured(NamedTuple):
    """One task of one run, and what one changed answer moves its gain."""

    scores: ShotScores
    grain: float


BySeed = Mapping[int, Measured]
ByItem = tuple["pd.Series[float]", float]  # what each item has to do with a gain, and the least spread that is believed


def gains(evidence: Evidence) -> list[Gain]:
    """In-context learning of every recipe and task that was scored with and without shots."""
    twin_of, found = twins(evidence), []
    by_key = {recipe.key: recipe for recipe in evidence.recipes}
    scored = {key: _by_task(evidence, recipe.runs) for key, recipe in by_key.items()}
    for key, recipe in by_key.items():
        twin = twin_of.get(recipe.model)
        theirs = scored.get((twin, *key[1:]), {}) if twin else {}
        for task, own in scored[key].items():
            other = theirs.get(task, {})
            both = sorted(own.keys() & other.keys())
            ours, twins_ = [own[seed] for seed in both], [other[seed] for seed in both]
            gain, relative = _gain(own.values()), _relative(ours, twins_) if both else None
            if recipe.seedless:
                answers = _by_item(evidence, recipe, task), _by_item(evidence, by_key.get((twin or "", *key[1:])), task)
                gain, relative = _over_items(gain, answers[0]), _relative_over_items(*answers) if both else None
            found.append(
                Gain(
                    recipe=recipe,
                    task=task,
                    gain=gain,
                    raw=_raw(one.scores for one in own.values()),
                    twin=twin if both else None,
                    relative=relative,
                    twin_raw=_raw(other[seed].scores for seed in both) if both else None,
                    reference=is_own_counterpart(recipe),
                    beyond=_beyond(evidence, recipe.runs, task),
                )
            )
    return found


def _gain(found: Collection[Measured]) -> Estimate:
    return estimate([one.scores.gain for one in found], max(one.grain for one in found))


def _relative(ours: Sequence[Measured], theirs: Sequence[Measured]) -> Estimate:
    """Share of the twin's gain, on the seeds that both have.

    Refused (NaN) unless the 95% interval of the twin's own gain on these seeds lies above 0, its spread no smaller than
    what one answer moves the gain; one seed has no interval, and so gives no ratio.
    """
    if not _gain(theirs).low > 0:
        return Estimate(math.nan, math.nan, math.nan, len(theirs))
    (top, top_grain), (bottom, bottom_grain) = (
        ([one.scores.gain for one in side], max(one.grain for one in side)) for side in (ours, theirs)
    )
    return ratio_of_means(top, bottom, (top_grain, bottom_grain))


def _by_item(evidence: Evidence, recipe: Recipe | None, task: str) -> ByItem | None:
    """The gain of a base item by item, where its answers are at hand."""
    items = evidence.items.get(str(recipe.runs[0]["id"])) if recipe and recipe.seedless and recipe.runs else None
    return None if items is None else gain_by_item(items, task)


def _over_items(found: Estimate, own: ByItem | None) -> Estimate:
    if own is None:
        return Estimate(found.mean, math.nan, math.nan, 0, "items")
    return replace(estimate(*own), unit="items")


def _relative_over_items(ours: ByItem | None, theirs: ByItem | None) -> Estimate:
    """Share of the twin's gain, over the items that both were asked; refused (NaN) as that over seeds is."""
    if ours is None or theirs is None or not ours[0].index.equals(theirs[0].index):
        return Estimate(math.nan, math.nan, math.nan, 0, "items")
    if not estimate(*theirs).low > 0:
        return Estimate(math.nan, math.nan, math.nan, len(theirs[0]), "items")
    return replace(ratio_of_means(ours[0], theirs[0], (ours[1], theirs[1])), unit="items")


def learned(evidence: Evidence) -> list[Learned]:
    """Every tuned recipe beside its base, a row per task, where the study has both; p adjusted over all of them."""
    bases: dict[tuple[str, str, str], list[Recipe]] = {}
    for recipe in evidence.recipes:
        if recipe.runs and not recipe.trained:
            bases.setdefault(recipe.setting, []).append(recipe)
    raw = [
        one
        for recipe in evidence.recipes
        if recipe.trained and (base := _base_of(recipe, bases.get(recipe.setting, ())))
        for one in _learned(evidence, recipe, base)
    ]
    return _adjusted(raw, first_of_its_kind(evidence.recipes))


def _adjusted(raw: Sequence[Learned], same: Mapping[tuple[str, str, str, str], Recipe]) -> list[Learned]:
    """p adjusted by Holm; recipes that are one under two names and came out alike are one test."""
    names = [(same.get(one.recipe.key, one.recipe).key, one.task, one.difference.mean, one.difference.n) for one in raw]
    tests = {name: one.p for name, one in zip(names, raw, strict=True)}
    found = dict(zip(tests, holm(list(tests.values())), strict=True))
    return [replace(one, p=found[name]) for one, name in zip(raw, names, strict=True)]


def _base_of(recipe: Recipe, bases: Sequence[Recipe]) -> Recipe | None:
    """The base in the recipe's own format, or else in full precision."""
    fitting = [base for base in bases if base.precision in (recipe.precision, "fp32")]
    return min(fitting, key=lambda base: (base.precision != recipe.precision, base.peft != "none"), default=None)


def _learned(evidence: Evidence, recipe: Recipe, base: Recipe) -> Iterable[Learned]:
    theirs = {seed_of(run): run for run in base.runs}
    if base.seedless:  # its one run stands for all seeds
        theirs = {seed_of(run): base.runs[0] for run in recipe.runs}
    pairs = [(run, theirs[seed_of(run)]) for run in recipe.runs if seed_of(run) in theirs]
    sides: dict[str, list[tuple[ShotScores, ShotScores, float]]] = {}
    for run, base_run in pairs:
        scores = evidence.scores(run), evidence.scores(base_run)
        common = scores[0].values.keys() & scores[1].values.keys()
        tuned, untuned = (shot_scores({k: v for k, v in side.values.items() if k in common}) for side in scores)
        items = scores[0].items
        for task in (task for task in tuned if task in untuned):
            grain = max(_grain(one[task], _fewest(items, task)) for one in (tuned, untuned))
            sides.setdefault(task, []).append((tuned[task], untuned[task], grain))
    for task, found in sides.items():
        tuned_, untuned_ = [one for one, *_ in found], [one for _, one, _ in found]
        apart = [a.gain - b.gain for a, b in zip(tuned_, untuned_, strict=True)]
        resolution = max(grain for *_, grain in found)
        yield Learned(
            recipe=recipe,
            base=base,
            task=task,
            shots=tuned_[0].shots,
            gain=estimate([one.gain for one in tuned_], resolution),
            raw=_raw(tuned_),
            base_gain=estimate([one.gain for one in untuned_]).mean,
            base_raw=_raw(untuned_),
            difference=estimate(apart, resolution),
            p=float(p_different(apart, resolution)),
            beyond=_beyond(evidence, [run for pair in pairs for run in pair], task),
        )


def _grain(one: ShotScores, items: int) -> float:
    """What one changed answer moves a gain few/zero − 1: the least spread over seeds that is believed.

    One with shots moves `few` by 1/(n · shots), one without moves `zero` by 1/n: by the derivative, few/(n zero²).
    """
    return max(1.0 / len(one.shots), one.few / one.zero) / (items * one.zero)


def _fewest(items: Mapping[tuple[str, int], int], task: str) -> int:
    """Items behind the scores of a task; the fewest, where they differ."""
    return min(n for (name, _), n in items.items() if name == task)


def _by_task(evidence: Evidence, runs: Iterable[Record]) -> Mapping[str, BySeed]:
    by_task: dict[str, dict[int, Measured]] = {}
    for run in runs:
        scores = evidence.scores(run)
        for task, found in shot_scores(scores.values).items():
            by_task.setdefault(task, {})[seed_of(run)] = Measured(found, _grain(found, _fewest(scores.items, task)))
    return by_task


def _raw(found: Iterable[ShotScores]) -> Raw:
    sides = [(one.zero, one.few) for one in found]
    zero, few = (sum(side) / len(sides) for side in zip(*sides, strict=True))
    return Raw(zero, few)


def _beyond(evidence: Evidence, runs: Iterable[Record], task: str) -> bool:
    return any(name == task for run in runs for name, _ in evidence.scores(run).beyond)
