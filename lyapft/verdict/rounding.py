"""In which residual block a number format's rounding enters, as the shadow probe saw it."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lyapft.divergence import p_different
from lyapft.records import Record


@dataclass(frozen=True)
class Origin:
    """The block after which the deviation from float32 has grown most, relative to the hidden states' size.

    A deviation is handed on to the blocks that follow, so the largest one says where it ends up, not where it arises.
    """

    block: str
    added: float  # by this block; 0 where the format overflowed in it
    largest: float  # of all blocks that stayed finite
    overflowed: bool = False  # the first block after which the numbers are not finite


@dataclass(frozen=True)
class Origins:
    """The same over several runs: the block that adds most to their mean, or in which most of those overflow that do.

    `p` is of a paired t test over the runs that another block adds as much, the largest over the other blocks: one that
    is shown to add more than each is shown to add most. NaN for one run, and where numbers overflowed.
    """

    block: str
    seen: int  # runs in which it is the one
    runs: int
    added: float
    largest: float
    overflowed: bool
    p: float

    def shown(self, alpha: float) -> bool:
        """Whether the block is shown to be the one; NaN, of one run, shows nothing."""
        return self.overflowed or self.p <= alpha


def origin_of(run: Record) -> Origin | None:
    """Of one run; None where no shadow probe ran.

    Blocks are in the order of the model, each with the largest deviation of the training. One that was not finite is
    None in a record.
    """
    added = _added(run)
    if not added:
        return None
    block = max(added, key=lambda name: added[name])
    overflowed = math.isinf(added[block])
    return Origin(block, 0.0 if overflowed else added[block], _largest(run), overflowed)


def origins_of(runs: Iterable[Record]) -> Origins | None:
    """Of the runs of one recipe; None where no shadow probe ran in any of them."""
    seen = [(origin, run) for run in runs if (origin := origin_of(run))]
    if not seen:
        return None
    if overflows := Counter(origin.block for origin, _ in seen if origin.overflowed):
        block, count = overflows.most_common(1)[0]
        return Origins(block, count, len(seen), 0.0, math.nan, overflowed=True, p=math.nan)
    blocks = list(_added(seen[0][1]))
    added: np.ndarray[Any, Any] = np.array([[_added(run)[name] for name in blocks] for _, run in seen])
    most = int(added.mean(axis=0).argmax())
    own = added[:, most]
    others = np.delete(added, most, axis=1).T
    return Origins(
        block=blocks[most],
        seen=sum(origin.block == blocks[most] for origin, _ in seen),
        runs=len(seen),
        added=float(own.mean()),
        largest=float(np.mean([origin.largest for origin, _ in seen])),
        overflowed=False,
        p=_largest_p(own - others),
    )


def _largest_p(apart: np.ndarray[Any, Any]) -> float:
    """Over the other blocks, (blocks, runs); numbers that are equal in all runs have the spread of their rounding."""
    if not len(apart):
        return 0.0  # there is no other
    return float(np.max(p_different(apart, sys.float_info.epsilon)))


def _added(run: Record) -> Mapping[str, float]:
    """By how much the deviation grows in each block, up to the first that overflows, which adds ∞."""
    found: dict[str, float] = {}
    before = 0.0
    for name, value in _deviations(run).items():
        if value is None:
            return found | {name: math.inf}
        found[name], before = value - before, value
    return found


def _largest(run: Record) -> float:
    return max((value for value in _deviations(run).values() if value is not None), default=0.0)


def _deviations(run: Record) -> Mapping[str, float | None]:
    return (run.get("shadow") or {}).get("deviation_max_by_block") or {}
