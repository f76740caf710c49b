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
ALMOST_ONE = 1 - 1e-12  # the z of a perfect correlation is infinite


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


def correlation_interval(values: Sequence[float]) -> Interval:
    """Mean and interval of correlations, by Fisher's z, whose interval stays between −1 and 1."""
    found = interval([math.atanh(max(-ALMOST_ONE, min(ALMOST_ONE, value))) for value in values])
    return Interval(math.tanh(found.mean), math.tanh(found.low), math.tanh(found.high), found.n)


def share_interval(values: Sequence[float]) -> Interval:
    """Mean and interval of shares, cut to the values that a share can take."""
    found = interval(values)
    return Interval(found.mean, max(0.0, found.low), min(1.0, found.high), found.n)


def over_seeds(rows: Sequence[dict[str, Any]], value: str, same: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows, and one more for each recipe with several runs: mean and interval of `value` over the runs.

    Args:
        rows: with `recipe` and `value`, whose interval over prompts is in `low` and `high`.
        same: columns in which rows must agree to be of one kind.
    """
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["recipe"] is not None:
            kinds.setdefault((row["recipe"], *(row[key] for key in same)), []).append(row)
    joined = [
        own[0] | {"model": f"{own[0]['recipe']} ({found.n} runs)", "over": "runs", value: found.mean}
        | {"low": found.low, "high": found.high, "n": found.n}
        for own in kinds.values()
        if (found := interval([row[value] for row in own])).n > 1
    ]  # fmt: skip
    return [row | {"over": row.get("over", "prompts")} for row in [*rows, *joined]]


def track(parts: Iterable[T], what: str, progress: bool) -> Iterable[T]:
    """The parts, with a bar on a terminal once they have taken two seconds."""
    bar: Iterable[T] = tqdm(parts, desc=what, delay=2, disable=None if progress else True, leave=False)
    return bar
