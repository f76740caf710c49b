"""Selective scan in plain torch, forward and backward: any device, any float format of at least 32 bits, no compiler.

Letters: B batch, L tokens, D channels, N states; T tokens per chunk. As in the compiled kernel, the forward pass
keeps the states at chunk boundaries and the backward pass recomputes the rest, so memory grows with L·D·N/T.
"""

import torch
from torch import Tensor

CHUNK = 16


def _decays(delta_BTD: Tensor, A_DN: Tensor, begins_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """(e, near): exp(ΔA) - 1 with near = 1 where exp(ΔA) is close to 1, else exp(ΔA) with near = 0.

    A decay close to 1 is kept as its distance from 1, whose rounding does not add up over the memory of the state.
    Where a sequence begins the decay is 0.
    """
    x = delta_BTD[..., None] * A_DN
    if begins_BT is not None:
        x.masked_fill_(begins_BT[..., None, None], -torch.inf)
    near = (x >= -0.35) & (x <= 0)
    return torch.where(near, torch.expm1(x), torch.exp(x)), near.to(x.dtype)


def _chunk_states(
    delta: Tensor, A: Tensor, u: Tensor, B: Tensor, start: Tensor, begins: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """States after each token of a chunk, (B,T,D,N), and the decays that made them."""
    e, near = _decays(delta, A, begins)
    increment = (delta * u)[..., None] * B[:, :, None, :]
    states, h = [], start
    for t in range(delta.shape[1]):
        h = torch.addcmul(increment[:, t], e[:, t], h) + near[:, t] * h
        states.append(h)
    return torch.stack(states, dim=1), e, near


class TorchSelectiveScan(torch.autograd.Function):
    """(y, last state) = scan(u, Δ, A, B, C, initial state), the state anew from zero where begins_BL is true."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, initial, begins=None):  # type: ignore[no-untyped-def]
        h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1]) if initial is None else initial
        starts, outputs = [], []
        for t in range(0, u.shape[1], CHUNK):
            part = slice(t, t + CHUNK)
            starts.append(h)
            states, _, _ = _chunk_states(
                delta[:, part], A, u[:, part], B[:, part], h, None if begins is None else begins[:, part]
            )
            outputs.append(torch.einsum("btdn,btn->btd", states, C[:, part]))
            h = states[:, -1].contiguous()
        ctx.save_for_backward(u, delta, A, B, C, torch.stack(starts))
        ctx.begins, ctx.given = begins, initial is not None
        return torch.cat(outputs, dim=1), h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast):  # type: ignore[no-untyped-def]
        u, delta, A, B, C, starts = ctx.saved_tensors
        gh, gA = glast, torch.zeros_like(A)
        gu, gdelta, gB, gC = (torch.empty_like(t) for t in (u, delta, B, C))
        for chunk in range(starts.shape[0] - 1, -1, -1):
            part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            d, x, b, start = delta[:, part], u[:, part], B[:, part], starts[chunk]
            begins = None if ctx.begins is None else ctx.begins[:, part]
            states, e, near = _chunk_states(d, A, x, b, start, begins)
            gC[:, part] = torch.einsum("btd,btdn->btn", gy[:, part], states)
            arriving = gy[:, part, :, None] * C[:, part, None, :]
            at, before = [], []  # gradients of h_t and, times the decay, of what h_{t-1} becomes
            for t in range(d.shape[1] - 1, -1, -1):
                gh = gh + arriving[:, t]
                at.append(gh)
                gh = e[:, t] * gh + near[:, t] * gh
                before.append(gh)
            g, decayed = torch.stack(at[::-1], dim=1), torch.stack(before[::-1], dim=1)
            gx = decayed * torch.cat([start[:, None], states[:, :-1]], dim=1)  # gradient of the exponent ΔA
            gA += torch.einsum("btdn,btd->dn", gx, d)
            gb = torch.einsum("btdn,btn->btd", g, b)
            gB[:, part] = torch.einsum("btdn,btd->btn", g, d * x)
            gu[:, part] = gb * d
            gdelta[:, part] = gb * x + torch.einsum("btdn,dn->btd", gx, A)
        return gu, gdelta, gA, gB, gC, gh if ctx.given else None, None
