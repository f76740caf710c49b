"""Causal depthwise convolution over tokens, with or without SiLU, compiled by numba for channels-last memory.

Letters: B batch, L tokens, D channels, K taps.

    y_t = act(bias + Σ_k w_k x_{t-K+1+k}),  x before the first token of a sequence = 0

torch's own convolution wants (B,D,L) contiguous: it transposes the channels-last output of a projection, and back for
backward.
"""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

import numpy as np
import torch
from numba import types

from lyapft.compiled import Kernel, helper, jit
from lyapft.scan import simd, threads
from lyapft.scan.layout import (
    FLAT,
    TABLE,
    VIEW,
    channel_groups,
    chunk_table,
    empty,
    lanes_last,
    padded,
    storage,
    values,
    view,
    zeros,
)
from lyapft.scan.simd import LOG2E, WIDTH
from lyapft.scan.tiles import ROWS, load_tile, store_tile
from lyapft.scan.tiles import at as at_view

_SIZES = types.UniTuple(types.int64, 5)  # B, L, D, K, C chunks
_FORWARD_SIGNATURE = types.void(*[types.int64] * 3, FLAT, _SIZES, types.boolean, TABLE, FLAT, VIEW, *[FLAT] * 3)
_BACKWARD_SIGNATURE = types.void(*[types.int64] * 3, FLAT, _SIZES, types.boolean, TABLE, *[FLAT, VIEW] * 2, *[FLAT] * 5)


@helper
def _load_inputs(target, to, x, x_at, b, t0, origin, d, taps, count, valid):
    """The tile of x and the taps - 1 tokens before it; zeros before the first token of its sequence."""
    early = max(0, taps - 1 - (t0 - origin))
    for i in range(to, to + early * WIDTH, WIDTH):
        simd.store(target, i, simd.splat(np.float32(0.0)))
    base = at_view(x_at, b, t0 - taps + 1 + early, d)
    load_tile(target, to + early * WIDTH, x, base, x_at[2], x_at[3], count + taps - 1 - early, valid)


@helper
def _preactivation(tile, at, weight_KD, width, bias, d, taps):
    total = bias
    for k in range(taps):
        total = simd.fma(simd.load(weight_KD, k * width + d), simd.load(tile, at + k * WIDTH), total)
    return total


