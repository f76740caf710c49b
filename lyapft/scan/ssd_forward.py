"""State space duality (Mamba-2) on a CPU, compiled by numba: the forward pass, and what both passes share.

Letters: B batch, L tokens, H heads, P head dim, G groups (K = H/G heads share B and C), N states; T tokens per chunk.

The equations are those of `ssd.py`. Here all matrices of one chunk and one head stay in scratch memory, in a core's
own cache: what `ssd.py` does by passes over tensors of all heads and chunks, whose cost is memory, is done by products
of 64 × 64 matrices. A task is one sequence and some heads of one group, chunk after chunk; the scores C_i·B_j are
computed once for its heads. The forward pass keeps the state at the start of each chunk (N,P); the backward pass
recomputes the T×T matrices.

Decays are exp2 of differences of s, the running sum of ΔA log2(e): s is summed in float64 and kept as two float32
numbers, so that one large |ΔA| does not swallow the small ones that follow it.
"""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

import numpy as np
from numba import types

from lyapft.compiled import helper, inlined, jit
from lyapft.scan import simd
from lyapft.scan.layout import FLAT, VIEW, padded
from lyapft.scan.products import FULL, LOWER, multiply, transpose
from lyapft.scan.simd import LN2, LOG2E, WIDTH

CHUNK = 64  # T: its square matrices and a state of 64 × 64 take a quarter of a level-2 cache together
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


def scratch_size(dim: int, states: int, heads: int) -> int:
    """float32 numbers of scratch memory that one worker needs for tasks of so many heads."""
    p, n = padded(dim), padded(states)
    return HEAD + 3 * SQUARE + CHUNK * (3 * p + 3 * n) + (heads + 1) * n * p


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


def make_forward():
    """The forward kernel; `digest` ties its cache entry to the vector code. Task = (sequence, heads of a group)."""
    digest = simd.DIGEST

    @jit
    def forward(
        first, last, parts, scratch, sizes, flags, x, x_at, delta_BLH, A_H, skip_H, b, b_at, c, c_at,
        begins_BL, initial_BHNP, y_BLHP, starts_BHCNP, final_BHNP,
    ):  # fmt: skip
        digest  # noqa: B018
        _, L, H, P, _, N = sizes
        packed, keep = flags
        p, n = -(-P // WIDTH) * WIDTH, -(-N // WIDTH) * WIDTH
        B, C, BT = HEAD, HEAD + CHUNK * n, HEAD + 2 * CHUNK * n
        SCORES = BT + CHUNK * n
        DECAYS, WEIGHTS = SCORES + SQUARE, SCORES + 2 * SQUARE
        X = WEIGHTS + SQUARE
        U, Y, ADDED = X + CHUNK * p, X + 2 * CHUNK * p, X + 3 * CHUNK * p
        S = ADDED + n * p
        chunks = -(-L // CHUNK)
        prepare_masks(scratch)
        fill(scratch, DECAYS, 2 * SQUARE, 0.0)
        for task in range(first, last):
            row, g, h0, h1 = heads_of(task, parts, sizes)
            for h in range(h0, h1):
                copy(scratch, S + (h - h0) * n * p, initial_BHNP, (row * H + h) * n * p, n * p)
            for chunk in range(chunks):
                t0 = chunk * CHUNK
                count, token = min(CHUNK, L - t0), row * L + t0
                load_rows(scratch, B, n, b, b_at[0] + row * b_at[1] + t0 * b_at[2] + g * b_at[3], b_at[2], count, N)
                load_rows(scratch, C, n, c, c_at[0] + row * c_at[1] + t0 * c_at[2] + g * c_at[3], c_at[2], count, N)
                transpose(scratch, BT, CHUNK, scratch, B, n, CHUNK, n)
                fill(scratch, SCORES, SQUARE, 0.0)
                multiply(scratch, SCORES, CHUNK, CHUNK, CHUNK, C, n, 1, BT, CHUNK, n, FULL, True)
                for h in range(h0, h1):
                    state = S + (h - h0) * n * p
                    if keep:
                        copy(starts_BHCNP, ((row * H + h) * chunks + chunk) * n * p, scratch, state, n * p)
                    log_decays(scratch, delta_BLH, begins_BL, token, H, h, np.float64(A_H[h]) * LOG2E, count, packed)
                    boundary_decays(scratch)
                    decays(scratch, DECAYS)
                    times_lower(scratch, WEIGHTS, DECAYS, SCORES)
                    base = x_at[0] + row * x_at[1] + t0 * x_at[2] + h * x_at[3]
                    load_rows(scratch, X, p, x, base, x_at[2], count, P)
                    scale_rows(scratch, U, X, DELTA, p)
                    fill(scratch, Y, CHUNK * p, 0.0)
                    multiply(scratch, Y, p, CHUNK, p, C, n, 1, state, p, n, FULL, False)
                    scale_rows(scratch, Y, Y, TO_TOKEN, p)
                    multiply(scratch, Y, p, CHUNK, p, WEIGHTS, CHUNK, 1, U, p, CHUNK, LOWER, False)
                    skip = simd.broadcast(skip_H, h)
                    for i in range(0, CHUNK * p, WIDTH):
                        y = simd.fma(skip, simd.load(scratch, X + i), simd.load(scratch, Y + i))
                        simd.store(scratch, Y + i, y)
                    store_rows(scratch, Y, p, y_BLHP, (token * H + h) * P, H * P, count, P)
                    scale_rows(scratch, U, U, TO_END, p)
                    fill(scratch, ADDED, n * p, 0.0)
                    multiply(scratch, ADDED, p, n, p, B, 1, n, U, p, CHUNK, FULL, False)
                    outlast(scratch, state, ADDED, n * p)
            for h in range(h0, h1):
                copy(final_BHNP, (row * H + h) * n * p, scratch, S + (h - h0) * n * p, n * p)

    return forward
