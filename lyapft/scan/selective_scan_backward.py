"""Selective scan (Mamba-1) on a CPU, compiled by numba: the backward pass. Letters as in `selective_scan_forward`.

Chunks are taken from the last to the first. In each, the states are recomputed from the one that the forward pass
kept, with their decays; then gradients run from the last token to the first. Sums over channels go block by block,
then lane by lane, in an order that neither threads nor timing change.
"""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

import numpy as np
from numba import types

from lyapft.compiled import inlined, jit
from lyapft.scan import simd
from lyapft.scan.layout import FLAT, TABLE, VIEW, padded
from lyapft.scan.selective_scan_forward import FLAGS, SIZES, TILE, advance, group_bounds, keep_state, logistic
from lyapft.scan.simd import LN2, LOG2E, WIDTH
from lyapft.scan.tiles import ROWS, load_tile, store_tile
from lyapft.scan.tiles import at as at_view

SIGNATURE = types.void(
    *[types.int64] * 3, FLAT, SIZES, FLAGS, TABLE, *[FLAT, VIEW] * 4, *[FLAT] * 8, FLAT, VIEW, *[FLAT] * 7
)
# Places in scratch: x, Δ, Δx, dy, sums over n of dh·B and of dh·h·A; z and y before the gate; then for each of two
# states those before every token, and the two parts of the decays; then 16 sums over channels a state for dB and dC.
_X, _V, _U, _G, _S, _R, _Z, _P, _H = (i * TILE for i in range(9))
_SCALE = TILE + WIDTH  # from the states before every token to their decays' powers of two
_REST = _SCALE + TILE
_PAIR = _REST + TILE  # from one state of the two to the other
_SB = _H + 2 * _PAIR


def scratch_size(channels: int, states: int) -> int:
    """float32 numbers of scratch memory that one worker needs."""
    return _SB + 2 * states * TILE + 2 * states * padded(channels)


@inlined
def _ungate(scratch, count):
    """From z, dy and y before the gate: dz in place of z, and dy before the gate."""
    one = simd.splat(np.float32(1.0))
    for at in range(0, count * WIDTH, WIDTH):
        z, g = simd.load(scratch, _Z + at), simd.load(scratch, _G + at)
        sigma = logistic(z)
        silu = simd.mul(z, sigma)
        slope = simd.fma(silu, simd.sub(one, sigma), sigma)
        simd.store(scratch, _Z + at, simd.mul(simd.mul(g, simd.load(scratch, _P + at)), slope))
        simd.store(scratch, _G + at, simd.mul(g, silu))


@inlined
def _recompute(scratch, count, row, N, a, a2, start_BCND, start_at, width, b_BLN):
    """The states of a pair before every token of the tile, and their decays."""
    h, h2 = simd.load(start_BCND, start_at), simd.load(start_BCND, start_at + width)
    zero = simd.splat(np.float32(0.0))
    base, change, base2, change2 = h, zero, h2, zero
    for j in range(count):
        at, t = j * WIDTH, row + j * N
        v, u = simd.load(scratch, _V + at), simd.load(scratch, _U + at)
        simd.store(scratch, _H + at, h)
        simd.store(scratch, _H + _PAIR + at, h2)
        increment = simd.mul(u, simd.broadcast(b_BLN, t))
        base, change, h, scale, rest = advance(simd.mul(v, a), base, change, h, increment)
        simd.store(scratch, _H + _SCALE + at, scale)
        simd.store(scratch, _H + _REST + at, rest)
        increment = simd.mul(u, simd.broadcast(b_BLN, t + 1))
        base2, change2, h2, scale, rest = advance(simd.mul(v, a2), base2, change2, h2, increment)
        simd.store(scratch, _H + _PAIR + _SCALE + at, scale)
        simd.store(scratch, _H + _PAIR + _REST + at, rest)
    simd.store(scratch, _H + count * WIDTH, h)
    simd.store(scratch, _H + _PAIR + count * WIDTH, h2)


@inlined
def _retreat(scratch, at, pair, sums, sums_c, g, u, c, base, change, after):
    """One state and its gradient, from after a token to before it.

    Returns base and change of the gradient, the gradient at the token, that of the exponent ΔA, and the state before.
    """
    change = simd.fma(g, c, change)
    gh = simd.add(base, change)
    simd.store(scratch, sums_c, simd.fma(g, after, simd.load(scratch, sums_c)))
    simd.store(scratch, sums, simd.fma(gh, u, simd.load(scratch, sums)))
    scale, rest = simd.load(scratch, pair + _SCALE + at), simd.load(scratch, pair + _REST + at)
    base = simd.mul(scale, base)
    change = simd.fma(scale, change, simd.mul(rest, gh))
    before = simd.load(scratch, pair + at)
    return base, change, gh, simd.mul(simd.add(base, change), before), before


