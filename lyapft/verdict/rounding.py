"""In which residual block a number format's rounding enters, as the shadow probe saw it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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


def origin_of(run: Record) -> Origin | None:
    """Of one run; None where no shadow probe ran.

    Blocks are in the order of the model, each with the largest deviation of the training. One that was not finite is
    None in a record.
    """
    blocks: dict[str, float | None] = (run.get("shadow") or {}).get("deviation_max_by_block") or {}
    if not blocks:
        return None
    largest = max((value for value in blocks.values() if value is not None), default=0.0)
    before, best = 0.0, Origin(next(iter(blocks)), -1.0, largest)
    for name, value in blocks.items():
        if value is None:
            return Origin(name, 0.0, largest, overflowed=True)
        if value - before > best.added:
            best = Origin(name, value - before, largest)
        before = value
    return best


def agreed(found: Sequence[Origin]) -> str | None:
    """The block that more than half of the runs name, or the only run; None where they do not agree."""
    if not found:
        return None
    block, count = Counter(one.block for one in found).most_common(1)[0]
    return block if 2 * count > len(found) or len(found) == 1 else None
