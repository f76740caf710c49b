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

from typing import NamedTuple

import numpy as np
from numba import types

from lyapft.compiled import helper, jit
from lyapft.scan import simd
from lyapft.scan.layout import FLAT, VIEW, padded
from lyapft.scan.products import BLOCKS, FULL, LOWER, UPPER, multiply, transpose
from lyapft.scan.simd import WIDTH
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
    copy,
    fill,
    heads_of,
    load_group,
    load_head,
    load_rows,
    outlast,
    prepare_masks,
    scale_rows,
    store_rows,
    times_lower,
)
from lyapft.scan.tiles import at as place

SIGNATURE = types.void(
    types.int64, types.int64, types.int64, FLAT, SIZES, FLAGS, *[FLAT, VIEW] * 2, FLAT, FLAT, FLAT, *[FLAT, VIEW] * 2,
    *[FLAT] * 9,
)  # fmt: skip
# Places of sums per token, behind the head that both passes share; the last one is a row of lanes for each token.
_FROM_START, _TO_END, _WITHIN, _DIRECT, _COLUMNS, _LANES = (HEAD + i * CHUNK for i in range(6))
_HEAD = _LANES + CHUNK * WIDTH


class Places(NamedTuple):
    """Where each matrix begins in scratch memory; rows are tokens, or states (N) or dims (P) where it says so."""

    B: int
    C: int
    B_turned: int  # (N,T)
    gB: int
    gC: int
    part: int  # of gC, of one head
    scores: int  # (T,T), of the group
    gscores: int
    decays: int  # (T,T), of the head
    weights: int
    between: int  # gradients of what was written at j and read at i
    x: int
    written: int
    written_turned: int  # (P,T)
    gwritten: int
    gy: int
    reading: int  # gy by way of the state at the start of the chunk
    start_turned: int  # (P,N), the state there
    end_turned: int  # (P,N), the gradient of the state at the end
    added: int  # (N,P)
    gstates: int  # (N,P) of each head


@helper
def places(p, n):
    """The layout of scratch memory for head dim and states in whole lane blocks."""
    tall, wide, state = CHUNK * n, CHUNK * p, n * p
    B = _HEAD
    scores = B + 6 * tall
    x = scores + 5 * SQUARE
    start = x + 6 * wide
    return Places(
        B, B + tall, B + 2 * tall, B + 3 * tall, B + 4 * tall, B + 5 * tall,
        scores, scores + SQUARE, scores + 2 * SQUARE, scores + 3 * SQUARE, scores + 4 * SQUARE,
        x, x + wide, x + 2 * wide, x + 3 * wide, x + 4 * wide, x + 5 * wide,
        start, start + state, start + 2 * state, start + 3 * state,
    )  # fmt: skip


def scratch_size(dim: int, states: int, heads: int) -> int:
    """float32 numbers of scratch memory that one worker needs for tasks of so many heads."""
    p, n = padded(dim), padded(states)
    return places.py_func(p, n).gstates + heads * n * p


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
def _add(scratch, to, of, count):
    """scratch[to + i] += scratch[of + i]."""
    for i in range(0, count, WIDTH):
        simd.store(scratch, to + i, simd.add(simd.load(scratch, to + i), simd.load(scratch, of + i)))


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


@helper
def _through_writes(scratch, at, p, n, gstate):
    """gwritten; and of each token its write's gradient by way of the state after the chunk."""
    fill(scratch, at.gwritten, CHUNK * p, 0.0)
    multiply(scratch, at.gwritten, p, CHUNK, p, at.B, n, 1, gstate, p, n, FULL, False)
    scale_rows(scratch, at.gwritten, at.gwritten, TO_END, p)
    _row_products(scratch, _TO_END, at.gwritten, at.written, p)
    multiply(scratch, at.gwritten, p, CHUNK, p, at.weights, 1, CHUNK, at.gy, p, CHUNK, UPPER, False)


@helper
def _through_scores(scratch, at, p):
    """Adds to gscores; and what each token's decay passed on between two tokens of the chunk."""
    transpose(scratch, at.written_turned, CHUNK, scratch, at.written, p, CHUNK, p)
    fill(scratch, at.between, SQUARE, 0.0)
    multiply(scratch, at.between, CHUNK, CHUNK, CHUNK, at.gy, p, 1, at.written_turned, CHUNK, p, FULL, True)
    times_lower(scratch, at.between, at.between, at.decays)
    _add(scratch, at.gscores, at.between, SQUARE)
    times_lower(scratch, at.between, at.between, at.scores)
    _passed_within(scratch, at.between)


@helper
def _through_start(scratch, at, p, n, starts_BHCNP, start):
    """Adds to gC; and of each token what it read of the state at the start of the chunk."""
    transpose(scratch, at.start_turned, n, starts_BHCNP, start, p, n, p)
    fill(scratch, at.part, CHUNK * n, 0.0)
    multiply(scratch, at.part, n, CHUNK, n, at.reading, p, 1, at.start_turned, n, p, FULL, False)
    _row_products(scratch, _FROM_START, at.part, at.C, n)
    _add(scratch, at.gC, at.part, CHUNK * n)


