"""How tensors are handed to compiled kernels: flat storage with strides, lane-padded parameters, work in chunks of
tokens and groups of channels."""

from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from lyapft.scan.packing import begins
from lyapft.scan.simd import WIDTH
from lyapft.scan.tiles import ROWS

TABLE = types.int64[::1]  # (B,C,3), flat: first token, tokens and first token of its sequence, of each chunk
FLAT = types.float32[::1]
VIEW = types.UniTuple(types.int64, 4)  # offset, and the strides of batch, token and channel


# Kernels take float32, whatever torch's default is.
zeros = partial(torch.zeros, dtype=torch.float32)
empty = partial(torch.empty, dtype=torch.float32)


def padded(channels: int) -> int:
    """Channels rounded up to whole lane blocks."""
    return -(-channels // WIDTH) * WIDTH


def values(tensor: Tensor) -> Any:
    """The numbers of a tensor, row by row, as a flat numpy array; without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).numpy()


def storage(tensor: Tensor) -> Any:
    """All memory behind a tensor as a flat numpy array, from its beginning: read it with `view`, and only so."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((length,), (1,), 0).numpy()


def view(tensor: Tensor) -> tuple[int, ...]:
    """Offset and strides that address a three-dimensional tensor in its `storage`."""
    return tuple(int(number) for number in (tensor.storage_offset(), *tensor.stride()))


def lanes_last(tensor: Tensor, width: int) -> Tensor:
    """Contiguous copy whose last dimension is zero-padded to `width`."""
    result = zeros(*tensor.shape[:-1], width)
    result[..., : tensor.shape[-1]] = tensor.detach()
    return result


def channel_groups(batch: int, blocks: int) -> int:
    """Groups of lane blocks per sequence: enough tasks for many cores, at least eight blocks each.

    No function of the thread count, so that sums over groups do not depend on it.
    """
    return max(1, min(blocks // 8, -(-32 // batch)))


def chunk_table(sequence_BL: Tensor | None, batch: int, length: int) -> tuple[Any, int]:
    """(TABLE, C): chunks of at most 16 tokens, none of which holds tokens of two sequences.

    A new sequence begins wherever sequence_BL changes. Rows with fewer chunks than others end in chunks of no token.
    """
    if sequence_BL is None:
        rows = [_chunks((0, length))] * batch
    else:
        rows = [_chunks((0, *row.nonzero().flatten().tolist(), length)) for row in begins(sequence_BL).cpu()]
    count = max(map(len, rows))
    table = np.empty((batch, count, 3), np.int64)
    for b, row in enumerate(rows):
        table[b, : len(row)], table[b, len(row) :] = row, (length, 0, length)
    return table.ravel(), count


@lru_cache(maxsize=64)
def _chunks(bounds: tuple[int, ...]) -> Any:
    """(first token, tokens, first token of the sequence) of each chunk, for sequences between bounds."""
    spans = [(t, min(ROWS, end - t), first) for first, end in pairwise(bounds) for t in range(first, end, ROWS)]
    return np.array(spans, np.int64)
