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
        self._held: dict[int, tuple[Tensor, int, int]] = {}  # in backward: what a slot holds, its version, which pass

    def empty(self, slot: int, shape: Sequence[int]) -> Tensor:
        """Uninitialised contiguous float32 memory of this shape."""
        self._held.pop(slot, None)
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
        """The same values in float32, exactly; a transposed matrix stays transposed.

        A linear layer's backward multiplies one gradient twice, by the weight and by the input: the second product
        finds it widened.
        """
        if half.dim() < 2 or half.is_contiguous() or not (transposed := half.mT).is_contiguous():
            return self._widen_as_it_lies(slot, half)
        return self._widen_as_it_lies(slot, transposed).mT

    def _widen_as_it_lies(self, slot: int, half: Tensor) -> Tensor:
        backward = torch._C._current_graph_task_id()
        if backward == -1:
            return self.empty(slot, half.shape).copy_(half)
        if slot in self._held:
            held, version, task = self._held[slot]
            same_memory = held.data_ptr() == half.data_ptr() and held.dtype == half.dtype
            same_view = held.shape == half.shape and held.stride() == half.stride()
            if same_memory and same_view and (version, task) == (half._version, backward):
                return self._views[slot, half.shape]
        wide = self.empty(slot, half.shape).copy_(half)
        if (slot, half.shape) in self._views:
            self._held[slot] = half, half._version, backward  # held, so that no other tensor can get its memory
        return wide
