"""Float32 scratch memory that half operands are widened into.

Fresh memory for every operand costs more than the widening itself: large blocks come from the system as untouched pages,
and the page faults of a 6 MB operand took 4 to 6 ms against 0.4 ms for the conversion.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

KEPT_ELEMENTS = 2**24  # 64 MB: a larger operand gets fresh memory, so that little stays behind


class Workspace(threading.local):
    """Numbered float32 buffers, per thread; a slot's content lives until the slot is asked for again."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def empty(self, slot: int, shape: Sequence[int]) -> Tensor:
        """Uninitialised contiguous float32 memory of this shape."""
        count = math.prod(shape)
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < count:
            with torch.inference_mode(False):  # an inference tensor could not be written to while training
                buffer = torch.empty(count)
            if count <= KEPT_ELEMENTS:
                self._buffers[slot] = buffer
        return buffer[:count].view(shape)

    def widen(self, slot: int, half: Tensor) -> Tensor:
        """The same values in float32, exactly; a transposed matrix stays transposed."""
        if half.dim() > 1 and half.mT.is_contiguous():
            return self.empty(slot, half.mT.shape).copy_(half.mT).mT
        return self.empty(slot, half.shape).copy_(half)
