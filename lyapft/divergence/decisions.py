"""What the differences over seeds allow to say: different, equivalent within a margin, or undecided and with what n.

Differences are signed: an absolute one has a positive mean even when nothing but noise differs, so a test of it against
zero would always find something. Shape letters: `…` any number of tables at once, n seeds.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from scipy import special

from lyapft.divergence.estimates import Estimate, Values, estimate, spread

Outcome = Literal["equivalent", "better", "worse", "undecided"]
MARGIN_POINTS = 1.0  # percentage points: differences inside ± this are called equivalent
ALPHA = 0.05
POWER = 0.8
EXACT_SEEDS = 30  # up to which the rank test counts all signs
MOST_SEEDS = 10_000  # beyond this a study is not planned


def p_different(values: Values, resolution: float = 0.0) -> np.ndarray[Any, Any]:
    """Two-sided p of the paired t test that the mean difference is 0, over the last axis."""
    return _p_outside(*_moments(values, resolution), 0.0)


def p_equivalent(values: Values, margin: float, resolution: float = 0.0) -> np.ndarray[Any, Any]:
    """p of two one-sided t tests (TOST) that the mean difference lies inside ± margin.

    Source: Schuirmann 1987; the larger of the two one-sided p.
    """
    return _p_inside(*_moments(values, resolution), margin)


def p_outside(values: Values, margin: float, resolution: float = 0.0) -> np.ndarray[Any, Any]:
    """Two-sided p of the t test that the mean difference lies outside ± margin."""
    return _p_outside(*_moments(values, resolution), margin)


def _moments(values: Values, resolution: float) -> tuple[Any, Any, int]:
    """Mean, spread and number of seeds; the spread is NaN where it is 0, as it then says nothing, and for one seed."""
    values_n = np.asarray(values, float)
    sd = spread(values_n, resolution)
    return values_n.mean(axis=-1), np.where(sd > 0, sd, math.nan), values_n.shape[-1]


def _p_inside(mean: Any, sd: Any, n: int, margin: float) -> np.ndarray[Any, Any]:
    return np.maximum(_p_above(mean, sd, n, -margin), _p_below(mean, sd, n, margin))


def _p_outside(mean: Any, sd: Any, n: int, margin: float) -> np.ndarray[Any, Any]:
    return np.minimum(1.0, 2 * np.minimum(_p_above(mean, sd, n, margin), _p_below(mean, sd, n, -margin)))


def _p_above(mean: Any, sd: Any, n: int, bound: float) -> np.ndarray[Any, Any]:
    # as stats.t.sf, which spends fifty times as long on checking its arguments: a table has thousands of rows
    return np.asarray(special.stdtr(n - 1, -(mean - bound) * math.sqrt(n) / sd))


def _p_below(mean: Any, sd: Any, n: int, bound: float) -> np.ndarray[Any, Any]:
    return np.asarray(special.stdtr(n - 1, (mean - bound) * math.sqrt(n) / sd))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: rejecting where it is ≤ α keeps the chance of any false rejection ≤ α.

    NaN (no test was possible) stays NaN and counts as a member of the family.

    Source: Holm 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, float)
    order = np.argsort(np.where(np.isnan(p), np.inf, p), kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.nan_to_num(p[order], nan=1.0) * factors))
    return [float(a) if not np.isnan(raw) else math.nan for a, raw in zip(adjusted, p, strict=True)]


@dataclass(frozen=True)
class RankTest:
    """Exact two-sided signed-rank test; `smallest_p` is the least that this many non-zero differences can give."""

    p: float
    smallest_p: float
    n: int  # differences that are not 0


def rank_test(values: Values) -> RankTest:
    """Wilcoxon's signed-rank test, exact with ties too; over more than 30 seeds by the normal distribution.

    Source: Wilcoxon 1945; zero differences are left out, tied ones share their mean rank.

    >>> rank_test([0.1, 0.2, 0.3])
    RankTest(p=0.25, smallest_p=0.25, n=3)
    """
    kept = np.asarray(values, float)
    kept = kept[kept != 0]
    if kept.size == 0:
        return RankTest(1.0, 1.0, 0)
    _, place, ties = np.unique(np.abs(kept), return_inverse=True, return_counts=True)
    twice = (2 * np.cumsum(ties) - ties + 1)[place]  # mean ranks are halves
    above, total = int(twice[kept > 0].sum()), int(twice.sum())
    tail = min(above, total - above)  # of the two sums of ranks the smaller
    if kept.size <= EXACT_SEEDS:
        below = float(_rank_sums(twice)[: tail + 1].sum())
    else:
        below = float(special.ndtr((2 * tail - total) / math.sqrt(float((twice.astype(float) ** 2).sum()))))
    return RankTest(min(1.0, 2 * below), 2.0 / 2**kept.size, int(kept.size))


def _rank_sums(ranks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Chance of each sum of the ranks with a positive sign, where every sign is as likely as the other."""
    chances = np.zeros(int(ranks.sum()) + 1)
    chances[0] = 1.0
    for rank in ranks:
        chances[rank:] = (chances[rank:] + chances[:-rank]) / 2
        chances[:rank] /= 2
    return chances


