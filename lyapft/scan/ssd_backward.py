"""State space duality (Mamba-2) on a CPU, compiled by numba: the backward pass, chunk after chunk from the last.

Letters: B batch, L tokens, H heads, P head dim, G groups (K = H/G heads share B and C), N states; T tokens per chunk.

With W the weights (C_i·B_j) exp(s_i - s_j), U = Δx what is written, S the state at the start of a chunk, E the
gradient of the state at its end, and G that of y (rows are tokens, all for one head):

    dU = Wᵀ G + to_end (B E)          dC = (gW) B + to_token (G Sᵀ)
    dS = Cᵀ (to_token G) + through E  dB = (gW)ᵀ C + to_end (U Eᵀ)      gW = (G Uᵀ) exp(s_i - s_j)

The gradient of ΔA of a token gathers all that passed through its decay, as sums without cancellation: see
`ssd._gradient_of_log_decays`.
"""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

import numpy as np
from numba import types

from lyapft.compiled import helper, jit
from lyapft.scan import simd
from lyapft.scan.layout import FLAT, VIEW, padded
from lyapft.scan.products import FULL, LOWER, UPPER, multiply, transpose
from lyapft.scan.simd import LOG2E, WIDTH
from lyapft.scan.ssd_forward import (
    BEFORE,
    CHUNK,
    DELTA,
    FLAGS,
    HEAD,
    HIGH,
    LOW,
    SIZES,
    SQUARE,
    TO_END,
    TO_TOKEN,
    boundary_decays,
    copy,
    decays,
    fill,
    heads_of,
    load_rows,
    log_decays,
    outlast,
    prepare_masks,
    scale_rows,
    store_rows,
    times_lower,
)

SIGNATURE = types.void(
    types.int64, types.int64, types.int64, FLAT, SIZES, FLAGS, *[FLAT, VIEW] * 2, FLAT, FLAT, FLAT, *[FLAT, VIEW] * 2,
    *[FLAT] * 9,
)  # fmt: skip
# Places of sums per token, behind the head that both passes share; the last one is a row of lanes for each token.
_FROM_START, _TO_END, _WITHIN, _DIRECT, _COLUMNS, _LANES = (HEAD + i * CHUNK for i in range(6))
_HEAD = _LANES + CHUNK * WIDTH


def scratch_size(dim: int, states: int, heads: int) -> int:
    """float32 numbers of scratch memory that one worker needs for tasks of so many heads."""
    p, n = padded(dim), padded(states)
    return _HEAD + 5 * SQUARE + CHUNK * (6 * p + 6 * n) + (3 + heads) * n * p


@helper
def _row_products(scratch, to, of, other, step):
    """scratch[to + j] = row j of `of` · row j of `other`."""
    for j in range(CHUNK):
        total = simd.splat(np.float32(0.0))
        for i in range(j * step, (j + 1) * step, WIDTH):
            total = simd.fma(simd.load(scratch, of + i), simd.load(scratch, other + i), total)
        simd.store(scratch, _LANES + j * WIDTH, total)
    _add_lanes(scratch, to)


@helper
def _add_lanes(scratch, to):
    """scratch[to + j] = sum of the lanes of token j."""
    for j in range(0, CHUNK, WIDTH):
        simd.store(scratch, to + j, simd.totals(scratch, _LANES + j * WIDTH))


@helper
def _passed_within(scratch, between):
    """scratch[_WITHIN + t] = sum of between[i, j] over j < t <= i: all that was written before t and read after.

    From the last row up, each column is summed over i >= t; of these sums those of j < t are added.
    """
    fill(scratch, _COLUMNS, CHUNK, 0.0)
    for t in range(CHUNK - 1, -1, -1):
        diagonal = t // WIDTH * WIDTH
        total = simd.splat(np.float32(0.0))
        for j in range(0, diagonal + WIDTH, WIDTH):
            column = simd.add(simd.load(scratch, _COLUMNS + j), simd.load(scratch, between + t * CHUNK + j))
            simd.store(scratch, _COLUMNS + j, column)
            if j < diagonal:
                total = simd.add(total, column)
            else:
                total = simd.fma(column, simd.load(scratch, BEFORE + (t - diagonal) * WIDTH), total)
        simd.store(scratch, _LANES + t * WIDTH, total)
    _add_lanes(scratch, _WITHIN)


