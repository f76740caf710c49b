"""In-context learning: what solved examples in the prompt add to a score."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lyapft.divergence.items import least_spread, shares


@dataclass(frozen=True)
class ShotScores:
    """One task without examples in the prompt, and with them."""

    zero: float  # the 0-shot score, > 0
    few: float  # mean over the shots s > 0
    shots: tuple[int, ...]  # those s, ascending

    @property
    def gain(self) -> float:
        """The mean over shots s > 0 of (acc_s − acc_0) / acc_0.

        Source: Halloran et al. 2025, §6.
        """
        return (self.few - self.zero) / self.zero


def shot_scores(values: Mapping[tuple[str, int], float]) -> dict[str, ShotScores]:
    """The scores of each task that has a gain, from those by (task, shots).

    Tasks without a 0-shot score, without any other, or with a 0-shot score of 0 have none and are left out.
    """
    tables: dict[str, dict[int, float]] = {}
    for (task, count), value in values.items():
        tables.setdefault(task, {})[count] = value
    return {
        task: ShotScores(by_shots[0], math.fsum(by_shots[s] for s in shots) / len(shots), shots)
        for task, by_shots in tables.items()
        if by_shots.get(0) and (shots := tuple(sorted(s for s in by_shots if s)))
    }


def gain_by_item(items: pd.DataFrame, task: str) -> "tuple[pd.Series[float], float] | None":
    """What each item has to do with the gain of its task, by the delta method: for cells whose seed changes nothing.

    With z_i the answer without examples (1 is right), f_i the mean of those with, and z, f and G their means and gain,

        g_i = G + (f_i − f) / z − f (z_i − z) / z²,

    whose mean is G, and whose standard error is that of G to first order; that of two models asked the same items also
    holds what they have in common.

    Args:
        items: with columns `task, subset, item, shots, correct`.
    Returns:
        g by (task, subset, item), and the least spread of it that is believed; None where not every item was asked both
        without and with examples, or no answer without is right.
    """
    own = items[items["task"] == task].assign(subset=items["subset"].astype(object).where(items["subset"].notna(), ""))
    sides = [own[own["shots"] == 0], own[own["shots"] > 0]]
    if any(side.empty for side in sides):
        return None
    (zero_I, worth_I), (few_I, _) = (shares(side, side["correct"].astype(float)) for side in sides)
    zero, few = float(zero_I.mean()), float(few_I.mean())
    if not zero or not zero_I.index.equals(few_I.index):
        return None
    gain_I = (few - zero) / zero + (few_I - few) / zero - few * (zero_I - zero) / zero**2
    return gain_I, least_spread(worth_I) * max(1.0, few / zero) / zero


def icl_gains(scores: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Gain of each task that has one, from a record's scores.

    >>> acc = {0: 0.25, 1: 0.5, 5: 0.75}
    >>> icl_gains({"task": "t", "shots": s, "value": v} for s, v in acc.items())
    {'t': 1.5}
    """
    values = {
        (str(score["task"]), int(score["shots"])): float(score["value"])
        for score in scores
        if score.get("metric", "acc") == "acc"
    }
    return {task: found.gain for task, found in shot_scores(values).items()}
