"""Selective scan (Mamba-1) on a CPU, compiled by numba: the forward pass, and what both passes share.

Letters: B batch, L tokens, D channels, N states per channel, an even number; T tokens per chunk, 16 channels per lane
block.

    Δ = softplus(dt + bias);  h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t;  y_t = (C_t·h_t + skip x_t) · silu(z_t)

The forward pass keeps Δ and the state at the first token of each chunk; the backward pass recomputes the states
inside a chunk (Gu & Dao 2024, §3.3.2). In a chunk the loop over states is outside and the one over tokens inside, so
that the state, its gradient and the gradient of A stay in registers; two states at a time share what they read, and
one computes while the other waits. A chunk never spans two sequences: one that begins a sequence inside a row starts
from zero.

So that float32 states keep five digits over 65,536 tokens at every step size: a decay is a power of two, a product
with which is exact, and a remainder, which keeps its digits where the decay is close to 1 (`simd.decay`); a state is
its value at the start of the chunk (`base`) plus what happened since (`change`), so that small changes add up before
they meet a large state; what rounding drops between chunks is carried on.
"""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

import numpy as np
from numba import types

from lyapft.compiled import inlined, jit
from lyapft.scan import simd
from lyapft.scan.layout import FLAT, TABLE, VIEW, padded
from lyapft.scan.simd import LOG2E, WIDTH
from lyapft.scan.tiles import ROWS, load_tile, store_tile
from lyapft.scan.tiles import at as at_view

TILE = ROWS * WIDTH
SIZES = types.UniTuple(types.int64, 5)  # B, L, D, N, C chunks
FLAGS = types.UniTuple(types.boolean, 3)  # softplus, gate, keep what backward needs
SIGNATURE = types.void(*[types.int64] * 3, FLAT, SIZES, FLAGS, TABLE, *[FLAT, VIEW] * 3, *[FLAT] * 11)
_X, _V, _U, _Y, _H = (i * TILE for i in range(5))  # places in scratch: x, Δ, Δx, y, states


def scratch_size(channels: int, states: int) -> int:
    """float32 numbers of scratch memory that one worker needs."""
    return 4 * TILE + 2 * states * padded(channels)


