"""What a difference is made of: the part of the peft, that of the number format, and that of single layers.

Which recipes fail, and on which scores, is seen on the very seeds by which their parts are measured: among many, those
fail that noise pushed down, and a test of the failing ones alone takes that push for a part. So every recipe is tested,
and each of its scores, whether it fails or not; of a failure is told what those tests show.
"""

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from lyapft.divergence import Comparison, compare, holm, p_different
from lyapft.verdict.duplicates import NAMES_ONLY
from lyapft.verdict.evidence import PRECISION_ONLY, Evidence, Recipe, ScoreKey
from lyapft.verdict.pairing import mean_scores_of, pairs
from lyapft.verdict.recipes import Row

Test = tuple[Hashable, ...]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Part:
    """Points by which one choice moves each score, by seed.

    `test` says what is tested, its kind first: parts that share it are one test, asked twice.
    """

    test: Test
    points: Mapping[int, Mapping[ScoreKey, float]]
    fewest_items: int  # behind any score

    @property
    def keys(self) -> list[ScoreKey]:
        """Every score that any seed has."""
        return list(dict.fromkeys(key for own in self.points.values() for key in own))

    def over(self, keys: Collection[ScoreKey]) -> list[float]:
        """Mean over these scores, of every seed that has all of them."""
        return [
            math.fsum(own[key] for key in keys) / len(keys)
            for own in self.points.values()
            if all(key in own for key in keys)
        ]

    def resolution(self, keys: Collection[ScoreKey]) -> float:
        """Points by which one changed answer moves the mean over these scores."""
        return 100.0 / (self.fewest_items * len(keys))

    def p(self, keys: Collection[ScoreKey]) -> float:
        """Two-sided, that it is nothing over these scores; NaN where no seed has them all."""
        values = self.over(keys)
        return float(p_different(values, self.resolution(keys))) if values else math.nan


@dataclass(frozen=True)
class Families:
    """p of every part after Holm's correction, over all of its scores and of each.

    Each kind of part is one family over all recipes of a page, and one over all of their single scores.
    """

    whole: Mapping[Test, float]
    single: Mapping[tuple[Test, ScoreKey], float]

    def comparison(self, part: Part, keys: Collection[ScoreKey], margin: float) -> Comparison:
        """A part over these scores, with the p of its family."""
        found = compare(part.over(keys), margin, part.resolution(keys))
        return replace(found, p_different=self._p(part, keys, found.estimate.mean))

    def _p(self, part: Part, keys: Collection[ScoreKey], mean: float) -> float:
        """Of some scores, which were chosen by their numbers, the least p of one that points where their mean does, but
        no less than that of their mean."""
        if set(keys) == set(part.keys):
            return self.whole[part.test]
        known = [self.single[part.test, key] for key in keys if math.fsum(part.over([key])) * mean > 0]
        least = min((p for p in known if not math.isnan(p)), default=math.nan)
        return max(least, part.p(keys)) if not math.isnan(least) else math.nan


def jointly(parts: Iterable[Part]) -> Families:
    """The families of all parts that a page could tell of; what is one test counts once."""
    kinds: dict[Hashable, dict[Test, Part]] = {}
    for part in parts:
        kinds.setdefault(part.test[0], {}).setdefault(part.test, part)
    whole: dict[Test, float] = {}
    single: dict[tuple[Test, ScoreKey], float] = {}
    for tests in kinds.values():
        whole |= holm_by_name({test: part.p(part.keys) for test, part in tests.items()})
        single |= holm_by_name({(test, key): part.p([key]) for test, part in tests.items() for key in part.keys})
    return Families(whole, single)


def holm_by_name(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """p values of tests by their names, after Holm's correction over all of them."""
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))


