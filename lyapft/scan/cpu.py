"""Autograd around the compiled selective scan: layouts, scratch memory and gradients.

Letters: B batch, L tokens, D channels, N states. All tensors are float32 on the CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lyapft.compiled import Kernel
from lyapft.scan import selective_scan_backward, selective_scan_forward, threads
from lyapft.scan.layout import channel_groups, chunk_table, empty, lanes_last, padded, storage, values, view, zeros
from lyapft.scan.simd import LOG2E, WIDTH

_forward = Kernel("selective scan, forward", selective_scan_forward.make_forward, selective_scan_forward.SIGNATURE)
_backward = Kernel("selective scan, backward", selective_scan_backward.make_backward, selective_scan_backward.SIGNATURE)
_EMPTY = zeros(1)
_NO_VIEW = (0, 0, 0, 0)


def _even(tensor: Tensor) -> Tensor:
    """Contiguous, states last, an odd state paired with one that is zero: kernels take two states at a time."""
    return F.pad(tensor.detach(), (0, tensor.shape[-1] % 2)).contiguous()


def _states_first(tensor: Tensor, width: int) -> Tensor:
    """(...,D,N) -> contiguous (...,N,D), both padded."""
    return lanes_last(_even(tensor).transpose(-1, -2), width)


class FusedSelectiveScan(torch.autograd.Function):
    """y = (scan(x, Δ, A, B, C) + skip·x)·silu(z), Δ = softplus(dt + bias) or dt; returns (y, last state, Δ).

    Where sequence_BL, the index of the sequence that each token belongs to, changes along a row, the state starts
    anew from zero.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, bias, skip, z, initial, softplus, sequence=None):  # type: ignore[no-untyped-def]
        batch, length, channels = x.shape
        width = padded(channels)
        b, c, a2 = _even(B), _even(C), _states_first(A * LOG2E, width)
        states = b.shape[-1]
        bias_D = zeros(width) if bias is None else lanes_last(bias, width)
        skip_D = zeros(width) if skip is None else lanes_last(skip, width)
        start = zeros(batch, states, width) if initial is None else _states_first(initial, width)
        keep = any(ctx.needs_input_grad)
        y, final = empty(batch, length, channels), empty(batch, states, width)
        delta = torch.empty_like(y) if softplus else _EMPTY
        inner = torch.empty_like(y) if keep and z is not None else _EMPTY
        table, chunks = chunk_table(sequence, batch, length)
        starts = empty(batch, chunks, states, width) if keep else _EMPTY
        flags, sizes = (softplus, z is not None, keep), (batch, length, channels, states, chunks)
        groups = channel_groups(batch, width // WIDTH)
        size = selective_scan_forward.scratch_size(channels, states)
        gate, gate_at = (values(_EMPTY), _NO_VIEW) if z is None else (storage(z), view(z))
        arguments = [table, storage(x), view(x), storage(dt), view(dt), gate, gate_at]
        arguments += [values(t) for t in (bias_D, a2, skip_D, start, b, c, y, delta, inner, starts, final)]
        _run(_forward, batch * groups, groups, size, sizes, flags, arguments)
        ctx.save_for_backward(x, dt, b, c, z, a2, skip_D, delta, inner, starts)
        ctx.flags, ctx.sizes, ctx.table, ctx.states = flags, sizes, table, A.shape[-1]
        ctx.given = bias is not None, skip is not None, initial is not None
        last = final[:, : ctx.states, :channels].transpose(1, 2).contiguous()
        shown = delta if softplus else dt.detach()
        ctx.mark_non_differentiable(shown)
        ctx.set_materialize_grads(False)  # or backward gets zeros for Δ, as large as y
        return y, last, shown

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast, _):  # type: ignore[no-untyped-def]
        x, dt, b, c, z, a2, skip_D, delta, inner, starts = ctx.saved_tensors
        gy = zeros(x.shape) if gy is None else gy
        batch, length, channels, states, _ = ctx.sizes
        width = padded(channels)
        groups = channel_groups(batch, width // WIDTH)
        ghost = zeros(batch, states, width) if glast is None else _states_first(glast, width)
        gx = empty(batch, length, channels)
        gdt = empty(dt.shape)
        gz = torch.empty_like(gx) if z is not None else None
        ga, gbias, gskip = zeros(batch, states, width), zeros(batch, width), zeros(batch, width)
        gb, gc = empty(groups, batch, states, length), empty(groups, batch, states, length)
        size = selective_scan_backward.scratch_size(channels, states)
        gate, gate_at = (values(_EMPTY), _NO_VIEW) if z is None else (storage(z), view(z))
        arguments = [ctx.table, storage(x), view(x), gate, gate_at, storage(gy), view(gy), storage(dt), view(dt)]
        arguments += [values(t) for t in (a2, skip_D, b, c, delta, inner, starts, ghost)] + [storage(gdt), view(gdt)]
        arguments += [values(t) for t in (gx, _EMPTY if gz is None else gz, ga, gbias, gskip, gb, gc)]
        _run(_backward, batch * groups, groups, size, ctx.sizes, ctx.flags, arguments)
        has_bias, has_skip, has_initial = ctx.given
        real = slice(ctx.states)
        gb, gc = (g.sum(0)[:, real].transpose(1, 2) for g in (gb, gc))
        return (
            gx, gdt, ga.sum(0)[real, :channels].t(), gb, gc, gbias.sum(0)[:channels] if has_bias else None,
            gskip.sum(0)[:channels] if has_skip else None, gz,
            ghost[:, real, :channels].transpose(1, 2) if has_initial else None, None, None,
        )  # fmt: skip


def _run(kernel: Kernel, tasks: int, groups: int, scratch_size: int, sizes, flags, arguments):  # type: ignore[no-untyped-def]
    """Runs a kernel on all tasks, with scratch memory of its own for each worker."""
    run = kernel.prepare()
    scratch = empty(threads.worker_count(tasks), scratch_size).numpy()
    threads.run(tasks, lambda i, j, worker: run(i, j, groups, scratch[worker], sizes, flags, *arguments))
