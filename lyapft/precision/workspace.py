"""Float32 scratch memory that half operands are widened into.

Fresh memory for every operand costs more than the widening itself: large blocks come from the system as untouched
pages, and the page faults of a 6 MB operand took 4 to 6 ms against 0.4 ms for the conversion.
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
        self._views: dict[tuple[int, Sequence[int]], Tensor] = {}  # of a small product, making views is half the time

    def empty(self, slot: int, shape: Sequence[int]) -> Tensor:
        """Uninitialised contiguous float32 memory of this shape."""
        view = self._views.get((slot, shape))
        if view is not None:
            return view
        count = math.prod(shape)
        with torch.inference_mode(False):  # an inference tensor could not be written to while training
            if count > KEPT_ELEMENTS:
                return torch.empty(shape)
            if slot not in self._buffers or self._buffers[slot].numel() < count:
                self._buffers[slot] = torch.empty(count)
                self._views = {key: kept for key, kept in self._views.items() if key[0] != slot}
            view = self._views[slot, shape] = self._buffers[slot][:count].view(shape)
        return view

    def widen(self, slot: int, half: Tensor) -> Tensor:
        """The same values in float32, exactly; a transposed matrix stays transposed."""
        if half.dim() < 2 or half.is_contiguous() or not (transposed := half.mT).is_contiguous():
            return self.empty(slot, half.shape).copy_(half)
        return self.empty(slot, transposed.shape).copy_(transposed).mT
