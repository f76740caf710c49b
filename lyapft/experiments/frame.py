"""What every experiment shares: its result, its progress bar, and the interval of a mean.

An experiment is a module of this package with a function `run(settings…, progress) -> Result`, a YAML file in
conf/experiment/ with its settings, and a drawing in `lyapft.report.experiments`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy import stats
from tqdm import tqdm

T = TypeVar("T")
CONFIDENCE = 0.95


class Result(NamedTuple):
    """What an experiment found.

    Attributes:
        rows: the table of its numbers, all with the same keys.
        series: what its figures draw; JSON only.
    """

    rows: list[dict[str, Any]]
    series: dict[str, Any]


class Interval(NamedTuple):
    """A mean, its 95% interval by Student's t, and the number of independent values that it rests on."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and interval of the finite values; without two of them there is no interval (NaN).

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, round(found.low, 3), found.n
    (2.0, -0.484, 3)
    """
    finite = np.asarray([value for value in values if np.isfinite(value)], dtype=float)
    n = len(finite)
    mean = float(finite.mean()) if n else float("nan")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * stats.sem(finite)) if n > 1 else float("nan")
    return Interval(mean, mean - half, mean + half, n)


def track(parts: Iterable[T], what: str, progress: bool) -> Iterable[T]:
    """The parts, with a bar on a terminal once they have taken two seconds."""
    bar: Iterable[T] = tqdm(parts, desc=what, delay=2, disable=None if progress else True, leave=False)
    return bar
