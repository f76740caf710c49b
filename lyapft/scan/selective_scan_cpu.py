"""Selective scan (Mamba-1) on a CPU, forward and backward, compiled by numba.

Letters: B batch, L tokens, D channels, N states per channel; T tokens per chunk, 16 channels per lane block.

    Δ = softplus(dt + bias);  h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t;  y_t = (C_t·h_t + skip x_t) · silu(z_t)

The forward pass keeps Δ and the state at the first token of each chunk; the backward pass recomputes the states
inside a chunk (Gu & Dao 2024, §3.3.2). In a chunk the loop over states is outside and the one over tokens inside, so
that the state, its gradient and the gradient of A stay in registers. Sums over channels go block by block, then lane
by lane, in an order that neither threads nor timing change.

So that float32 states keep five digits over 65,536 tokens at every step size: decays close to 1 are kept as their
distance from 1 (`simd.decay`); a state is its value at the start of the chunk (`base`) plus what happened since
(`change`), so that small changes add up before they meet a large state; what rounding drops between chunks is carried
on.
"""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

import numpy as np
from numba import types

from lyapft.scan import simd
from lyapft.scan.compiled import jit
from lyapft.scan.layout import FLAT, VIEW, padded
from lyapft.scan.simd import LN2, LOG2E, WIDTH
from lyapft.scan.tiles import ROWS, load_tile, store_tile
from lyapft.scan.tiles import at as at_view

CHUNK = ROWS
_TILE = CHUNK * WIDTH
_SIZES = types.UniTuple(types.int64, 4)  # B, L, D, N
_FLAGS = types.UniTuple(types.boolean, 3)  # softplus, gate, keep what backward needs
FORWARD_SIGNATURE = types.void(*[types.int64] * 3, FLAT, _SIZES, _FLAGS, *[FLAT, VIEW] * 3, *[FLAT] * 11)
BACKWARD_SIGNATURE = types.void(
    *[types.int64] * 3, FLAT, _SIZES, _FLAGS, *[FLAT, VIEW] * 4, *[FLAT] * 8, FLAT, VIEW, *[FLAT] * 7
)


def forward_scratch(channels: int, states: int) -> int:
    """float32 numbers of scratch memory that one worker of the forward pass needs."""
    return 4 * _TILE + 2 * states * padded(channels)


def backward_scratch(channels: int, states: int) -> int:
    """float32 numbers of scratch memory that one worker of the backward pass needs."""
    return 9 * _TILE + (CHUNK + 1) * WIDTH + 2 * states * _TILE + 2 * states * padded(channels)


