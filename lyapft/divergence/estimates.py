"""Means over seeds with their intervals. Seeds are the unit: items and steps of one seed are not independent runs.

Only where nothing was trained, and so one cell is all there is, items are the unit (see `items.over_items`).

Shape letters: `…` any number of tables at once, n seeds. Everything is vectorised over the leading axes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import special, stats

Values = np.ndarray | Sequence[float]
Unit = Literal["seeds", "items"]
FEW_SEEDS = 8  # fewer than this, and a mean is labelled: intervals are wide and rank tests cannot reach p = 0.01
CONFIDENCE = 0.95

# Share of 95% BCa intervals that cover the mean of normal values, from 20,000 simulated studies of n seeds each
# (benchmarks/interval_coverage.py). The t interval covers 95% at every n. With few seeds BCa is too narrow: prefer t.
BCA_COVERAGE = {3: 0.72, 5: 0.84, 8: 0.88, 12: 0.91, 20: 0.93}
ROWS_AT_ONCE = 256  # samples whose resampled means are held at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds, or items, and its interval; the interval is NaN where there is one seed."""

    mean: float
    low: float
    high: float
    n: int
    unit: Unit = field(default="seeds", repr=False)

    @property
    def few(self) -> bool:
        """Whether it rests on fewer than eight seeds, and must be labelled so."""
        return self.unit == "seeds" and self.n < FEW_SEEDS


def estimate(
    values: Values,
    resolution: float = 0.0,
    confidence: float = CONFIDENCE,
    least: float = -math.inf,
    most: float = math.inf,
) -> Estimate:
    """Mean and t interval of one value per seed; NaN values are refused, no value gives NaN with n = 0.

    The interval is cut at `least` and `most`, between which the mean must lie: that costs it no coverage.

    >>> estimate([4.0, 4.0, 4.0])
    Estimate(mean=4.0, low=4.0, high=4.0, n=3)
    """
    values_n = np.asarray(values, float)
    refuse_nan(values_n)
    if values_n.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    low, high = t_interval(values_n, resolution, confidence)
    return Estimate(float(values_n.mean()), float(np.maximum(low, least)), float(np.minimum(high, most)), values_n.size)


def refuse_nan(values: np.ndarray[Any, Any]) -> None:
    """Raise ValueError where a seed has no value."""
    if count := int(np.isnan(values).sum()):
        raise ValueError(f"{count} of {values.size} values are NaN: leave those seeds out")


def spread(values: Values, resolution: Values | float = 0.0) -> np.ndarray[Any, Any]:
    """Standard deviation over seeds (n − 1), at least `resolution`; NaN for one seed.

    Scores are counts: a few seeds with exactly equal differences do not prove that the spread is 0, only that it is
    below what one answer is worth. `resolution` says what that is; without it equal values stay at 0.
    """
    values_n = np.asarray(values, float)
    if values_n.shape[-1] < 2:
        return np.full(values_n.shape[:-1], math.nan)
    return np.maximum(values_n.std(axis=-1, ddof=1), resolution)


