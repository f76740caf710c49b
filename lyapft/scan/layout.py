"""How tensors are handed to compiled kernels: flat storage with strides, lane-padded parameters, work in channel
groups."""

from typing import Any

import torch
from numba import types
from torch import Tensor

from lyapft.scan.simd import WIDTH

FLAT = types.float32[::1]
VIEW = types.UniTuple(types.int64, 4)  # offset, and the strides of batch, token and channel


def padded(channels: int) -> int:
    """Channels rounded up to whole lane blocks."""
    return -(-channels // WIDTH) * WIDTH


def flat(tensor: Tensor) -> Any:
    """The whole storage behind a tensor as a flat numpy array: a view, whatever the strides."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((length,), (1,), 0).numpy()


def view(tensor: Tensor) -> tuple[int, ...]:
    """Offset and strides that address a three-dimensional tensor in `flat`."""
    return tuple(int(number) for number in (tensor.storage_offset(), *tensor.stride()))


def lanes_last(tensor: Tensor, width: int) -> Tensor:
    """Contiguous copy whose last dimension is zero-padded to `width`."""
    result = torch.zeros(*tensor.shape[:-1], width)
    result[..., : tensor.shape[-1]] = tensor.detach()
    return result


def channel_groups(batch: int, blocks: int) -> int:
    """Groups of lane blocks per sequence: enough tasks for many cores, at least eight blocks each.

    No function of the thread count, so that sums over groups do not depend on it.
    """
    return max(1, min(blocks // 8, -(-32 // batch)))


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