@inlined
def _two_gradients(scratch, lost, count, g_at, width, row, N, sums, sums_c, a, a2, b_BLN, c_BLN, ga_BND, ga_at):
    """Gradients of two states through a tile: adds their parts of all sums, leaves the gradients where they were."""
    g_at2 = g_at + width
    base, change = simd.load(scratch, g_at), simd.load(scratch, g_at + lost)
    base2, change2 = simd.load(scratch, g_at2), simd.load(scratch, g_at2 + lost)
    after, after2 = simd.load(scratch, _H + count * WIDTH), simd.load(scratch, _H + _PAIR + count * WIDTH)
    ga = ga2 = simd.splat(np.float32(0.0))
    for j in range(count - 1, -1, -1):
        at, t = j * WIDTH, row + j * N
        g, u, v = simd.load(scratch, _G + at), simd.load(scratch, _U + at), simd.load(scratch, _V + at)
        s, r = simd.load(scratch, _S + at), simd.load(scratch, _R + at)
        base, change, gh, gx, after = _retreat(
            scratch, at, _H, sums + at, sums_c + at, g, u, simd.broadcast(c_BLN, t), base, change, after
        )
        s, r = simd.fma(gh, simd.broadcast(b_BLN, t), s), simd.fma(gx, a, r)
        ga = simd.fma(gx, v, ga)
        base2, change2, gh, gx, after2 = _retreat(
            scratch, at, _H + _PAIR, sums + TILE + at, sums_c + TILE + at, g, u, simd.broadcast(c_BLN, t + 1),
            base2, change2, after2,
        )  # fmt: skip
        simd.store(scratch, _S + at, simd.fma(gh, simd.broadcast(b_BLN, t + 1), s))
        simd.store(scratch, _R + at, simd.fma(gx, a2, r))
        ga2 = simd.fma(gx, v, ga2)
    keep_state(scratch, g_at, g_at + lost, base, change)
    keep_state(scratch, g_at2, g_at2 + lost, base2, change2)
    simd.store(ga_BND, ga_at, simd.add(simd.load(ga_BND, ga_at), ga))
    simd.store(ga_BND, ga_at + width, simd.add(simd.load(ga_BND, ga_at + width), ga2))


@inlined
def _finish(scratch, count, softplus, skip, d, at_BD, gbias_BD, gskip_BD):
    """dx in place of the sum of dh·B, and ddt in that of dh·h·A; adds to dbias and dskip."""
    one, log2e, ln2 = simd.splat(np.float32(1.0)), simd.splat(np.float32(-LOG2E)), simd.splat(np.float32(LN2))
    gskip, gbias = simd.load(gskip_BD, at_BD), simd.load(gbias_BD, at_BD)
    for at in range(0, count * WIDTH, WIDTH):
        s, v, x = simd.load(scratch, _S + at), simd.load(scratch, _V + at), simd.load(scratch, _X + at)
        g = simd.load(scratch, _G + at)
        gskip = simd.fma(g, x, gskip)
        gdelta = simd.fma(s, x, simd.mul(simd.load(scratch, _R + at), ln2))
        if softplus:  # d softplus(v)/dv = 1 - exp(-Δ)
            scale, rest = simd.decay(simd.mul(v, log2e))
            gdelta = simd.mul(gdelta, simd.sub(simd.sub(one, scale), rest))
        gbias = simd.add(gbias, gdelta)
        simd.store(scratch, _R + at, gdelta)
        simd.store(scratch, _S + at, simd.fma(s, v, simd.mul(skip, g)))
    simd.store(gskip_BD, at_BD, gskip)
    simd.store(gbias_BD, at_BD, gbias)


@inlined
def _store_sums(scratch, of, target, at, count):
    """target[at + j] = sum over the lanes of row j."""
    sums = simd.totals(scratch, of)
    if count == ROWS:
        simd.store(target, at, sums)
    else:
        simd.store(scratch, of, sums)
        for j in range(count):
            target[at + j] = scratch[of + j]


