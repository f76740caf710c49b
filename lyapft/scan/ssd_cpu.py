"""Autograd around the compiled SSD: layouts, scratch memory and gradients.

Letters: B batch, L tokens, H heads, P head dim, G groups, N states. All tensors are float32 on the CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lyapft.compiled import Kernel
from lyapft.scan import ssd_backward, ssd_forward, threads
from lyapft.scan.layout import empty, padded, storage, values, view, zeros
from lyapft.scan.packing import begins
from lyapft.scan.ssd_forward import CHUNK

_forward = Kernel("SSD, forward", ssd_forward.make_forward, ssd_forward.SIGNATURE)
_backward = Kernel("SSD, backward", ssd_backward.make_backward, ssd_backward.SIGNATURE)
_EMPTY = zeros(1)


def _parts(batch: int, groups: int, heads: int) -> int:
    """Parts of the heads of a group: enough tasks for many cores, at least two heads each, which share the scores.

    No function of the thread count, so that sums over parts do not depend on it. Each part has a gradient of B and C of
    its own: all of them together take at most N/P times the memory of x, for at least two heads a part.
    """
    return max(1, min(heads // groups // 2, -(-32 // (batch * groups))))


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension without gaps: a kernel reads whole rows."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _state(tensor: Tensor | None, batch: int, heads: int, dim: int, states: int) -> Tensor:
    """(B,H,P,N) or None (zero) -> contiguous (B,H,N,P), both padded to whole lane blocks."""
    if tensor is None:
        return zeros(batch, heads, padded(states), padded(dim))
    pad = (0, padded(dim) - dim, 0, padded(states) - states)
    return F.pad(tensor.detach().transpose(-1, -2), pad).contiguous()


class FusedSSD(torch.autograd.Function):
    """y = ssd(x, Δ, A, B, C) + skip·x and the last state (B,H,P,N).

    Where sequence_BL, the index of the sequence that each token belongs to, changes along a row, the state starts
    anew from zero.
    """

    @staticmethod
    def forward(ctx, x, delta, A, B, C, skip, initial, sequence=None):  # type: ignore[no-untyped-def]
        batch, length, heads, dim = x.shape
        groups, states = B.shape[2:]
        x, B, C = (_rows(t.detach()) for t in (x, B, C))
        skip_H = zeros(heads) if skip is None else skip
        begins_BL = _EMPTY if sequence is None else begins(sequence).float()
        keep = any(ctx.needs_input_grad)
        start = _state(initial, batch, heads, dim, states)
        y, final = empty(batch, length, heads, dim), torch.empty_like(start)
        chunks = -(-length // CHUNK)
        starts = empty(batch, heads, chunks, *start.shape[2:]) if keep else _EMPTY
        sizes, flags = (batch, length, heads, dim, groups, states), (sequence is not None, keep)
        arguments = _inputs(x, delta, A, skip_H, B, C)
        arguments += [values(t) for t in (begins_BL, start, y, starts, final)]
        _run(_forward, ssd_forward.scratch_size, sizes, flags, arguments)
        ctx.save_for_backward(x, delta, A, B, C, skip_H, begins_BL, starts)
        ctx.sizes, ctx.flags = sizes, flags
        ctx.given = skip is not None, initial is not None
        ctx.set_materialize_grads(False)
        return y, final[..., :states, :dim].transpose(-1, -2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast):  # type: ignore[no-untyped-def]
        x, delta, A, B, C, skip_H, begins_BL, starts = ctx.saved_tensors
        batch, _, heads, dim, groups, states = ctx.sizes
        gy = zeros(x.shape) if gy is None else _rows(gy)
        gstate = _state(glast, batch, heads, dim, states)
        parts = _parts(batch, groups, heads)
        gx, gdelta = empty(x.shape), empty(delta.shape)
        gA, gskip = zeros(batch, heads), zeros(batch, heads)
        gB, gC = empty(parts, *B.shape), empty(parts, *C.shape)
        arguments = [storage(gy), view(gy[..., 0]), *_inputs(x, delta, A, skip_H, B, C)]
        arguments += [values(t) for t in (begins_BL, starts, gstate, gx, gdelta, gA, gskip, gB, gC)]
        _run(_backward, ssd_backward.scratch_size, ctx.sizes, ctx.flags, arguments)
        has_skip, has_initial = ctx.given
        gstart = gstate[..., :states, :dim].transpose(-1, -2) if has_initial else None
        return gx, gdelta, gA.sum(0), gB.sum(0), gC.sum(0), gskip.sum(0) if has_skip else None, gstart, None


def _inputs(x: Tensor, delta: Tensor, A: Tensor, skip: Tensor, B: Tensor, C: Tensor) -> list[Any]:
    """What both kernels read, in their order."""
    read = [storage(x), view(x[..., 0]), *(values(t) for t in (delta, A, skip))]
    return [*read, storage(B), view(B[..., 0]), storage(C), view(C[..., 0])]


def _run(kernel: Kernel, scratch_size, sizes, flags, arguments):  # type: ignore[no-untyped-def]
    """Runs a kernel on all tasks, with scratch memory of its own for each worker."""
    batch, _, heads, dim, groups, states = sizes
    run, parts = kernel.prepare(), _parts(batch, groups, heads)
    tasks = batch * groups * parts
    most = -(-(heads // groups) // parts)
    scratch = empty(threads.worker_count(tasks), scratch_size(dim, states, most)).numpy()
    threads.run(tasks, lambda i, j, worker: run(i, j, parts, scratch[worker], sizes, flags, *arguments))