@helper
def _through_end(scratch, at, p, n, gstate):
    """Adds to gB; then the gradient of the state at the start of the chunk in place of that at its end."""
    transpose(scratch, at.end_turned, n, scratch, gstate, p, n, p)
    scale_rows(scratch, at.written, at.written, TO_END, p)
    multiply(scratch, at.gB, n, CHUNK, n, at.written, p, 1, at.end_turned, n, p, FULL, False)
    fill(scratch, at.added, n * p, 0.0)
    multiply(scratch, at.added, p, n, p, at.C, 1, n, at.reading, p, CHUNK, FULL, False)
    outlast(scratch, gstate, at.added, n * p)


@helper
def _inputs_gradient(scratch, at, p, skip):
    """gx in place of gwritten; and of each token the gradient of the Δ that its input was multiplied by."""
    _row_products(scratch, _DIRECT, at.gwritten, at.x, p)
    scale_rows(scratch, at.gwritten, at.gwritten, DELTA, p)
    for i in range(0, CHUNK * p, WIDTH):
        gx = simd.fma(skip, simd.load(scratch, at.gy + i), simd.load(scratch, at.gwritten + i))
        simd.store(scratch, at.gwritten + i, gx)


def make_backward():
    """The backward kernel; task = (sequence, heads of a group)."""
    digest = simd.DIGEST + BLOCKS

    @jit
    def backward(
        first, last, parts, scratch, sizes, flags, gy, gy_at, x, x_at, delta_BLH, A_H, skip_H, b, b_at, c, c_at,
        begins_BL, starts_BHCNP, gstate_BHNP, gx_BLHP, gdelta_BLH, gA_BH, gskip_BH, gb_JBLGN, gc_JBLGN,
    ):  # fmt: skip
        digest  # noqa: B018
        batch, L, H, P, G, N = sizes
        packed, _ = flags
        p, n = -(-P // WIDTH) * WIDTH, -(-N // WIDTH) * WIDTH
        at, chunks = places(p, n), -(-L // CHUNK)
        prepare_masks(scratch)
        fill(scratch, at.decays, 3 * SQUARE, 0.0)
        for task in range(first, last):
            row, g, h0, h1 = heads_of(task, parts, sizes)
            copy(scratch, at.gstates, gstate_BHNP, (row * H + h0) * n * p, (h1 - h0) * n * p)
            for chunk in range(chunks - 1, -1, -1):
                t0 = chunk * CHUNK
                count, token = min(CHUNK, L - t0), row * L + t0
                load_group(
                    scratch, at, n, N, b, place(b_at, row, t0, g), b_at[2], c, place(c_at, row, t0, g), c_at[2], count
                )
                fill(scratch, at.gscores, SQUARE, 0.0)
                fill(scratch, at.gB, 2 * CHUNK * n, 0.0)
                for h in range(h0, h1):
                    gstate, start = at.gstates + (h - h0) * n * p, ((row * H + h) * chunks + chunk) * n * p
                    decay, skip = np.float64(A_H[h]), simd.broadcast(skip_H, h)
                    load_head(
                        scratch, at, p, P, x, place(x_at, row, t0, h), x_at[2], delta_BLH, begins_BL, token, H, h,
                        decay, count, packed,
                    )  # fmt: skip
                    load_rows(scratch, at.gy, p, gy, place(gy_at, row, t0, h), gy_at[2], count, P)
                    scale_rows(scratch, at.reading, at.gy, TO_TOKEN, p)
                    through = 2.0 ** (np.float64(scratch[HIGH + CHUNK - 1]) + scratch[LOW + CHUNK - 1])
                    kept = through * _inner(scratch, gstate, starts_BHCNP, start, n * p)
                    _through_writes(scratch, at, p, n, gstate)
                    _through_scores(scratch, at, p)
                    _through_start(scratch, at, p, n, starts_BHCNP, start)
                    _through_end(scratch, at, p, n, gstate)
                    gskip_BH[row * H + h] += _inner(scratch, at.gy, scratch, at.x, CHUNK * p)
                    _inputs_gradient(scratch, at, p, skip)
                    gA_BH[row * H + h] += _gradient_of_steps(scratch, gdelta_BLH, token, H, h, decay, kept, count)
                    store_rows(scratch, at.gwritten, p, gx_BLHP, (token * H + h) * P, H * P, count, P)
                multiply(scratch, at.gC, n, CHUNK, n, at.gscores, CHUNK, 1, at.B, n, CHUNK, LOWER, False)
                multiply(scratch, at.gB, n, CHUNK, n, at.gscores, 1, CHUNK, at.C, n, CHUNK, UPPER, False)
                to = ((((task % parts) * batch + row) * L + t0) * G + g) * N
                store_rows(scratch, at.gB, n, gb_JBLGN, to, G * N, count, N)
                store_rows(scratch, at.gC, n, gc_JBLGN, to, G * N, count, N)
            copy(gstate_BHNP, (row * H + h0) * n * p, scratch, at.gstates, (h1 - h0) * n * p)

    return backward
