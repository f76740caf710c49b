"""In-context learning: of each recipe, beside its Transformer twin, and of the tuned model beside its base."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lyapft.divergence import Estimate, ShotScores, estimate, holm, p_different, ratio_of_means, shot_scores
from lyapft.records import Record
from lyapft.verdict.architectures import twins
from lyapft.verdict.evidence import Evidence, Recipe, is_own_counterpart, seed_of


@dataclass(frozen=True)
class Raw:
    """The scores behind a gain, means over seeds: 0-shot, and the mean over the shots above 0; fractions."""

    zero: float
    few: float


@dataclass(frozen=True)
class Gain:
    """In-context learning gain of one recipe on one task, and relative to the same recipe of the Transformer twin."""

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


BySeed = Mapping[int, ShotScores]


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
            relative = ratio_of_means([own[s].gain for s in both], [other[s].gain for s in both]) if both else None
            found.append(
                Gain(
                    recipe=recipe,
                    task=task,
                    gain=estimate([one.gain for one in own.values()]),
                    raw=_raw(own.values()),
                    twin=twin if both else None,
                    relative=relative,
                    twin_raw=_raw([other[seed] for seed in both]) if both else None,
                    reference=is_own_counterpart(recipe),
                    beyond=_beyond(evidence, recipe.runs, task),
                )
            )
    return found


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
    return [replace(one, p=p) for one, p in zip(raw, holm([one.p for one in raw]), strict=True)]


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
            grain = _grain(tuned[task], untuned[task], min(n for (name, _), n in items.items() if name == task))
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


def _grain(tuned: ShotScores, base: ShotScores, items: int) -> float:
    """What one changed answer moves a gain few/zero − 1: the least spread over seeds that is believed.

    One with shots moves `few` by 1/(n · shots), one without moves `zero` by 1/n: by the derivative, few/(n zero²).
    """
    return max(max(1.0 / len(one.shots), one.few / one.zero) / (items * one.zero) for one in (tuned, base))


def _by_task(evidence: Evidence, runs: Iterable[Record]) -> Mapping[str, BySeed]:
    by_task: dict[str, dict[int, ShotScores]] = {}
    for run in runs:
        for task, found in shot_scores(evidence.scores(run).values).items():
            by_task.setdefault(task, {})[seed_of(run)] = found
    return by_task


def _raw(found: Iterable[ShotScores]) -> Raw:
    sides = [(one.zero, one.few) for one in found]
    zero, few = (sum(side) / len(sides) for side in zip(*sides, strict=True))
    return Raw(zero, few)


def _beyond(evidence: Evidence, runs: Iterable[Record], task: str) -> bool:
    return any(name == task for run in runs for name, _ in evidence.scores(run).beyond)
