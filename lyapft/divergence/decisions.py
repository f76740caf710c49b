"""What the differences over seeds allow to say: different, equivalent within a margin, or undecided and with what n.

Differences are signed: an absolute one has a positive mean even when nothing but noise differs, so a test of it against
zero would always find something. Shape letters: `…` any number of tables at once, n seeds.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy import special, stats

from lyapft.divergence.estimates import Estimate, Values, by_size, refuse_nan, spread, t_interval

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


def _moments(values: Values, resolution: Values | float) -> tuple[Any, Any, int]:
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
    return _rank_tests(np.asarray(values, float)[None])[0]


def _rank_tests(values_rn: np.ndarray[Any, Any]) -> list[RankTest]:
    """Of every row; sums of ranks are counted twice over, as mean ranks are halves."""
    zero_rn = values_rn == 0
    ranks_rn = stats.rankdata(np.where(zero_rn, np.inf, np.abs(values_rn)), axis=-1)  # zeros come last
    twice_rn = np.where(zero_rn, 0, 2 * ranks_rn).astype(int)
    above_r, total_r = np.where(values_rn > 0, twice_rn, 0).sum(axis=-1), twice_rn.sum(axis=-1)
    tail_r = np.minimum(above_r, total_r - above_r)  # of the two sums of ranks the smaller
    deviation_r = np.sqrt(np.maximum((twice_rn.astype(float) ** 2).sum(axis=-1), 1.0))
    below_r = special.ndtr((2 * tail_r - total_r) / deviation_r)
    n_r = np.count_nonzero(values_rn, axis=-1)
    for row in np.flatnonzero(n_r <= EXACT_SEEDS):
        ranks = tuple(sorted(twice_rn[row][~zero_rn[row]].tolist()))
        below_r[row] = _rank_sums(ranks)[: tail_r[row] + 1].sum()
    return [
        RankTest(min(1.0, 2 * below), 2.0 / 2**n if n else 1.0, n)
        for below, n in zip(below_r.tolist(), n_r.tolist(), strict=True)
    ]


@lru_cache(maxsize=1024)
def _rank_sums(ranks: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Chance of each sum of the ranks with a positive sign, where every sign is as likely as the other.

    Kept, as samples of one size without ties have the same ranks; halves of up to 30 signs are exact in any order.
    """
    chances = np.zeros(sum(ranks) + 1)
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
    mean: float,
    sd: float,
    margin: float = MARGIN_POINTS,
    alpha: float = ALPHA,
    power: float = POWER,
    least: float = 0.0,
) -> int | None:
    """Seeds with which a study would decide with the given power, if mean and spread stay what they are.

    Inside the margin it would find equivalence, outside it a difference; None where 10,000 seeds would not do.

    Args:
        least: √n times the least spread that is believed of n of them.

    >>> seeds_to_decide(mean=0.2, sd=1.0)
    12
    """
    if not (math.isfinite(mean) and math.isfinite(sd) and max(sd, least) > 0):
        return None
    power_of = power_equivalent if abs(mean) < margin else power_outside

    def chance(n: int) -> float:
        return power_of(n, mean, max(sd, least / math.sqrt(n)), margin, alpha)

    low, high = 1, 2
    while chance(high) < power:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
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
    rank: RankTest
    family: int = 1  # comparisons that share the error rate
    least: float = 0.0  # of n items, √n times the least spread that is believed

    def outcome(self, alpha: float = ALPHA) -> Outcome:
        """What the differences allow to say; NaN p values decide nothing."""
        if self.p_equivalent <= alpha:
            return "equivalent"
        if self.p_outside <= alpha:
            return "better" if self.estimate.mean > 0 else "worse"
        return "undecided"

    def seeds_needed(self, alpha: float = ALPHA, power: float = POWER) -> int | None:
        """Seeds that would decide, at the level that Holm leaves the least favoured of the family."""
        return seeds_to_decide(self.estimate.mean, self.sd, self.margin, alpha / self.family, power, self.least)


def compare(values: Values, margin: float = MARGIN_POINTS, resolution: float = 0.0) -> Comparison:
    """Estimate and tests of the signed differences of one comparison, one value per seed.

    Args:
        values: cell minus counterpart, percentage points.
        margin: points; inside ± this a difference does not matter.
        resolution: what one changed answer moves a value, in points: the least spread that is believed.
    """
    return compare_each([values], margin, resolution)[0]


def compare_each(
    samples: Sequence[Values], margin: float = MARGIN_POINTS, resolutions: Sequence[float] | float = 0.0
) -> list[Comparison]:
    """`compare` of many samples, each with its own resolution; those of equal size are computed together."""
    grains = np.broadcast_to(resolutions, len(samples))
    found: dict[int, Comparison] = {}
    for places, values_rn in by_size(samples):
        refuse_nan(values_rn)
        grain_r = grains[places]
        mean_r, sd_r, n = _moments(values_rn, grain_r)
        columns = (
            *(mean_r, *t_interval(values_rn, grain_r), spread(values_rn, grain_r)),
            _p_outside(mean_r, sd_r, n, 0.0),
            _p_inside(mean_r, sd_r, n, margin),
            _p_outside(mean_r, sd_r, n, margin),
        )
        numbers = zip(*(column.tolist() for column in columns), strict=True)
        for place, numbers_, rank in zip(places, numbers, _rank_tests(values_rn), strict=True):
            mean, low, high, sd, different, equivalent, outside = numbers_
            found[place] = Comparison(Estimate(mean, low, high, n), sd, margin, different, equivalent, outside, rank)
    return [found[place] for place in range(len(samples))]


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
