"""How far a cell's scores lie from those of its full-precision counterpart.

Always paired: the same seed, data order, initial weights and items on both sides, so differences are taken score by
score and item by item, never between averages of different items. Scores are fractions 0..1, divergences percentage
points. Everything here concerns one pair; `estimates` and `decisions` take the `signed_points` of many.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SPIKE_POINTS = 1.0  # percentage points: a score this far from its counterpart's is called a spike

ScoreKey = tuple[str, int]  # (task, shots)


def is_spike(points: float, threshold_points: float = SPIKE_POINTS) -> bool:
    """Whether a difference exceeds the threshold, in either direction.

    The difference of two fractions carries rounding: one answer of a hundred may be 1.0000000000000009 points.

    >>> is_spike(100 * (0.53 - 0.52)), is_spike(-1.25)
    (False, True)
    """
    return abs(points) > threshold_points + 1e-9


@dataclass(frozen=True)
class ScoreDivergence:
    """Difference of one score, cell minus counterpart, in percentage points."""

    task: str
    shots: int
    signed_points: float

    @property
    def abs_points(self) -> float:
        """Size of the difference without its direction."""
        return abs(self.signed_points)


@dataclass(frozen=True)
class Divergence:
    """Differences of all scores that a cell and its counterpart share; `unpaired` are those that only one has."""

    per_score: tuple[ScoreDivergence, ...]
    unpaired: tuple[ScoreKey, ...] = ()

    @property
    def mean_abs_points(self) -> float:
        """Mean of |difference| over tasks and shot counts: the paper's mean full-precision divergence (its §5)."""
        return math.fsum(score.abs_points for score in self.per_score) / len(self.per_score)

    @property
    def mean_signed_points(self) -> float:
        """Mean difference: unlike the absolute mean, 0 when there is nothing but noise."""
        return math.fsum(score.signed_points for score in self.per_score) / len(self.per_score)

    def spikes(self, threshold_points: float = SPIKE_POINTS) -> tuple[ScoreDivergence, ...]:
        """Scores whose difference exceeds the threshold (points, exclusive), in the order of `per_score`."""
        return tuple(score for score in self.per_score if is_spike(score.signed_points, threshold_points))

    def as_record(self) -> dict[str, Any]:
        """The two fields of a record's divergence entry that numbers fill."""
        per_score = [
            {
                "task": score.task,
                "shots": score.shots,
                "signed_points": score.signed_points,
                "abs_points": score.abs_points,
            }
            for score in self.per_score
        ]
        return {"mean_abs_points": self.mean_abs_points, "per_score": per_score}


def paired_divergence(
    scores: Iterable[Mapping[str, Any]], counterpart_scores: Iterable[Mapping[str, Any]]
) -> Divergence:
    """Divergence of a cell's scores from its counterpart's: 100 (acc_cell − acc_counterpart) per task and shot count.

    Args:
        scores, counterpart_scores: entries with `task`, `shots` and `value` (a fraction 0..1), as a record holds them.
    Raises:
        ValueError: a (task, shots) that appears twice, a value outside 0..1, or no (task, shots) in common.
    Source: Halloran et al. 2025, §5 (full-precision divergence).

    >>> cell, full = {"task": "mmlu", "shots": 5, "value": 0.25}, {"task": "mmlu", "shots": 5, "value": 0.5}
    >>> paired_divergence([cell], [full]).per_score
    (ScoreDivergence(task='mmlu', shots=5, signed_points=-25.0),)
    """
    ours, theirs = _by_key(scores), _by_key(counterpart_scores)
    common = [key for key in ours if key in theirs]
    if not common:
        raise ValueError(f"no (task, shots) in common: {sorted(ours)} against {sorted(theirs)}")
    per_score = tuple(ScoreDivergence(*key, signed_points=100.0 * (ours[key] - theirs[key])) for key in common)
    return Divergence(per_score, unpaired=tuple(sorted(ours.keys() ^ theirs.keys())))


def _by_key(scores: Iterable[Mapping[str, Any]]) -> dict[ScoreKey, float]:
    """Score values by (task, shots), checked."""
    values: dict[ScoreKey, float] = {}
    for score in scores:
        if score.get("metric", "acc") != "acc":  # acc_norm is shown beside it, and would count each item twice
            continue
        key, value = (str(score["task"]), int(score["shots"])), float(score["value"])
        if key in values:
            raise ValueError(f"two scores for {key}: give one metric per task and shot count")
        if not 0.0 <= value <= 1.0:  # also refuses NaN
            raise ValueError(f"score {value} of {key} is not a fraction between 0 and 1")
        values[key] = value
    return values


def against_counterparts(
    record: Mapping[str, Any], counterparts: Mapping[str, Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """A record's divergence entries: one per counterpart, also where there is nothing to compare with.

    Args:
        record: of the cell, with its scores.
        counterparts: by kind (`paper`, `precision_only`): the counterpart's record, or None where the cell is its own.
    Returns:
        Entries with status `ok`, `self`, or `missing` (the counterpart failed, or shares no score with the cell).
    """
    entries: list[dict[str, Any]] = []
    for kind, counterpart in counterparts.items():
        entry: dict[str, Any] = {"counterpart": kind, "reference_id": (counterpart or record)["id"]}
        nothing: dict[str, Any] = {"mean_abs_points": None, "per_score": []}
        if counterpart is None:
            entry |= {"status": "self"} | nothing
        elif (
            counterpart["status"] != "ok"
            or not _by_key(record["scores"]).keys() & _by_key(counterpart["scores"]).keys()
        ):
            entry |= {"status": "missing"} | nothing
        else:
            entry |= {"status": "ok"} | paired_divergence(record["scores"], counterpart["scores"]).as_record()
        entries.append(entry)
    return entries
