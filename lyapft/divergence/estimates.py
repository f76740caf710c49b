"""Means over seeds with their intervals. Seeds are the unit: items and steps of one seed are not independent runs.

Shape letters: `…` any number of tables at once, n seeds. Everything is vectorised over the leading axes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

Values = np.ndarray | Sequence[float]
FEW_SEEDS = 8  # fewer than this, and a mean is labelled: intervals are wide and rank tests cannot reach p = 0.01
CONFIDENCE = 0.95

# Share of 95% BCa intervals that cover the mean of normal values, from 20,000 simulated studies of n seeds each
# (benchmarks/interval_coverage.py). The t interval covers 95% at every n. With few seeds BCa is too narrow: prefer t.
BCA_COVERAGE = {3: 0.72, 5: 0.84, 8: 0.88, 12: 0.91, 20: 0.93}


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its interval; the interval is NaN where there is one seed."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def few(self) -> bool:
        """Whether it rests on fewer than eight seeds, and must be labelled so."""
        return self.n < FEW_SEEDS


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
    if np.isnan(values_n).any():
        raise ValueError(f"{int(np.isnan(values_n).sum())} of {values_n.size} values are NaN: leave those seeds out")
    if values_n.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    low, high = t_interval(values_n, resolution, confidence)
    return Estimate(float(values_n.mean()), float(np.maximum(low, least)), float(np.minimum(high, most)), values_n.size)


def spread(values: Values, resolution: float = 0.0) -> np.ndarray[Any, Any]:
    """Standard deviation over seeds (n − 1), at least `resolution`; NaN for one seed.

    Scores are counts: a few seeds with exactly equal differences do not prove that the spread is 0, only that it is
    below what one answer is worth. `resolution` says what that is; without it equal values stay at 0.
    """
    values_n = np.asarray(values, float)
    if values_n.shape[-1] < 2:
        return np.full(values_n.shape[:-1], math.nan)
    return np.maximum(values_n.std(axis=-1, ddof=1), resolution)


def t_interval(
    values: Values, resolution: float = 0.0, confidence: float = CONFIDENCE
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
    if values_n.shape[-1] < 2:
        nothing = np.full(values_n.shape[:-1], math.nan)
        return nothing, nothing
    rng = np.random.default_rng(seed)
    equal = np.ptp(values_n, axis=-1) == 0
    # A constant sample has no acceleration; it is replaced here and put right below.
    sample = np.where(equal[..., None], np.arange(values_n.shape[-1]), values_n)
    found = stats.bootstrap(
        (sample,), np.mean, axis=-1, n_resamples=resamples, confidence_level=confidence, method="BCa", rng=rng
    ).confidence_interval
    mean = values_n.mean(axis=-1)
    return np.where(equal, mean, found.low), np.where(equal, mean, found.high)


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