def make_forward(digest: int):
    """The forward kernel; `digest` ties its cache entry to the vector code."""

    @jit
    def forward(
        first, last, groups, scratch, sizes, flags, x, x_at, dt, dt_at, z, z_at,
        bias_D, a2_ND, skip_D, initial_BND, b_BLN, c_BLN, y_BLD, delta_BLD, inner_BLD, starts_BCND, final_BND,
    ):  # fmt: skip
        digest  # noqa: B018
        _, L, D, N = sizes
        softplus, gated, keep = flags
        width = -(-D // WIDTH) * WIDTH
        blocks, chunks = width // WIDTH, -(-L // CHUNK)
        X, V, U, Y, H = 0, _TILE, 2 * _TILE, 3 * _TILE, 4 * _TILE
        R = H + N * width
        zero, one, log2e = simd.splat(np.float32(0.0)), simd.splat(np.float32(1.0)), simd.splat(np.float32(-LOG2E))
        for task in range(first, last):
            b, group = task // groups, task % groups
            d0, d1 = group * blocks // groups * WIDTH, (group + 1) * blocks // groups * WIDTH
            for n in range(N):
                for d in range(d0, d1, WIDTH):
                    simd.store(scratch, H + n * width + d, simd.load(initial_BND, (b * N + n) * width + d))
                    simd.store(scratch, R + n * width + d, zero)
            for c in range(chunks):
                t0 = c * CHUNK
                count = min(CHUNK, L - t0)
                for d in range(d0, d1, WIDTH):
                    valid = min(WIDTH, D - d)
                    bias, skip = simd.load(bias_D, d), simd.load(skip_D, d)
                    row = (b * L + t0) * D + d
                    load_tile(scratch, X, x, at_view(x_at, b, t0, d), x_at[2], x_at[3], count, valid)
                    load_tile(scratch, V, dt, at_view(dt_at, b, t0, d), dt_at[2], dt_at[3], count, valid)
                    for j in range(count):
                        at = j * WIDTH
                        v, xv = simd.load(scratch, V + at), simd.load(scratch, X + at)
                        if softplus:
                            v = simd.add(v, bias)
                            small = simd.exp2(simd.mul(simd.magnitude(v), log2e))
                            v = simd.add(simd.positive_part(v), simd.log1p_unit(small))
                            simd.store(scratch, V + at, v)
                        simd.store(scratch, U + at, simd.mul(v, xv))
                        simd.store(scratch, Y + at, simd.mul(skip, xv))
                    if softplus:
                        store_tile(scratch, V, delta_BLD, row, D, 1, count, valid)
                    for n in range(N):
                        a2 = simd.load(a2_ND, n * width + d)
                        base, change = simd.load(scratch, H + n * width + d), simd.load(scratch, R + n * width + d)
                        h = simd.add(base, change)
                        if keep:
                            simd.store(starts_BCND, ((b * chunks + c) * N + n) * width + d, h)
                        first_row = (b * L + t0) * N + n
                        for j in range(count):
                            at, t = j * WIDTH, first_row + j * N
                            e = simd.decay(simd.mul(simd.load(scratch, V + at), a2))
                            increment = simd.mul(simd.load(scratch, U + at), simd.splat(b_BLN[t]))
                            base = simd.where_close(e, base, zero)
                            change = simd.add(simd.where_close(e, change, zero), simd.fma(e, h, increment))
                            h = simd.add(base, change)
                            simd.store(scratch, Y + at, simd.fma(h, simd.splat(c_BLN[t]), simd.load(scratch, Y + at)))
                        simd.store(scratch, H + n * width + d, simd.flush_tiny(h))
                        simd.store(scratch, R + n * width + d, simd.flush_tiny(simd.sub(change, simd.sub(h, base))))
                    if gated:
                        if keep:
                            store_tile(scratch, Y, inner_BLD, row, D, 1, count, valid)
                        load_tile(scratch, X, z, at_view(z_at, b, t0, d), z_at[2], z_at[3], count, valid)
                        for j in range(count):
                            at = j * WIDTH
                            zv = simd.load(scratch, X + at)
                            silu = simd.div(zv, simd.add(one, simd.exp2(simd.mul(zv, log2e))))
                            simd.store(scratch, Y + at, simd.mul(simd.load(scratch, Y + at), silu))
                    store_tile(scratch, Y, y_BLD, row, D, 1, count, valid)
            for n in range(N):
                for d in range(d0, d1, WIDTH):
                    simd.store(final_BND, (b * N + n) * width + d, simd.load(scratch, H + n * width + d))

    return forward


def make_backward(digest: int):
    """The backward kernel; task = (sequence, group of lane blocks)."""

    @jit
    def backward(
        first, last, groups, scratch, sizes, flags, x, x_at, z, z_at, gy, gy_at, dt, dt_at,
        a2_ND, skip_D, b_BLN, c_BLN, delta_BLD, inner_BLD, starts_BCND, gfinal_BND, gdt, gdt_at,
        gx_BLD, gz_BLD, ga_BND, gbias_BD, gskip_BD, gb_GBLN, gc_GBLN,
    ):  # fmt: skip
        digest  # noqa: B018
        B, L, D, N = sizes
        softplus, gated, _ = flags
        width = -(-D // WIDTH) * WIDTH
        blocks, chunks = width // WIDTH, -(-L // CHUNK)
        X, V, U, G, S, R, E, Z, P = (
            0,
            _TILE,
            2 * _TILE,
            3 * _TILE,
            4 * _TILE,
            5 * _TILE,
            6 * _TILE,
            7 * _TILE,
            8 * _TILE,
        )
        H = 9 * _TILE
        SB = H + (CHUNK + 1) * WIDTH
        SC = SB + N * _TILE
        GH = SC + N * _TILE
        GR = GH + N * width
        zero, one = simd.splat(np.float32(0.0)), simd.splat(np.float32(1.0))
        log2e, ln2 = simd.splat(np.float32(-LOG2E)), simd.splat(np.float32(LN2))
        for task in range(first, last):
            b, group = task // groups, task % groups
            k0, k1 = group * blocks // groups, (group + 1) * blocks // groups
            for n in range(N):
                for d in range(k0 * WIDTH, k1 * WIDTH, WIDTH):
                    simd.store(scratch, GH + n * width + d, simd.load(gfinal_BND, (b * N + n) * width + d))
                    simd.store(scratch, GR + n * width + d, zero)
            for c in range(chunks - 1, -1, -1):
                t0 = c * CHUNK
                count = min(CHUNK, L - t0)
                for i in range(0, 2 * N * _TILE, WIDTH):
                    simd.store(scratch, SB + i, zero)
                for d in range(k0 * WIDTH, k1 * WIDTH, WIDTH):
                    valid = min(WIDTH, D - d)
                    row = (b * L + t0) * D + d
                    load_tile(scratch, X, x, at_view(x_at, b, t0, d), x_at[2], x_at[3], count, valid)
                    load_tile(scratch, G, gy, at_view(gy_at, b, t0, d), gy_at[2], gy_at[3], count, valid)
                    if softplus:
                        load_tile(scratch, V, delta_BLD, row, D, 1, count, valid)
                    else:
                        load_tile(scratch, V, dt, at_view(dt_at, b, t0, d), dt_at[2], dt_at[3], count, valid)
                    if gated:
                        load_tile(scratch, Z, z, at_view(z_at, b, t0, d), z_at[2], z_at[3], count, valid)
                        load_tile(scratch, P, inner_BLD, row, D, 1, count, valid)
                        for j in range(count):
                            at = j * WIDTH
                            zv, gv = simd.load(scratch, Z + at), simd.load(scratch, G + at)
                            sigma = simd.div(one, simd.add(one, simd.exp2(simd.mul(zv, log2e))))
                            silu = simd.mul(zv, sigma)
                            slope = simd.fma(silu, simd.sub(one, sigma), sigma)
                            simd.store(scratch, Z + at, simd.mul(simd.mul(gv, simd.load(scratch, P + at)), slope))
                            simd.store(scratch, G + at, simd.mul(gv, silu))
                        store_tile(scratch, Z, gz_BLD, row, D, 1, count, valid)
                    for j in range(count):
                        at = j * WIDTH
                        simd.store(scratch, U + at, simd.mul(simd.load(scratch, V + at), simd.load(scratch, X + at)))
                        simd.store(scratch, S + at, zero)
                        simd.store(scratch, R + at, zero)
                    for n in range(N):
                        a2 = simd.load(a2_ND, n * width + d)
                        h = simd.load(starts_BCND, ((b * chunks + c) * N + n) * width + d)
                        base, change = h, zero
                        simd.store(scratch, H, h)
                        first_row = (b * L + t0) * N + n
                        for j in range(count):
                            at = j * WIDTH
                            e = simd.decay(simd.mul(simd.load(scratch, V + at), a2))
                            simd.store(scratch, E + at, e)
                            db = simd.mul(simd.load(scratch, U + at), simd.splat(b_BLN[first_row + j * N]))
                            base = simd.where_close(e, base, zero)
                            change = simd.add(simd.where_close(e, change, zero), simd.fma(e, h, db))
                            h = simd.add(base, change)
                            simd.store(scratch, H + at + WIDTH, h)
                        base, change = simd.load(scratch, GH + n * width + d), simd.load(scratch, GR + n * width + d)
                        gh, ga = simd.add(base, change), zero
                        for j in range(count - 1, -1, -1):
                            at, sb, sc = j * WIDTH, SB + n * _TILE + j * WIDTH, SC + n * _TILE + j * WIDTH
                            gv = simd.load(scratch, G + at)
                            change = simd.fma(gv, simd.splat(c_BLN[first_row + j * N]), change)
                            gh = simd.add(base, change)
                            simd.store(
                                scratch, sc, simd.fma(gv, simd.load(scratch, H + at + WIDTH), simd.load(scratch, sc))
                            )
                            simd.store(scratch, sb, simd.fma(gh, simd.load(scratch, U + at), simd.load(scratch, sb)))
                            bv = simd.splat(b_BLN[first_row + j * N])
                            simd.store(scratch, S + at, simd.fma(gh, bv, simd.load(scratch, S + at)))
                            e = simd.load(scratch, E + at)
                            base = simd.where_close(e, base, zero)
                            change = simd.fma(e, gh, simd.where_close(e, change, zero))
                            gh = simd.add(base, change)
                            gx_h = simd.mul(gh, simd.load(scratch, H + at))
                            simd.store(scratch, R + at, simd.fma(gx_h, a2, simd.load(scratch, R + at)))
                            ga = simd.fma(gx_h, simd.load(scratch, V + at), ga)
                        simd.store(scratch, GH + n * width + d, simd.flush_tiny(gh))
                        simd.store(scratch, GR + n * width + d, simd.flush_tiny(simd.sub(change, simd.sub(gh, base))))
                        at = (b * N + n) * width + d
                        simd.store(ga_BND, at, simd.add(simd.load(ga_BND, at), ga))
                    skip = simd.load(skip_D, d)
                    gskip, gbias = simd.load(gskip_BD, b * width + d), simd.load(gbias_BD, b * width + d)
                    for j in range(count):
                        at = j * WIDTH
                        s, v, xv = simd.load(scratch, S + at), simd.load(scratch, V + at), simd.load(scratch, X + at)
                        gv = simd.load(scratch, G + at)
                        gskip = simd.fma(gv, xv, gskip)
                        gdelta = simd.fma(s, xv, simd.mul(simd.load(scratch, R + at), ln2))
                        if softplus:  # d softplus(v)/dv = 1 - exp(-Δ)
                            e = simd.decay(simd.mul(v, log2e))
                            slope = simd.where_close(e, simd.sub(zero, e), simd.sub(one, e))
                            gdelta = simd.mul(gdelta, slope)
                        gbias = simd.add(gbias, gdelta)
                        simd.store(scratch, R + at, gdelta)
                        simd.store(scratch, S + at, simd.fma(s, v, simd.mul(skip, gv)))
                    simd.store(gskip_BD, b * width + d, gskip)
                    simd.store(gbias_BD, b * width + d, gbias)
                    store_tile(scratch, S, gx_BLD, row, D, 1, count, valid)
                    store_tile(scratch, R, gdt, at_view(gdt_at, b, t0, d), gdt_at[2], gdt_at[3], count, valid)
                for j in range(count):
                    for n in range(N):
                        at = ((group * B + b) * L + t0 + j) * N + n
                        gb_GBLN[at] = simd.total(simd.load(scratch, SB + n * _TILE + j * WIDTH))
                        gc_GBLN[at] = simd.total(simd.load(scratch, SC + n * _TILE + j * WIDTH))
            for n in range(N):
                for d in range(k0 * WIDTH, k1 * WIDTH, WIDTH):
                    simd.store(gfinal_BND, (b * N + n) * width + d, simd.load(scratch, GH + n * width + d))

    return backward
