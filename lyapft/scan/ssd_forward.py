"""State space duality (Mamba-2) on a CPU, compiled by numba: the forward pass, and what both passes share.

Letters: B batch, L tokens, H heads, P head dim, G groups (K = H/G heads share B and C), N states; T tokens per chunk.

The equations are those of `ssd.py`. Here all matrices of one chunk and one head stay in scratch memory, in a core's
own cache: what `ssd.py` does by passes over tensors of all heads and chunks, whose cost is memory, is done by products
of 64 × 64 matrices. A task is one sequence and some heads of one group, chunk after chunk; the scores C_i·B_j are
computed once for its heads. The forward pass keeps the state at the start of each chunk (N,P); the backward pass
recomputes the T×T matrices.

Decays are exp2 of differences of s, the running sum of ΔA log2(e): s is summed in float64 and kept as two float32
numbers, so that one large |ΔA| does not swallow the small ones that follow it. What is not finite may reach up to three
tokens before it: weights are multiplied in blocks of four rows.
"""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

from typing import NamedTuple

import numpy as np
from numba import types

from lyapft.compiled import helper, inlined, jit
from lyapft.scan import simd
from lyapft.scan.layout import FLAT, VIEW, padded
from lyapft.scan.products import BLOCKS, FULL, LOWER, multiply, transpose
from lyapft.scan.simd import LN2, LOG2E, WIDTH
from lyapft.scan.ssd import CHUNK
from lyapft.scan.tiles import at as place

SIZES = types.UniTuple(types.int64, 6)  # B, L, H, P, G, N
FLAGS = types.UniTuple(types.boolean, 2)  # sequences begin inside a row; keep what backward needs
SIGNATURE = types.void(
    types.int64, types.int64, types.int64, FLAT, SIZES, FLAGS, FLAT, VIEW, *[FLAT] * 3, *[FLAT, VIEW] * 2,
    *[FLAT] * 5,
)  # fmt: skip
SQUARE = CHUNK * CHUNK
_FORGET = -1e3 * LOG2E  # added to s where a sequence begins: its power of two is 0
_ABOVE = np.float32(-1e38)  # added to what lies above the diagonal: so is its

# Places of numbers per token, and of the masks of a diagonal block: the head of every scratch memory.
DELTA, HIGH, LOW, TO_TOKEN, TO_END = (i * CHUNK for i in range(5))
_MASK = 5 * CHUNK
BEFORE = _MASK + WIDTH * WIDTH
HEAD = BEFORE + WIDTH * WIDTH


class Places(NamedTuple):
    """Where each matrix begins in scratch memory; rows are tokens, or states (N) where it says so."""

    B: int
    C: int
    B_turned: int  # (N,T)
    scores: int  # (T,T), of the group
    decays: int
    weights: int
    x: int
    written: int
    y: int
    added: int  # (N,P)
    states: int  # (N,P) of each head


@helper
def places(p, n):
    """The layout of scratch memory for head dim and states in whole lane blocks."""
    tall, wide = CHUNK * n, CHUNK * p
    B = HEAD
    scores = B + 3 * tall
    x = scores + 3 * SQUARE
    added = x + 3 * wide
    return Places(
        B, B + tall, B + 2 * tall, scores, scores + SQUARE, scores + 2 * SQUARE,
        x, x + wide, x + 2 * wide, added, added + n * p,
    )  # fmt: skip


def scratch_size(dim: int, states: int, heads: int) -> int:
    """float32 numbers of scratch memory that one worker needs for tasks of so many heads."""
    p, n = padded(dim), padded(states)
    return places.py_func(p, n).states + heads * n * p


@inlined
def heads_of(task, parts, sizes):
    """Sequence, group, first and last head of a task."""
    _, _, H, _, G, _ = sizes
    shared = H // G
    b, g, part = task // (G * parts), task // parts % G, task % parts
    return b, g, g * shared + part * shared // parts, g * shared + (part + 1) * shared // parts


@helper
def fill(scratch, at, count, value):
    """scratch[at : at + count] = value; count is a multiple of 16."""
    lanes = simd.splat(np.float32(value))
    for i in range(at, at + count, WIDTH):
        simd.store(scratch, i, lanes)


@helper
def copy(target, to, source, of, count):
    """target[to : to + count] = source[of : of + count]; count is a multiple of 16."""
    for i in range(0, count, WIDTH):
        simd.store(target, to + i, simd.load(source, of + i))


@helper
def load_rows(scratch, to, step, source, base, stride, count, columns):
    """Rows of `columns` numbers, zero-padded to `step`; zeros for the rows from `count` to CHUNK."""
    whole = columns // WIDTH * WIDTH
    for j in range(count):
        for d in range(0, whole, WIDTH):
            simd.store(scratch, to + j * step + d, simd.load(source, base + j * stride + d))
        if whole < step:
            simd.store(scratch, to + j * step + whole, simd.splat(np.float32(0.0)))
            for d in range(whole, columns):
                scratch[to + j * step + d] = source[base + j * stride + d]
    fill(scratch, to + count * step, (CHUNK - count) * step, 0.0)