def make_forward():
    """The forward kernel; task = (sequence, group of lane blocks)."""
    digest = simd.DIGEST

    @jit
    def forward(first, last, groups, scratch, sizes, silu, chunks, x, x_at, weight_KD, bias_D, y_BLD):
        digest  # noqa: B018
        _, L, D, K, C = sizes
        width = -(-D // WIDTH) * WIDTH
        Y = (ROWS + K - 1) * WIDTH
        one, log2e = simd.splat(np.float32(1.0)), simd.splat(np.float32(-LOG2E))
        for task in range(first, last):
            b, group = task // groups, task % groups
            d0, d1 = group * (width // WIDTH) // groups * WIDTH, (group + 1) * (width // WIDTH) // groups * WIDTH
            for c in range(b * C, (b + 1) * C):
                t0, count, origin = chunks[3 * c], chunks[3 * c + 1], chunks[3 * c + 2]
                if count == 0:
                    break
                for d in range(d0, d1, WIDTH):
                    bias, valid = simd.load(bias_D, d), min(WIDTH, D - d)
                    _load_inputs(scratch, 0, x, x_at, b, t0, origin, d, K, count, valid)
                    for j in range(count):
                        v = _preactivation(scratch, j * WIDTH, weight_KD, width, bias, d, K)
                        if silu:
                            v = simd.div(v, simd.add(one, simd.exp2(simd.mul(v, log2e))))
                        simd.store(scratch, Y + j * WIDTH, v)
                    store_tile(scratch, Y, y_BLD, (b * L + t0) * D + d, D, 1, count, valid)

    return forward


def make_backward():
    """The backward kernel: recomputes the preactivation; carries the K - 1 gradients that reach into the tile
    before."""
    digest = simd.DIGEST

    @jit
    def backward(
        first, last, groups, scratch, sizes, silu, chunks, x, x_at, gy, gy_at, weight_KD, bias_D,
        gx_BLD, gweight_BKD, gbias_BD,
    ):  # fmt: skip
        digest  # noqa: B018
        _, L, D, K, C = sizes
        width = -(-D // WIDTH) * WIDTH
        G = (ROWS + K - 1) * WIDTH
        P = 2 * G
        CARRY = P + ROWS * WIDTH
        zero, one = simd.splat(np.float32(0.0)), simd.splat(np.float32(1.0))
        log2e = simd.splat(np.float32(-LOG2E))
        for task in range(first, last):
            b, group = task // groups, task % groups
            d0, d1 = group * (width // WIDTH) // groups * WIDTH, (group + 1) * (width // WIDTH) // groups * WIDTH
            for i in range(CARRY, CARRY + (K - 1) * width, WIDTH):
                simd.store(scratch, i, zero)
            for c in range((b + 1) * C - 1, b * C - 1, -1):
                t0, count, origin = chunks[3 * c], chunks[3 * c + 1], chunks[3 * c + 2]
                if count == 0:
                    continue
                for d in range(d0, d1, WIDTH):
                    bias, valid = simd.load(bias_D, d), min(WIDTH, D - d)
                    _load_inputs(scratch, 0, x, x_at, b, t0, origin, d, K, count, valid)
                    load_tile(scratch, G, gy, at_view(gy_at, b, t0, d), gy_at[2], gy_at[3], count, valid)
                    for k in range(K - 1):
                        simd.store(scratch, G + (count + k) * WIDTH, simd.load(scratch, CARRY + k * width + d))
                    gbias = simd.load(gbias_BD, b * width + d)
                    for j in range(count):
                        g = simd.load(scratch, G + j * WIDTH)
                        if silu:
                            v = _preactivation(scratch, j * WIDTH, weight_KD, width, bias, d, K)
                            sigma = simd.div(one, simd.add(one, simd.exp2(simd.mul(v, log2e))))
                            g = simd.mul(g, simd.fma(simd.mul(v, sigma), simd.sub(one, sigma), sigma))
                            simd.store(scratch, G + j * WIDTH, g)
                        gbias = simd.add(gbias, g)
                    simd.store(gbias_BD, b * width + d, gbias)
                    for j in range(count):
                        gx = zero
                        for k in range(K):
                            weight = simd.load(weight_KD, (K - 1 - k) * width + d)
                            gx = simd.fma(weight, simd.load(scratch, G + (j + k) * WIDTH), gx)
                        simd.store(scratch, P + j * WIDTH, gx)
                    store_tile(scratch, P, gx_BLD, (b * L + t0) * D + d, D, 1, count, valid)
                    for k in range(K):
                        gw = simd.load(gweight_BKD, (b * K + k) * width + d)
                        for j in range(count):
                            gw = simd.fma(simd.load(scratch, G + j * WIDTH), simd.load(scratch, (j + k) * WIDTH), gw)
                        simd.store(gweight_BKD, (b * K + k) * width + d, gw)
                    for k in range(K - 1):
                        reaching = zero if t0 == origin else simd.load(scratch, G + k * WIDTH)
                        simd.store(scratch, CARRY + k * width + d, reaching)

    return backward


_forward = Kernel("causal convolution, forward", make_forward, _FORWARD_SIGNATURE)
_backward = Kernel("causal convolution, backward", make_backward, _BACKWARD_SIGNATURE)


class CausalConv(torch.autograd.Function):
    """y_BLD = act(causal depthwise convolution of x_BLD with weight_DK + bias_D); float32, any strides.

    Where sequence_BL, the index of the sequence that each token belongs to, changes along a row, the taps see zeros
    instead of the sequence before.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, silu, sequence=None):  # type: ignore[no-untyped-def]
        batch, length, channels = x.shape
        table, chunks = chunk_table(sequence, batch, length)
        sizes, width = (batch, length, channels, weight.shape[1], chunks), padded(channels)
        weight_KD = lanes_last(weight.t(), width)
        bias_D = zeros(width) if bias is None else lanes_last(bias, width)
        y = empty(batch, length, channels)
        groups = channel_groups(batch, width // WIDTH)
        run = _forward.prepare()
        scratch = empty(threads.worker_count(batch * groups), (2 * ROWS + sizes[3] - 1) * WIDTH)
        arguments = [sizes, silu, table, storage(x), view(x)] + [values(t) for t in (weight_KD, bias_D, y)]
        threads.run(batch * groups, lambda i, j, w: run(i, j, groups, scratch[w].numpy(), *arguments))
        ctx.save_for_backward(x, weight_KD, bias_D)
        ctx.sizes, ctx.silu, ctx.table, ctx.has_bias = sizes, silu, table, bias is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):  # type: ignore[no-untyped-def]
        x, weight_KD, bias_D = ctx.saved_tensors
        batch, length, channels, taps, _ = ctx.sizes
        width = padded(channels)
        groups = channel_groups(batch, width // WIDTH)
        gx = empty(batch, length, channels)
        gweight, gbias = zeros(batch, taps, width), zeros(batch, width)
        rows = 3 * ROWS + 2 * (taps - 1)
        scratch = empty(threads.worker_count(batch * groups), rows * WIDTH + (taps - 1) * width)
        run = _backward.prepare()
        arguments = [ctx.sizes, ctx.silu, ctx.table, storage(x), view(x), storage(gy), view(gy)]
        arguments += [values(t) for t in (weight_KD, bias_D, gx, gweight, gbias)]
        threads.run(batch * groups, lambda i, j, w: run(i, j, groups, scratch[w].numpy(), *arguments))
        return gx, gweight.sum(0)[:, :channels].t(), gbias.sum(0)[:channels] if ctx.has_bias else None, None, None