@helper
def _inner(scratch, of, target, other, size):
    """Sum of scratch[of + i] · target[other + i]."""
    total = simd.splat(np.float32(0.0))
    for i in range(0, size, WIDTH):
        total = simd.fma(simd.load(scratch, of + i), simd.load(target, other + i), total)
    simd.store(scratch, _LANES, total)
    result = np.float64(0.0)
    for lane in range(WIDTH):
        result += scratch[_LANES + lane]
    return result


@helper
def _gradient_of_steps(scratch, gdelta_BLH, base, H, h, decay, kept, count):
    """Writes the gradient of Δ; returns that of A."""
    gA, written = np.float64(0.0), np.float64(0.0)
    after = np.float64(0.0)
    for j in range(count - 1, -1, -1):
        after += scratch[_FROM_START + j]
        scratch[_FROM_START + j] = np.float32(after)
    for j in range(count):
        passed = np.float64(scratch[_FROM_START + j]) + kept + written + np.float64(scratch[_WITHIN + j])
        written += scratch[_TO_END + j]
        gdelta_BLH[(base + j) * H + h] = np.float32(np.float64(scratch[_DIRECT + j]) + decay * passed)
        gA += passed * scratch[DELTA + j]
    return gA


def make_backward():
    """The backward kernel; task = (sequence, heads of a group)."""
    digest = simd.DIGEST

    @jit
    def backward(
        first, last, parts, scratch, sizes, flags, gy, gy_at, x, x_at, delta_BLH, A_H, skip_H, b, b_at, c, c_at,
        begins_BL, starts_BHCNP, gstate_BHNP, gx_BLHP, gdelta_BLH, gA_BH, gskip_BH, gb_JBLGN, gc_JBLGN,
    ):  # fmt: skip
        digest  # noqa: B018
        batch, L, H, P, G, N = sizes
        packed, _ = flags
        p, n = -(-P // WIDTH) * WIDTH, -(-N // WIDTH) * WIDTH
        square, tall, wide = SQUARE, CHUNK * n, CHUNK * p
        SCORES, DECAYS, WEIGHTS = _HEAD, _HEAD + square, _HEAD + 2 * square
        BETWEEN, GSCORES, B = _HEAD + 3 * square, _HEAD + 4 * square, _HEAD + 5 * square
        C, BT, GB, GC, PART, X = B + tall, B + 2 * tall, B + 3 * tall, B + 4 * tall, B + 5 * tall, B + 6 * tall
        U, GY, R, GU, UT, ST = X + wide, X + 2 * wide, X + 3 * wide, X + 4 * wide, X + 5 * wide, X + 6 * wide
        ET, ADDED, E = ST + n * p, ST + 2 * n * p, ST + 3 * n * p
        chunks = -(-L // CHUNK)
        prepare_masks(scratch)
        fill(scratch, DECAYS, 3 * SQUARE, 0.0)
        for task in range(first, last):
            row, g, h0, h1 = heads_of(task, parts, sizes)
            for h in range(h0, h1):
                copy(scratch, E + (h - h0) * n * p, gstate_BHNP, (row * H + h) * n * p, n * p)
            for chunk in range(chunks - 1, -1, -1):
                t0 = chunk * CHUNK
                count, token = min(CHUNK, L - t0), row * L + t0
                load_rows(scratch, B, n, b, b_at[0] + row * b_at[1] + t0 * b_at[2] + g * b_at[3], b_at[2], count, N)
                load_rows(scratch, C, n, c, c_at[0] + row * c_at[1] + t0 * c_at[2] + g * c_at[3], c_at[2], count, N)
                transpose(scratch, BT, CHUNK, scratch, B, n, CHUNK, n)
                fill(scratch, SCORES, SQUARE, 0.0)
                multiply(scratch, SCORES, CHUNK, CHUNK, CHUNK, C, n, 1, BT, CHUNK, n, FULL, True)
                fill(scratch, GSCORES, SQUARE, 0.0)
                fill(scratch, GB, 2 * CHUNK * n, 0.0)
                for h in range(h0, h1):
                    state, start = E + (h - h0) * n * p, ((row * H + h) * chunks + chunk) * n * p
                    decay = np.float64(A_H[h])
                    log_decays(scratch, delta_BLH, begins_BL, token, H, h, decay * LOG2E, count, packed)
                    boundary_decays(scratch)
                    decays(scratch, DECAYS)
                    times_lower(scratch, WEIGHTS, DECAYS, SCORES)
                    base = x_at[0] + row * x_at[1] + t0 * x_at[2] + h * x_at[3]
                    load_rows(scratch, X, p, x, base, x_at[2], count, P)
                    base = gy_at[0] + row * gy_at[1] + t0 * gy_at[2] + h * gy_at[3]
                    load_rows(scratch, GY, p, gy, base, gy_at[2], count, P)
                    scale_rows(scratch, U, X, DELTA, p)
                    scale_rows(scratch, R, GY, TO_TOKEN, p)

                    # dU, and by way of the state what each token wrote for the tokens behind the chunk
                    fill(scratch, GU, CHUNK * p, 0.0)
                    multiply(scratch, GU, p, CHUNK, p, B, n, 1, state, p, n, FULL, False)
                    scale_rows(scratch, GU, GU, TO_END, p)
                    _row_products(scratch, _TO_END, GU, U, p)
                    multiply(scratch, GU, p, CHUNK, p, WEIGHTS, 1, CHUNK, GY, p, CHUNK, UPPER, False)

                    # through the scores
                    transpose(scratch, UT, CHUNK, scratch, U, p, CHUNK, p)
                    fill(scratch, BETWEEN, SQUARE, 0.0)
                    multiply(scratch, BETWEEN, CHUNK, CHUNK, CHUNK, GY, p, 1, UT, CHUNK, p, FULL, True)
                    times_lower(scratch, BETWEEN, BETWEEN, DECAYS)
                    for i in range(0, SQUARE, WIDTH):
                        total = simd.add(simd.load(scratch, GSCORES + i), simd.load(scratch, BETWEEN + i))
                        simd.store(scratch, GSCORES + i, total)
                    times_lower(scratch, BETWEEN, BETWEEN, SCORES)
                    _passed_within(scratch, BETWEEN)

                    # through the states at both ends of the chunk
                    transpose(scratch, ST, n, starts_BHCNP, start, p, n, p)
                    fill(scratch, PART, CHUNK * n, 0.0)
                    multiply(scratch, PART, n, CHUNK, n, R, p, 1, ST, n, p, FULL, False)
                    _row_products(scratch, _FROM_START, PART, C, n)
                    for i in range(0, CHUNK * n, WIDTH):
                        simd.store(scratch, GC + i, simd.add(simd.load(scratch, GC + i), simd.load(scratch, PART + i)))
                    transpose(scratch, ET, n, scratch, state, p, n, p)
                    scale_rows(scratch, U, U, TO_END, p)
                    multiply(scratch, GB, n, CHUNK, n, U, p, 1, ET, n, p, FULL, False)
                    through = 2.0 ** (np.float64(scratch[HIGH + CHUNK - 1]) + scratch[LOW + CHUNK - 1])
                    kept = through * _inner(scratch, state, starts_BHCNP, start, n * p)
                    fill(scratch, ADDED, n * p, 0.0)
                    multiply(scratch, ADDED, p, n, p, C, 1, n, R, p, CHUNK, FULL, False)
                    outlast(scratch, state, ADDED, n * p)

                    _row_products(scratch, _DIRECT, GU, X, p)
                    gA_BH[row * H + h] += _gradient_of_steps(scratch, gdelta_BLH, token, H, h, decay, kept, count)
                    gskip_BH[row * H + h] += _inner(scratch, GY, scratch, X, CHUNK * p)
                    scale_rows(scratch, GU, GU, DELTA, p)
                    skip = simd.broadcast(skip_H, h)
                    for i in range(0, CHUNK * p, WIDTH):
                        gx = simd.fma(skip, simd.load(scratch, GY + i), simd.load(scratch, GU + i))
                        simd.store(scratch, GU + i, gx)
                    store_rows(scratch, GU, p, gx_BLHP, (token * H + h) * P, H * P, count, P)
                multiply(scratch, GC, n, CHUNK, n, GSCORES, CHUNK, 1, B, n, CHUNK, LOWER, False)
                multiply(scratch, GB, n, CHUNK, n, GSCORES, 1, CHUNK, C, n, CHUNK, UPPER, False)
                at = (((task % parts) * batch + row) * L + t0) * G * N + g * N
                store_rows(scratch, GB, n, gb_JBLGN, at, G * N, count, N)
                store_rows(scratch, GC, n, gc_JBLGN, at, G * N, count, N)
            for h in range(h0, h1):
                copy(gstate_BHNP, (row * H + h) * n * p, scratch, E + (h - h0) * n * p, n * p)

    return backward
