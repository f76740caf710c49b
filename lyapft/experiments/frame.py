"""What every experiment shares: its result, its progress bar, and the interval of a mean.

An experiment is a module of this package with a function `run(settings…, progress) -> Result`, a YAML file in
conf/experiment/ with its settings, and a drawing in `lyapft.report.experiments`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy import stats
from tqdm import tqdm

T = TypeVar("T")
CONFIDENCE = 0.95
ANYWHERE = (-math.inf, math.inf)
SHARE = (0.0, 1.0)
ALMOST_ONE = 1 - 1e-12  # the z of a perfect correlation is infinite


class Result(NamedTuple):
    """What an experiment found.

    Attributes:
        rows: the table of its numbers, all with the same keys.
        series: what its figures draw; JSON only.
    """

    rows: list[dict[str, Any]]
    series: dict[str, Any]


class Measured(NamedTuple):
    """Names of the columns of a mean and of its interval, and what the mean can be."""

    value: str
    low: str = "low"
    high: str = "high"
    within: tuple[float, float] = ANYWHERE


class Interval(NamedTuple):
    """A mean, its 95% interval by Student's t, and the number of independent values that it rests on."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], within: tuple[float, float] = ANYWHERE) -> Interval:
    """Mean and interval of the finite values; without two of them there is no interval (NaN).

    Args:
        within: what a mean can be. Student's t knows nothing of it; cutting its ends there loses no coverage.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, round(found.low, 3), found.n
    (2.0, -0.484, 3)
    >>> interval([1.0, 2.0, 3.0], within=(0, 4)).low
    0
    """
    finite = np.asarray([value for value in values if np.isfinite(value)], dtype=float)
    n = len(finite)
    mean = float(finite.mean()) if n else float("nan")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * stats.sem(finite)) if n > 1 else float("nan")
    low, high = within
    return Interval(mean, max(mean - half, low), min(mean + half, high), n)  # in this order NaN stays NaN


def correlation_interval(values: Sequence[float]) -> Interval:
    """Mean and interval of correlations, by Fisher's z, whose interval stays between −1 and 1."""
    found = interval([math.atanh(max(-ALMOST_ONE, min(ALMOST_ONE, value))) for value in values])
    return Interval(math.tanh(found.mean), math.tanh(found.low), math.tanh(found.high), found.n)


def over_seeds(
    rows: Sequence[dict[str, Any]], measured: Sequence[Measured], same: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows, and one more for each recipe with several runs: means and intervals over the runs.

    Args:
        rows: with `recipe`, and the columns of `measured`, whose intervals are over prompts.
        measured: what the rows of one recipe are averaged in. What else they differ in is None in the row of all.
        same: columns in which rows must agree to be of one kind.
    """
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["recipe"] is not None:
            kinds.setdefault((row["recipe"], *(row[key] for key in same)), []).append(row)
    joined = [_joined(own, measured) for own in kinds.values() if len(own) > 1]
    return [row | {"over": row.get("over", "prompts")} for row in [*rows, *joined]]


def _joined(own: list[dict[str, Any]], measured: Sequence[Measured]) -> dict[str, Any]:
    shared = {key: value if all(row[key] == value for row in own) else None for key, value in own[0].items()}
    row = shared | {"model": f"{own[0]['recipe']} ({len(own)} runs)", "n": len(own), "over": "runs"}
    for column in measured:
        found = interval([one[column.value] for one in own], column.within)
        row |= {column.value: found.mean, column.low: found.low, column.high: found.high}
    return row


def track(parts: Iterable[T], what: str, progress: bool) -> Iterable[T]:
    """The parts, with a bar on a terminal once they have taken two seconds."""
    bar: Iterable[T] = tqdm(parts, desc=what, delay=2, disable=None if progress else True, leave=False)
    return bar