# --- peft and number format ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves:
    """The two parts of a recipe that changes both choices, and its row."""

    row: Row
    peft: Part
    form: Part

    def shares(self, keys: Sequence[ScoreKey], families: Families, margin: float) -> "Shares | None":
        """Both over these scores; None where no seed has them all, on the recipe's side and on both counterparts'."""
        if not (form := self.form.over(keys)):
            return None
        used = [
            pair
            for pair in self.row.pairs
            if (own := self.form.points.get(pair.seed)) is not None and all(key in own for key in keys)
        ]
        score, _ = mean_scores_of(used, keys)
        middle = score - math.fsum(form) / len(form) / 100.0
        peft, form_ = (families.comparison(part, keys, margin) for part in (self.peft, self.form))
        return Shares(peft, form_, middle)


@dataclass(frozen=True)
class Shares:
    """Parts of a mean signed difference, in points; `middle` is the score in between: full precision, same peft."""

    peft: Comparison
    form: Comparison
    middle: float


def halves(evidence: Evidence, row: Row) -> Halves | None:
    """The parts of a row against the paper's counterpart, of the peft and of the number format, seed by seed.

    (cell − paper) = (fp32 same peft − paper) + (cell − fp32 same peft); None where either choice is full precision's,
    or no seed has both counterparts.
    """
    recipe = row.recipe
    if recipe.precision == "fp32" or recipe.peft == "none":
        return None
    same = {pair.seed: pair.signed for pair in pairs(evidence, recipe, PRECISION_ONLY)}
    form: dict[int, dict[ScoreKey, float]] = {}
    peft: dict[int, dict[ScoreKey, float]] = {}
    for pair in row.pairs:
        own = same.get(pair.seed, {})
        if shared := [key for key in pair.signed if key in own]:
            form[pair.seed] = {key: own[key] for key in shared}
            peft[pair.seed] = {key: pair.signed[key] - own[key] for key in shared}
    if not form:
        return None
    fewest = min(pair.fewest_items for pair in row.pairs)
    first = row.same_as or recipe
    return Halves(
        row,
        # the same whatever format it stands beside
        Part(("peft", *first.setting, first.but_format, _values(peft)), peft, fewest),
        Part(("format", first.key, _values(form)), form, fewest),
    )


def _values(points: Mapping[int, Mapping[ScoreKey, float]]) -> tuple[tuple[int, float], ...]:
    """What came out, so that two names of one recipe are one test only where they came out alike."""
    return tuple((seed, round(math.fsum(own.values()), 9)) for seed, own in points.items())


# --- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """Another recipe whose target set holds a recipe's, or lies in it, in the same format: other minus recipe."""

    row: Row
    other: Row
    more: frozenset[str]  # the layers in which the two differ
    part: Part


def beside(found: Sequence[Row]) -> list[Beside]:
    """Every two recipes of which one adapts all the layers that the other does, and more, all else equal; once from
    either side."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in found:
        if row.recipe.adapted:
            groups.setdefault((row.recipe.setting, row.recipe.precision), []).append(row)
    return [
        Beside(row, other, more, part)
        for own in groups.values()
        for row in own
        for other in own
        if (more := _more(row.recipe, other.recipe)) and (part := _apart(row, other))
    ]


def _more(recipe: Recipe, other: Recipe) -> frozenset[str]:
    ours, theirs = recipe.adapted, other.adapted
    within = (ours < theirs or theirs < ours) and recipe.differs_only_in(other, *NAMES_ONLY)
    return ours ^ theirs if within else frozenset()


def _apart(row: Row, other: Row) -> Part | None:
    """What the other target set gains, on the seeds and scores that both have."""
    theirs = {pair.seed: pair.signed for pair in other.pairs}
    both = [(pair.seed, pair.signed, theirs[pair.seed]) for pair in row.pairs if pair.seed in theirs]
    points = {seed: {key: b[key] - a[key] for key in a if key in b} for seed, a, b in both if a.keys() & b.keys()}
    if not points:
        return None
    names = frozenset((one.same_as or one.recipe).key for one in (row, other))
    sizes = tuple((seed, abs(value)) for seed, value in _values(points))  # from either side
    return Part(("layers", names, sizes), points, min(pair.fewest_items for pair in (*row.pairs, *other.pairs)))