@inlined
def group_bounds(group, groups, channels):
    """First and last channel, in whole lane blocks, of a group."""
    blocks = -(-channels // WIDTH)
    return group * blocks // groups * WIDTH, (group + 1) * blocks // groups * WIDTH


@inlined
def advance(x, base, change, h, increment):
    """base, change and h = base + change after h <- 2^x h + increment; and the two parts of 2^x."""
    scale, rest = simd.decay(x)
    base = simd.mul(scale, base)
    change = simd.fma(scale, change, simd.fma(rest, h, increment))
    return base, change, simd.add(base, change), scale, rest


@inlined
def keep_state(scratch, value_at, lost_at, base, change):
    """Stores base + change, and beside it what rounding drops from the sum."""
    h = simd.add(base, change)
    simd.store(scratch, value_at, simd.flush_tiny(h))
    simd.store(scratch, lost_at, simd.flush_tiny(simd.sub(change, simd.sub(h, base))))


@inlined
def logistic(v):
    """1 / (1 + exp(-v))."""
    one = simd.splat(np.float32(1.0))
    return simd.div(one, simd.add(one, simd.exp2(simd.mul(v, simd.splat(np.float32(-LOG2E))))))


@inlined
def _softplus(v):
    """log(1 + exp(v))."""
    small = simd.exp2(simd.mul(simd.magnitude(v), simd.splat(np.float32(-LOG2E))))
    return simd.add(simd.positive_part(v), simd.log1p_unit(small))


@inlined
def _prepare(scratch, count, softplus, bias, skip):
    """Δ, Δx and skip·x of a tile of dt and x."""
    for at in range(0, count * WIDTH, WIDTH):
        v, x = simd.load(scratch, _V + at), simd.load(scratch, _X + at)
        if softplus:
            v = _softplus(simd.add(v, bias))
            simd.store(scratch, _V + at, v)
        simd.store(scratch, _U + at, simd.mul(v, x))
        simd.store(scratch, _Y + at, simd.mul(skip, x))


@inlined
def _two_states(scratch, lost, count, h_at, width, row, N, a2_ND, a2_at, b_BLN, c_BLN):
    """Two states through a tile: adds their part of y, leaves the states where they were."""
    h_at2, a, a_next = h_at + width, simd.load(a2_ND, a2_at), simd.load(a2_ND, a2_at + width)
    base, change = simd.load(scratch, h_at), simd.load(scratch, h_at + lost)
    base2, change2 = simd.load(scratch, h_at2), simd.load(scratch, h_at2 + lost)
    h, h2 = simd.add(base, change), simd.add(base2, change2)
    for j in range(count):
        at, t = j * WIDTH, row + j * N
        v, u, y = simd.load(scratch, _V + at), simd.load(scratch, _U + at), simd.load(scratch, _Y + at)
        increment = simd.mul(u, simd.broadcast(b_BLN, t))
        base, change, h, _, _ = advance(simd.mul(v, a), base, change, h, increment)
        increment = simd.mul(u, simd.broadcast(b_BLN, t + 1))
        base2, change2, h2, _, _ = advance(simd.mul(v, a_next), base2, change2, h2, increment)
        y = simd.fma(h, simd.broadcast(c_BLN, t), y)
        simd.store(scratch, _Y + at, simd.fma(h2, simd.broadcast(c_BLN, t + 1), y))
    keep_state(scratch, h_at, h_at + lost, base, change)
    keep_state(scratch, h_at2, h_at2 + lost, base2, change2)


def make_forward():
    """The forward kernel; `digest` ties its cache entry to the vector code. Task = (sequence, group of channels)."""
    digest = simd.DIGEST

    @jit
    def forward(
        first, last, groups, scratch, sizes, flags, chunks, x, x_at, dt, dt_at, z, z_at,
        bias_D, a2_ND, skip_D, initial_BND, b_BLN, c_BLN, y_BLD, delta_BLD, inner_BLD, starts_BCND, final_BND,
    ):  # fmt: skip
        digest  # noqa: B018
        _, L, D, N, C = sizes
        softplus, gated, keep = flags
        width = -(-D // WIDTH) * WIDTH
        lost = N * width  # from a state to what rounding dropped of it
        zero = simd.splat(np.float32(0.0))
        for task in range(first, last):
            b, group = task // groups, task % groups
            d0, d1 = group_bounds(group, groups, D)
            for n in range(N):
                for d in range(d0, d1, WIDTH):
                    simd.store(scratch, _H + n * width + d, simd.load(initial_BND, (b * N + n) * width + d))
                    simd.store(scratch, _H + lost + n * width + d, zero)
            for c in range(C):
                t0, count, origin = chunks[(b * C + c) * 3], chunks[(b * C + c) * 3 + 1], chunks[(b * C + c) * 3 + 2]
                if count == 0:
                    continue
                for d in range(d0, d1, WIDTH):
                    valid, row = min(WIDTH, D - d), (b * L + t0) * D + d
                    if t0 == origin and t0 > 0:
                        for at in range(_H + d, _H + 2 * lost + d, width):
                            simd.store(scratch, at, zero)
                    load_tile(scratch, _X, x, at_view(x_at, b, t0, d), x_at[2], x_at[3], count, valid)
                    load_tile(scratch, _V, dt, at_view(dt_at, b, t0, d), dt_at[2], dt_at[3], count, valid)
                    _prepare(scratch, count, softplus, simd.load(bias_D, d), simd.load(skip_D, d))
                    if softplus:
                        store_tile(scratch, _V, delta_BLD, row, D, 1, count, valid)
                    for n in range(0, N, 2):
                        at = _H + n * width + d
                        if keep:
                            start = ((b * C + c) * N + n) * width + d
                            for i in range(0, 2 * width, width):
                                h = simd.add(simd.load(scratch, at + i), simd.load(scratch, at + lost + i))
                                simd.store(starts_BCND, start + i, h)
                        first_row = (b * L + t0) * N + n
                        _two_states(scratch, lost, count, at, width, first_row, N, a2_ND, n * width + d, b_BLN, c_BLN)
                    if gated:
                        if keep:
                            store_tile(scratch, _Y, inner_BLD, row, D, 1, count, valid)
                        load_tile(scratch, _X, z, at_view(z_at, b, t0, d), z_at[2], z_at[3], count, valid)
                        for at in range(0, count * WIDTH, WIDTH):
                            gate = simd.load(scratch, _X + at)
                            gate = simd.mul(gate, logistic(gate))
                            simd.store(scratch, _Y + at, simd.mul(simd.load(scratch, _Y + at), gate))
                    store_tile(scratch, _Y, y_BLD, row, D, 1, count, valid)
            for n in range(N):
                for d in range(d0, d1, WIDTH):
                    simd.store(final_BND, (b * N + n) * width + d, simd.load(scratch, _H + n * width + d))

    return forward
