"""In-context learning: what solved examples in the prompt add to a score."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def icl_gains(scores: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Gain of each task: the mean over shots s > 0 of (acc_s − acc_0) / acc_0.

    Tasks without a 0-shot score, without any other, or with a 0-shot score of 0 have none and are left out.

    Source: Halloran et al. 2025, §6.

    >>> acc = {0: 0.25, 1: 0.5, 5: 0.75}
    >>> icl_gains({"task": "t", "shots": s, "value": v} for s, v in acc.items())
    {'t': 1.5}
    """
    tables: dict[str, dict[int, float]] = {}
    for score in scores:
        if score.get("metric", "acc") == "acc":
            tables.setdefault(str(score["task"]), {})[int(score["shots"])] = float(score["value"])
    return {
        task: math.fsum(value - by_shots[0] for shots, value in by_shots.items() if shots)
        / (len(by_shots) - 1)
        / by_shots[0]
        for task, by_shots in tables.items()
        if by_shots.get(0) and len(by_shots) > 1
    }
