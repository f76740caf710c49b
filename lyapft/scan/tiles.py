"""Tiles of a compiled kernel: up to 16 tokens × 16 channels, lane block by lane block in scratch memory."""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

from lyapft.compiled import helper
from lyapft.scan import simd
from lyapft.scan.simd import WIDTH

ROWS = 16  # tokens of a tile


@helper
def at(view, b, t, d):
    """Index of one element, given offset and strides (batch, token, channel)."""
    return view[0] + b * view[1] + t * view[2] + d * view[3]


@helper
def load_tile(target, to, source, base, token_stride, channel_stride, count, valid):
    """target[to + 16 j + w] = source[base + j·token_stride + w·channel_stride] for j < count; 0 for valid <= w < 16."""
    if channel_stride == 1 and valid == WIDTH:
        for j in range(count):
            simd.store(target, to + j * WIDTH, simd.load(source, base + j * token_stride))
        return
    if token_stride == 1 and valid == WIDTH and count == WIDTH:
        simd.copy_transposed(target, to, WIDTH, source, base, channel_stride)
        return
    for w in range(WIDTH):
        for j in range(count):
            target[to + j * WIDTH + w] = source[base + j * token_stride + w * channel_stride] if w < valid else 0.0


@helper
def store_tile(source, of, target, base, token_stride, channel_stride, count, valid):
    """target[base + j·token_stride + w·channel_stride] = source[of + 16 j + w] for j < count, w < valid."""
    if channel_stride == 1 and valid == WIDTH:
        for j in range(count):
            simd.store(target, base + j * token_stride, simd.load(source, of + j * WIDTH))
        return
    if token_stride == 1 and valid == WIDTH and count == WIDTH:
        simd.copy_transposed(target, base, channel_stride, source, of, WIDTH)
        return
    for w in range(valid):
        for j in range(count):
            target[base + j * token_stride + w * channel_stride] = source[of + j * WIDTH + w]