def power_equivalent(n: int, mean: float, sd: float, margin: float, alpha: float = ALPHA) -> float:
    """Chance that TOST at level α finds n seeds equivalent, from the non-central t distribution.

    Source: Phillips 1990 (the usual approximation, which neglects that the two statistics share their spread).
    """
    critical, scale = special.stdtrit(n - 1, 1 - alpha), math.sqrt(n) / sd
    not_above = special.nctdtr(n - 1, (mean + margin) * scale, critical)
    below = special.nctdtr(n - 1, (mean - margin) * scale, -critical)
    return max(0.0, float(below - not_above))


def power_outside(n: int, mean: float, sd: float, margin: float, alpha: float = ALPHA) -> float:
    """Chance that n seeds show a mean beyond ± margin, by the two-sided test at level α."""
    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    return float(1.0 - special.nctdtr(n - 1, (abs(mean) - margin) * math.sqrt(n) / sd, critical))


def seeds_to_decide(
    mean: float, sd: float, margin: float = MARGIN_POINTS, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Seeds with which a study would decide with the given power, if mean and spread stay what they are.

    Inside the margin it would find equivalence, outside it a difference; None where 10,000 seeds would not do.

    >>> seeds_to_decide(mean=0.2, sd=1.0)
    12
    """
    if not (math.isfinite(mean) and math.isfinite(sd) and sd > 0):
        return None
    chance = power_equivalent if abs(mean) < margin else power_outside
    low, high = 1, 2
    while chance(high, mean, sd, margin, alpha) < power:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle, mean, sd, margin, alpha) >= power else (middle, high)
    return high if high <= MOST_SEEDS else None


@dataclass(frozen=True)
class Comparison:
    """Signed differences over seeds, tested; p values are adjusted for the table that the comparison stands in."""

    estimate: Estimate
    sd: float
    margin: float
    p_different: float
    p_equivalent: float
    p_outside: float
    values: tuple[float, ...]  # the differences, one per seed
    family: int = 1  # comparisons that share the error rate

    @cached_property
    def rank(self) -> RankTest:
        """The rank test of the differences, which no family adjusts; half of the work of a comparison."""
        return rank_test(self.values)

    def outcome(self, alpha: float = ALPHA) -> Outcome:
        """What the differences allow to say; NaN p values decide nothing."""
        if self.p_equivalent <= alpha:
            return "equivalent"
        if self.p_outside <= alpha:
            return "better" if self.estimate.mean > 0 else "worse"
        return "undecided"

    def seeds_needed(self, alpha: float = ALPHA, power: float = POWER) -> int | None:
        """Seeds that would decide, at the level that Holm leaves the least favoured of the family."""
        return seeds_to_decide(self.estimate.mean, self.sd, self.margin, alpha / self.family, power)


def compare(values: Values, margin: float = MARGIN_POINTS, resolution: float = 0.0) -> Comparison:
    """Estimate and tests of the signed differences of one comparison, one value per seed.

    Args:
        values: cell minus counterpart, percentage points.
        margin: points; inside ± this a difference does not matter.
        resolution: what one changed answer moves a value, in points: the least spread that is believed.
    """
    moments = _moments(values, resolution)
    return Comparison(
        estimate(values, resolution),
        float(spread(values, resolution)),
        margin,
        float(_p_outside(*moments, 0.0)),
        float(_p_inside(*moments, margin)),
        float(_p_outside(*moments, margin)),
        tuple(np.asarray(values, float).tolist()),
    )


def adjusted(comparisons: Sequence[Comparison], same: Sequence[Hashable] | None = None) -> list[Comparison]:
    """The comparisons of one table with every p adjusted by Holm over the table.

    Args:
        same: a name for each comparison; those that share one are one test, done twice, and count once.
    """
    names = range(len(comparisons)) if same is None else same
    tests: dict[Hashable, Comparison] = {}
    for name, comparison in zip(names, comparisons, strict=True):
        tests.setdefault(name, comparison)
    fields = ("p_different", "p_equivalent", "p_outside")
    columns = [holm([getattr(test, field) for test in tests.values()]) for field in fields]
    found = dict(zip(tests, zip(*columns, strict=True), strict=True))
    return [
        replace(c, **dict(zip(fields, found[name], strict=True)), family=len(tests))
        for c, name in zip(comparisons, names, strict=True)
    ]