@helper
def store_rows(scratch, of, step, target, base, stride, count, columns):
    """The inverse of load_rows."""
    whole = columns // WIDTH * WIDTH
    for j in range(count):
        for d in range(0, whole, WIDTH):
            simd.store(target, base + j * stride + d, simd.load(scratch, of + j * step + d))
        for d in range(whole, columns):
            target[base + j * stride + d] = scratch[of + j * step + d]


@helper
def scale_rows(scratch, to, of, factors, step):
    """Row j of `to` = factor j times row j of `of`."""
    for j in range(CHUNK):
        factor = simd.broadcast(scratch, factors + j)
        for i in range(j * step, (j + 1) * step, WIDTH):
            simd.store(scratch, to + i, simd.mul(factor, simd.load(scratch, of + i)))


@helper
def prepare_masks(scratch):
    """Of row r of a diagonal block: what is added to logarithms (0 up to lane r); and 1 before lane r, else 0."""
    for r in range(WIDTH):
        for lane in range(WIDTH):
            scratch[_MASK + r * WIDTH + lane] = np.float32(0.0) if lane <= r else _ABOVE
            scratch[BEFORE + r * WIDTH + lane] = np.float32(1.0) if lane < r else np.float32(0.0)


@helper
def log_decays(scratch, delta_BLH, begins_BL, base, H, h, decay, count, packed):
    """Δ, and s as the sum of two float32 numbers, of each token of a chunk; after the last token s stays."""
    s = 0.0
    for j in range(CHUNK):
        v = np.float32(0.0)
        if j < count:
            v = delta_BLH[(base + j) * H + h]
            s += np.float64(v) * decay
            if packed and begins_BL[base + j] != 0:
                s += _FORGET
        high = np.float32(s)
        scratch[DELTA + j], scratch[HIGH + j], scratch[LOW + j] = v, high, np.float32(s - np.float64(high))


@inlined
def _power(high, low):
    """2^(high + low) of lanes, |low| small."""
    value = simd.exp2(high)
    return simd.fma(value, simd.mul(low, simd.splat(np.float32(LN2))), value)


@helper
def boundary_decays(scratch):
    """exp2 of s: from the start of the chunk to each token; exp2 of s_T - s: from each token to the end."""
    last_high, last_low = simd.broadcast(scratch, HIGH + CHUNK - 1), simd.broadcast(scratch, LOW + CHUNK - 1)
    for at in range(0, CHUNK, WIDTH):
        high, low = simd.load(scratch, HIGH + at), simd.load(scratch, LOW + at)
        simd.store(scratch, TO_TOKEN + at, _power(high, low))
        left = simd.add(simd.sub(last_high, high), simd.sub(last_low, low))
        simd.store(scratch, TO_END + at, simd.exp2(left))


@helper
def decays(scratch, to):
    """exp2(s_i - s_j) for j <= i, else 0, (T,T); what lies above the diagonal blocks is not written."""
    for i in range(CHUNK):
        high, low = simd.broadcast(scratch, HIGH + i), simd.broadcast(scratch, LOW + i)
        diagonal = i // WIDTH * WIDTH
        for j in range(0, diagonal + WIDTH, WIDTH):
            x = simd.sub(high, simd.load(scratch, HIGH + j))
            x = simd.add(x, simd.sub(low, simd.load(scratch, LOW + j)))
            if j == diagonal:
                x = simd.add(x, simd.load(scratch, _MASK + (i - diagonal) * WIDTH))
            simd.store(scratch, to + i * CHUNK + j, simd.exp2(x))


