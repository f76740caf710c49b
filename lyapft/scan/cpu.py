"""Autograd around the compiled selective scan: layouts, scratch memory and gradients.

Letters: B batch, L tokens, D channels, N states. All tensors are float32 on the CPU.
"""

import torch

from lyapft.scan import selective_scan_cpu as kernels
from lyapft.scan import threads
from lyapft.scan.compiled import Kernel
from lyapft.scan.layout import channel_groups, dense, flat, lanes_last, padded, view
from lyapft.scan.simd import LOG2E, WIDTH

_forward = Kernel("selective scan, forward", kernels.make_forward, kernels.FORWARD_SIGNATURE)
_backward = Kernel("selective scan, backward", kernels.make_backward, kernels.BACKWARD_SIGNATURE)
_EMPTY = torch.zeros(1)
_NO_VIEW = (0, 0, 0, 0)


class FusedSelectiveScan(torch.autograd.Function):
    """y = (scan(x, Δ, A, B, C) + skip·x)·silu(z), Δ = softplus(dt + bias) or dt; returns (y, last state, Δ)."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, bias, skip, z, initial, softplus, sequence=None):  # type: ignore[no-untyped-def]
        batch, length, channels = x.shape
        states, width = A.shape[1], padded(channels)
        B, C = B.contiguous(), C.contiguous()
        a2 = lanes_last(A.t() * LOG2E, width)
        bias_D = torch.zeros(width) if bias is None else lanes_last(bias, width)
        skip_D = torch.zeros(width) if skip is None else lanes_last(skip, width)
        start = torch.zeros(batch, states, width) if initial is None else lanes_last(initial.transpose(1, 2), width)
        keep = any(ctx.needs_input_grad)
        y, final = torch.empty(batch, length, channels), torch.empty(batch, states, width)
        delta = torch.empty_like(y) if softplus else _EMPTY
        inner = torch.empty_like(y) if keep and z is not None else _EMPTY
        chunks = -(-length // kernels.CHUNK)
        starts = torch.empty(batch, chunks, states, width) if keep else _EMPTY
        flags = (softplus, z is not None, keep)
        sizes = (batch, length, channels, states)
        groups = channel_groups(batch, width // WIDTH)
        tasks = batch * groups
        scratch = torch.empty(threads.worker_count(tasks), kernels.forward_scratch(channels, states))
        gate, gate_at = (flat(_EMPTY), _NO_VIEW) if z is None else (flat(z), view(z))
        arguments = [flat(x), view(x), flat(dt), view(dt), gate, gate_at]
        arguments += [flat(t) for t in (bias_D, a2, skip_D, start)] + [flat(B.detach()), flat(C.detach())]
        offsets = [view(t)[0] for t in (B, C)]
        assert not any(offsets), "contiguous copies start at 0"
        arguments += [flat(t) for t in (y, delta, inner, starts, final)]
        run_forward = _forward.prepare()
        threads.run(tasks, lambda i, j, w: run_forward(i, j, groups, scratch[w].numpy(), sizes, flags, *arguments))
        ctx.save_for_backward(x, dt, B, C, z, a2, skip_D, delta, inner, starts)
        ctx.flags, ctx.sizes = flags, sizes
        ctx.given = bias is not None, skip is not None, initial is not None
        last = final[..., :channels].transpose(1, 2).contiguous()
        shown = delta if softplus else dt.detach()
        ctx.mark_non_differentiable(shown)
        return y, last, shown

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast, _):  # type: ignore[no-untyped-def]
        x, dt, B, C, z, a2, skip_D, delta, inner, starts = ctx.saved_tensors
        batch, length, channels, states = ctx.sizes
        width = padded(channels)
        groups = channel_groups(batch, width // WIDTH)
        ghost = torch.zeros(batch, states, width) if glast is None else lanes_last(glast.transpose(1, 2), width)
        gx = torch.empty(batch, length, channels)
        gdt = torch.empty_strided(dt.shape, dt.stride()) if dense(dt) else torch.empty(dt.shape)
        gz = torch.empty_like(gx) if z is not None else None
        ga, gbias, gskip = torch.zeros(batch, states, width), torch.zeros(batch, width), torch.zeros(batch, width)
        gb, gc = torch.empty(groups, batch, length, states), torch.empty(groups, batch, length, states)
        tasks = batch * groups
        scratch = torch.empty(threads.worker_count(tasks), kernels.backward_scratch(channels, states))
        gate, gate_at = (flat(_EMPTY), _NO_VIEW) if z is None else (flat(z), view(z))
        arguments = [flat(x), view(x), gate, gate_at, flat(gy), view(gy), flat(dt), view(dt)]
        arguments += [flat(t) for t in (a2, skip_D, B, C, delta, inner, starts, ghost)] + [flat(gdt), view(gdt)]
        arguments += [flat(t) for t in (gx, _EMPTY if gz is None else gz, ga, gbias, gskip, gb, gc)]
        run_backward = _backward.prepare()
        threads.run(
            tasks, lambda i, j, w: run_backward(i, j, groups, scratch[w].numpy(), ctx.sizes, ctx.flags, *arguments)
        )
        has_bias, has_skip, has_initial = ctx.given
        return (
            gx, gdt, ga.sum(0)[:, :channels].t(), gb.sum(0), gc.sum(0), gbias.sum(0)[:channels] if has_bias else None,
            gskip.sum(0)[:channels] if has_skip else None, gz, ghost[..., :channels].transpose(1, 2) if has_initial
            else None, None, None,
        )  # fmt: skip