def t_interval(
    values: Values, resolution: Values | float = 0.0, confidence: float = CONFIDENCE
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Student's interval of the mean over the last axis: x̄ ± t_{n−1} s/√n; exact for normal values."""
    values_n = np.asarray(values, float)
    n, mean = values_n.shape[-1], values_n.mean(axis=-1)
    half = special.stdtrit(max(n - 1, 1), 0.5 + confidence / 2) * spread(values_n, resolution) / math.sqrt(n)
    return mean - half, mean + half


def bca_coverage(n: int) -> float:
    """What a 95% BCa interval over n seeds really covers of normal values; NaN below three seeds.

    >>> bca_coverage(10)
    0.88
    """
    return BCA_COVERAGE.get(max((known for known in BCA_COVERAGE if known <= n), default=0), math.nan)


def bca_interval(
    values: Values, confidence: float = CONFIDENCE, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Bias-corrected and accelerated bootstrap interval of the mean over the last axis, resampling seeds.

    Makes no assumption of normality, but is too narrow for few seeds: see BCA_COVERAGE. NaN for one seed; of width 0
    where all values are equal.

    Source: Efron 1987, through `scipy.stats.bootstrap`.
    """
    values_n = np.asarray(values, float)
    n = values_n.shape[-1]
    if n < 2:
        nothing = np.full(values_n.shape[:-1], math.nan)
        return nothing, nothing
    rows_rn = values_n.reshape(-1, n)
    starts = range(0, len(rows_rn), ROWS_AT_ONCE)
    parts = [_bca(rows_rn[start : start + ROWS_AT_ONCE], confidence, resamples, seed) for start in starts]
    low, high = (np.concatenate(side).reshape(values_n.shape[:-1]) for side in zip(*parts, strict=True))
    return low, high


def _bca(values_rn: np.ndarray[Any, Any], confidence: float, resamples: int, seed: int) -> tuple[Any, Any]:
    """Of the rows of a table: their places are resampled, so each has the resamples that it would have alone."""
    n, equal_r = values_rn.shape[-1], np.ptp(values_rn, axis=-1) == 0
    # A constant sample has no acceleration; it is replaced here and put right below.
    sample_rn = np.where(equal_r[:, None], np.arange(n), values_rn)

    def means(places: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
        return np.stack([row.take(places).mean(axis=axis) for row in sample_rn])

    rng = np.random.default_rng(seed)
    found = stats.bootstrap(
        (np.arange(n),), means, n_resamples=resamples, confidence_level=confidence, method="BCa", rng=rng
    ).confidence_interval
    mean_r = values_rn.mean(axis=-1)
    return np.where(equal_r, mean_r, found.low), np.where(equal_r, mean_r, found.high)


def by_size(samples: Sequence[Values]) -> Iterator[tuple[list[int], np.ndarray[Any, Any]]]:
    """The samples of equal size as the rows of one table, with their places.

    >>> [(places, table.shape) for places, table in by_size([[1.0, 2.0], [3.0], [4.0, 5.0]])]
    [([0, 2], (2, 2)), ([1], (1, 1))]
    """
    places: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(len(sample), []).append(place)
    for own in places.values():
        yield own, np.array([samples[place] for place in own], float)


def ratio_of_means(
    top: Values, bottom: Values, resolutions: tuple[float, float] = (0.0, 0.0), confidence: float = CONFIDENCE
) -> Estimate:
    """mean(top) / mean(bottom) over the same seeds, with Fieller's interval; NaN where `bottom` may be 0.

    The interval holds every ratio ρ that a paired t test of top − ρ·bottom = 0 does not reject. It exists where the t
    interval of `bottom` leaves out 0; `resolutions` are the least spreads of the two that are believed (see `spread`).

    Source: Fieller 1954.

    >>> ratio_of_means([2.0, 2.2, 1.8], [1.0, 1.0, 1.0]).mean
    2.0
    """
    a, b = np.asarray(top, float), np.asarray(bottom, float)
    n = a.size
    if n < 2:
        return Estimate(float(a.mean() / b.mean()) if n and b.mean() else math.nan, math.nan, math.nan, n)
    (var_a, cov), (_, var_b) = np.cov(a, b)
    var_a, var_b = max(var_a, resolutions[0] ** 2), max(var_b, resolutions[1] ** 2)
    q = special.stdtrit(n - 1, 0.5 + confidence / 2) ** 2 / n
    # (ā − ρ b̄)² ≤ q (s_a² − 2ρ s_ab + ρ² s_b²), a quadratic in ρ.
    square, linear, constant = b.mean() ** 2 - q * var_b, a.mean() * b.mean() - q * cov, a.mean() ** 2 - q * var_a
    if square <= 0:  # the interval of b̄ holds 0: every ratio is possible
        return Estimate(math.nan, math.nan, math.nan, n)
    root = math.sqrt(max(linear**2 - square * constant, 0.0))
    return Estimate(float(a.mean() / b.mean()), float((linear - root) / square), float((linear + root) / square), n)