def make_backward():
    """The backward kernel; task = (sequence, group of channels)."""
    digest = simd.DIGEST

    @jit
    def backward(
        first, last, groups, scratch, sizes, flags, chunks, x, x_at, z, z_at, gy, gy_at, dt, dt_at,
        a2_ND, skip_D, b_BLN, c_BLN, delta_BLD, inner_BLD, starts_BCND, gfinal_BND, gdt, gdt_at,
        gx_BLD, gz_BLD, ga_BND, gbias_BD, gskip_BD, gb_GBNL, gc_GBNL,
    ):  # fmt: skip
        digest  # noqa: B018
        B, L, D, N, C = sizes
        softplus, gated, _ = flags
        width = -(-D // WIDTH) * WIDTH
        SC = _SB + N * TILE
        GH = SC + N * TILE
        lost = N * width  # from a gradient to what rounding dropped of it
        zero = simd.splat(np.float32(0.0))
        for task in range(first, last):
            b, group = task // groups, task % groups
            d0, d1 = group_bounds(group, groups, D)
            for n in range(N):
                for d in range(d0, d1, WIDTH):
                    simd.store(scratch, GH + n * width + d, simd.load(gfinal_BND, (b * N + n) * width + d))
                    simd.store(scratch, GH + lost + n * width + d, zero)
            for c in range(C - 1, -1, -1):
                t0, count, origin = chunks[(b * C + c) * 3], chunks[(b * C + c) * 3 + 1], chunks[(b * C + c) * 3 + 2]
                if count == 0:
                    continue
                for at in range(_SB, GH, WIDTH):
                    simd.store(scratch, at, zero)
                for d in range(d0, d1, WIDTH):
                    valid, row = min(WIDTH, D - d), (b * L + t0) * D + d
                    load_tile(scratch, _X, x, at_view(x_at, b, t0, d), x_at[2], x_at[3], count, valid)
                    load_tile(scratch, _G, gy, at_view(gy_at, b, t0, d), gy_at[2], gy_at[3], count, valid)
                    if softplus:
                        load_tile(scratch, _V, delta_BLD, row, D, 1, count, valid)
                    else:
                        load_tile(scratch, _V, dt, at_view(dt_at, b, t0, d), dt_at[2], dt_at[3], count, valid)
                    if gated:
                        load_tile(scratch, _Z, z, at_view(z_at, b, t0, d), z_at[2], z_at[3], count, valid)
                        load_tile(scratch, _P, inner_BLD, row, D, 1, count, valid)
                        _ungate(scratch, count)
                        store_tile(scratch, _Z, gz_BLD, row, D, 1, count, valid)
                    for at in range(0, count * WIDTH, WIDTH):
                        u = simd.mul(simd.load(scratch, _V + at), simd.load(scratch, _X + at))
                        simd.store(scratch, _U + at, u)
                        simd.store(scratch, _S + at, zero)
                        simd.store(scratch, _R + at, zero)
                    for n in range(0, N, 2):
                        at, first_row = n * width + d, (b * L + t0) * N + n
                        a, a2 = simd.load(a2_ND, at), simd.load(a2_ND, at + width)
                        start = ((b * C + c) * N + n) * width + d
                        _recompute(scratch, count, first_row, N, a, a2, starts_BCND, start, width, b_BLN)
                        _two_gradients(
                            scratch, lost, count, GH + at, width, first_row, N, _SB + n * TILE, SC + n * TILE,
                            a, a2, b_BLN, c_BLN, ga_BND, b * lost + at,
                        )  # fmt: skip
                    _finish(scratch, count, softplus, simd.load(skip_D, d), d, b * width + d, gbias_BD, gskip_BD)
                    store_tile(scratch, _S, gx_BLD, row, D, 1, count, valid)
                    store_tile(scratch, _R, gdt, at_view(gdt_at, b, t0, d), gdt_at[2], gdt_at[3], count, valid)
                    if t0 == origin and t0 > 0:
                        for at in range(GH + d, GH + 2 * lost + d, width):
                            simd.store(scratch, at, zero)
                for n in range(N):
                    at = ((group * B + b) * N + n) * L + t0
                    _store_sums(scratch, _SB + n * TILE, gb_GBNL, at, count)
                    _store_sums(scratch, SC + n * TILE, gc_GBNL, at, count)
            for n in range(N):
                for d in range(d0, d1, WIDTH):
                    simd.store(gfinal_BND, (b * N + n) * width + d, simd.load(scratch, GH + n * width + d))

    return backward
