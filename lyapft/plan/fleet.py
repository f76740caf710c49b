"""A study on many GPUs: when the last cell ends, what the cells leave on disk, and what they send.

Bytes per number were measured on cells of the shipped models (docs/scaling.md has the commands).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from lyapft.plan.gpu import TASKS
from lyapft.plan.sizes import FULL, Sizes

RECORD = 14_000  # bytes of record.json
ITEM = 46  # bytes of one scored item in items.parquet
STEP_VALUE = 11  # bytes of one number of a step in steps.parquet
SENT_VALUE = 100  # and in what W&B takes: a name goes with every number
PLAIN_COLUMNS, LYAPUNOV_COLUMNS = 9, 8  # of a step series: always; and per recurrent layer, and once for the model


@dataclass(frozen=True)
class Bytes:
    """What a cell leaves: its record, series and answers; its trained tensors; and what its live numbers send."""

    records: float
    weights: float
    sent: float

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.records + other.records, self.weights + other.weights, self.sent + other.sent)


NOTHING = Bytes(0, 0, 0)


def left(cfg: DictConfig, counted: Sizes) -> Bytes:
    """Bytes of a finished cell; the stored tensors are those that trained, in float32."""
    layers = counted.recurrent if "lyapunov" in cfg.probe else 0
    columns = PLAIN_COLUMNS + LYAPUNOV_COLUMNS * (layers + 1 if layers else 0)
    values = columns * cfg.trainer.steps
    names = list(cfg.task.get("names") or cfg.task.get("tasks") or [cfg.task.name])
    items = sum(TASKS[name].items for name in names if name in TASKS) * len(cfg.task.shots)
    series = STEP_VALUE * values + ITEM * items
    return Bytes(RECORD + series, FULL * counted.trainable, SENT_VALUE * values)


def wall(seconds: Sequence[float], gpus: int) -> float:
    """When the last of independent cells ends, the longest first, each on one GPU.

    Source: Graham 1969; at most 4/3 of the best order.

    >>> wall([3.0, 3.0, 2.0, 2.0, 2.0], 2)
    7.0
    """
    free = [0.0] * gpus
    for one in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + one)
    return max(free)