@helper
def times_lower(scratch, to, of, other):
    """to = of · other, element by element, in the diagonal blocks and below, (T,T)."""
    for i in range(CHUNK):
        for at in range(i * CHUNK, i * CHUNK + i // WIDTH * WIDTH + WIDTH, WIDTH):
            simd.store(scratch, to + at, simd.mul(simd.load(scratch, of + at), simd.load(scratch, other + at)))


@inlined
def through(scratch):
    """The two parts of exp2(s_T), a power of two and the rest: a decay close to 1 keeps its digits (`simd.decay`)."""
    scale, rest = simd.decay(simd.broadcast(scratch, HIGH + CHUNK - 1))
    low = simd.mul(simd.broadcast(scratch, LOW + CHUNK - 1), simd.splat(np.float32(LN2)))
    return scale, simd.fma(simd.add(scale, rest), low, rest)


@helper
def outlast(scratch, state, added, size):
    """A state (or its gradient) after the chunk: what is left of it, and what the chunk added, as one sum."""
    scale, rest = through(scratch)
    for i in range(0, size, WIDTH):
        h = simd.load(scratch, state + i)
        total = simd.fma(rest, h, simd.load(scratch, added + i))
        simd.store(scratch, state + i, simd.flush_tiny(simd.fma(scale, h, total)))


@helper
def load_group(scratch, at, n, N, b, b_base, b_stride, c, c_base, c_stride, count):
    """B and C of a chunk, and their scores C_i·B_j for j <= i."""
    load_rows(scratch, at.B, n, b, b_base, b_stride, count, N)
    load_rows(scratch, at.C, n, c, c_base, c_stride, count, N)
    transpose(scratch, at.B_turned, CHUNK, scratch, at.B, n, CHUNK, n)
    fill(scratch, at.scores, SQUARE, 0.0)
    multiply(scratch, at.scores, CHUNK, CHUNK, CHUNK, at.C, n, 1, at.B_turned, CHUNK, n, FULL, True)


@helper
def load_head(scratch, at, p, P, x, x_base, x_stride, delta_BLH, begins_BL, token, H, h, decay, count, packed):
    """What a head writes in a chunk, and all decays and weights of its tokens; decay is A, per Δ."""
    log_decays(scratch, delta_BLH, begins_BL, token, H, h, decay * LOG2E, count, packed)
    boundary_decays(scratch)
    decays(scratch, at.decays)
    times_lower(scratch, at.weights, at.decays, at.scores)
    load_rows(scratch, at.x, p, x, x_base, x_stride, count, P)
    scale_rows(scratch, at.written, at.x, DELTA, p)


@helper
def _outputs(scratch, at, p, n, state, skip):
    """y of a chunk: what is read of the state at its start, of what was written since, and the skip."""
    fill(scratch, at.y, CHUNK * p, 0.0)
    multiply(scratch, at.y, p, CHUNK, p, at.C, n, 1, state, p, n, FULL, False)
    scale_rows(scratch, at.y, at.y, TO_TOKEN, p)
    multiply(scratch, at.y, p, CHUNK, p, at.weights, CHUNK, 1, at.written, p, CHUNK, LOWER, False)
    for i in range(0, CHUNK * p, WIDTH):
        y = simd.fma(skip, simd.load(scratch, at.x + i), simd.load(scratch, at.y + i))
        simd.store(scratch, at.y + i, y)


@helper
def _advance(scratch, at, p, n, state):
    """The state at the end of a chunk in place of that at its start."""
    scale_rows(scratch, at.written, at.written, TO_END, p)
    fill(scratch, at.added, n * p, 0.0)
    multiply(scratch, at.added, p, n, p, at.B, 1, n, at.written, p, CHUNK, FULL, False)
    outlast(scratch, state, at.added, n * p)


def make_forward():
    """The forward kernel; `digest` ties its cache entry to the vector code. Task = (sequence, heads of a group)."""
    digest = simd.DIGEST + BLOCKS

    @jit
    def forward(
        first, last, parts, scratch, sizes, flags, x, x_at, delta_BLH, A_H, skip_H, b, b_at, c, c_at,
        begins_BL, initial_BHNP, y_BLHP, starts_BHCNP, final_BHNP,
    ):  # fmt: skip
        digest  # noqa: B018
        _, L, H, P, _, N = sizes
        packed, keep = flags
        p, n = -(-P // WIDTH) * WIDTH, -(-N // WIDTH) * WIDTH
        at, chunks = places(p, n), -(-L // CHUNK)
        prepare_masks(scratch)
        fill(scratch, at.decays, 2 * SQUARE, 0.0)
        for task in range(first, last):
            row, g, h0, h1 = heads_of(task, parts, sizes)
            copy(scratch, at.states, initial_BHNP, (row * H + h0) * n * p, (h1 - h0) * n * p)
            for chunk in range(chunks):
                t0 = chunk * CHUNK
                count, token = min(CHUNK, L - t0), row * L + t0
                load_group(
                    scratch, at, n, N, b, place(b_at, row, t0, g), b_at[2], c, place(c_at, row, t0, g), c_at[2], count
                )
                for h in range(h0, h1):
                    state = at.states + (h - h0) * n * p
                    if keep:
                        copy(starts_BHCNP, ((row * H + h) * chunks + chunk) * n * p, scratch, state, n * p)
                    load_head(
                        scratch, at, p, P, x, place(x_at, row, t0, h), x_at[2], delta_BLH, begins_BL, token, H, h,
                        np.float64(A_H[h]), count, packed,
                    )  # fmt: skip
                    _outputs(scratch, at, p, n, state, simd.broadcast(skip_H, h))
                    store_rows(scratch, at.y, p, y_BLHP, (token * H + h) * P, H * P, count, P)
                    _advance(scratch, at, p, n, state)
            copy(final_BHNP, (row * H + h0) * n * p, scratch, at.states, (h1 - h0) * n * p)

    return forward
