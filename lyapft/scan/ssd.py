"""Chunked state space duality (Mamba-2) as batched matrix products, forward and backward.

Letters: B batch, L tokens, H heads, P head dim, G groups (K = H/G heads share B and C), N states; C chunks of T tokens.

With s the sum of ΔA from the first token of a chunk up to a token, and S (N,K·P) the states that it starts from, a
chunk is (Dao & Gu 2024, §6)

    y_i = Σ_{j≤i} (C_i·B_j) exp(s_i - s_j) Δ_j x_j + exp(s_i) C_i S
    S'  = Σ_j exp(s_T - s_j) B_jᵀ Δ_j x_j + exp(s_T) S

The forward pass keeps its inputs and the states at chunk boundaries; the backward pass recomputes the T×T matrices. B
and C stay one matrix per group, never one per head. s is summed in float64 and subtracted as a sum of two numbers of
the inputs' format, so that one large |ΔA| does not swallow the small ones that follow it.
What is not finite reaches every token of its chunk, earlier ones too: its product with a weight of zero is not zero.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# T, here and in the compiled kernel, whose matrices of one head then fit a core's level-2 cache. At P = N = 64 the
# matrices of a chunk and its states take the same memory.
CHUNK = 64
_FORGET = -1e3  # added to ΔA where a sequence begins: its exponential is 0 in every float format


class _Chunks(NamedTuple):
    """The inputs in chunks, and how much of what is written where is left when it is read."""

    x: Tensor  # (B,C,G,T,K,P)
    delta: Tensor  # (B,C,G,T,K)
    written: Tensor  # Δx by head, (B,C,G,K,T,P)
    B: Tensor  # (B,C,G,T,N)
    C: Tensor
    decay: Tensor  # exp(s_i - s_j) for j <= i, else 0, (B,C,G,K,T,T)
    weights: Tensor  # (C_i·B_j) exp(s_i - s_j)
    to_token: Tensor  # exp(s_i): from the start of the chunk, (B,C,G,T,K,1)
    to_end: Tensor  # exp(s_T - s_j)
    lasting: Tensor  # Δ_j exp(s_T - s_j)
    through: Tensor  # exp(s_T), (B,C,G,1,K,1)


def _split(tensor: Tensor, chunk: int, groups: int) -> Tensor:
    """(B,L,H or G,...) -> (B,C,G,T,K or 1,...), zeros after the last token."""
    pad = -tensor.shape[1] % chunk
    if pad:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
    return tensor.reshape(tensor.shape[0], -1, chunk, groups, tensor.shape[2] // groups, *tensor.shape[3:]).movedim(
        3, 2
    )


def _join(tensor: Tensor, length: int) -> Tensor:
    """The inverse of _split."""
    joined = tensor.movedim(2, 3).flatten(3, 4).flatten(1, 2)
    return joined[:, :length].contiguous()


def _prepare(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int, begins_BL: Tensor | None
) -> _Chunks:
    groups, dtype = B.shape[2], x.dtype
    log_decay = delta.double() * A.double()
    if begins_BL is not None:
        log_decay = log_decay + _FORGET * begins_BL[..., None]
    s = _split(log_decay, chunk, groups).cumsum(3)  # (B,C,G,T,K), <= 0
    x, delta, B, C = (_split(t, chunk, groups) for t in (x, delta, B, C))
    B, C = B.squeeze(4), C.squeeze(4)
    decay = _differences(s.transpose(3, 4).contiguous(), dtype).exp_().tril_()
    weights = (C @ B.transpose(-1, -2)).unsqueeze(3) * decay
    end = s[:, :, :, -1:]
    to_token, to_end, through = (distance.to(dtype).exp()[..., None] for distance in (s, end - s, end))
    lasting, written = delta[..., None] * to_end, _by_head(x, delta)
    return _Chunks(x, delta, written, B, C, decay, weights, to_token, to_end, lasting, through)


def _differences(s: Tensor, dtype: torch.dtype) -> Tensor:
    """s_i - s_j, (...,T) float64 -> (...,T,T), as good as rounded once, without a matrix in float64.

    With s = a + b, a its rounding to dtype and b what that lost: |a_i - a_j| loses one rounding of the result at most,
    and b_i - b_j gives back what the roundings of s did to it.
    """
    high = s.to(dtype)
    low = (s - high).to(dtype)
    matrix = high[..., :, None] - high[..., None, :]
    return matrix.add_(low[..., :, None]).sub_(low[..., None, :])


def _by_head(tensor: Tensor, factor: Tensor | None = None) -> Tensor:
    """(B,C,G,T,K,P) -> contiguous (B,C,G,K,T,P), times a factor (B,C,G,T,K)."""
    turned = tensor.transpose(3, 4)
    if factor is None:
        return turned.contiguous()
    return torch.mul(turned, factor.transpose(3, 4)[..., None], out=tensor.new_empty(turned.shape))


def _carried(written: Tensor, through: Tensor, state: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """(states before each chunk, state after all) of state' = through·state + written, over the chunks in order.

    written (B,C,G,N,K,P), through (B,C,G,1,K,1), state (B,G,N,K,P).
    """
    before = torch.empty_like(written)
    parts = range(written.shape[1])[:: -1 if reverse else 1]
    before[:, parts[0]] = state
    for part, following in pairwise(parts):
        torch.addcmul(written[:, part], through[:, part], before[:, part], out=before[:, following])
    last = parts[-1]
    return before, torch.addcmul(written[:, last], through[:, last], before[:, last])


class _ChunkedSSD(torch.autograd.Function):
    """`chunked_ssd`, and its gradients; states are (N,K,P), so that one product serves all heads of a group."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, initial, chunk, begins):  # type: ignore[no-untyped-def]
        batch, length, heads, dim = x.shape
        groups, states = B.shape[2:]
        c = _prepare(x, delta, A, B, C, chunk, begins)
        sizes = heads // groups, dim
        written = c.B.transpose(-1, -2) @ (c.x * c.lasting).flatten(4)
        if initial is None:
            start = x.new_zeros(batch, groups, states, *sizes)
        else:
            start = initial.reshape(batch, groups, *sizes, states).movedim(-1, 2)
        starts, last = _carried(written.unflatten(-1, sizes), c.through, start)
        y = (c.C @ starts.flatten(4)).unflatten(-1, sizes).mul_(c.to_token)
        y += (c.weights @ c.written).transpose(3, 4)
        ctx.save_for_backward(x, delta, A, B, C, starts)
        ctx.chunk, ctx.begins, ctx.given = chunk, begins, initial is not None
        return _join(y, length), last.movedim(2, -1).reshape(batch, heads, dim, states).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast):  # type: ignore[no-untyped-def]
        x, delta, A, B, C, starts = ctx.saved_tensors
        batch, length, heads, dim = gy.shape
        groups, sizes = starts.shape[2], starts.shape[4:]
        c = _prepare(x, delta, A, B, C, ctx.chunk, ctx.begins)
        gy = _split(gy, ctx.chunk, groups)
        gy_by_head = _by_head(gy)
        reading = gy * c.to_token
        arriving = (c.C.transpose(-1, -2) @ reading.flatten(4)).unflatten(-1, sizes)
        glast = glast.reshape(batch, groups, *sizes, -1).movedim(-1, 2)
        ends, gstate = _carried(arriving, c.through, glast, reverse=True)

        gwritten = (c.B @ ends.flatten(4)).unflatten(-1, sizes).mul_(c.to_end)
        to_end = (gwritten * c.x).sum(-1) * c.delta  # of each token's write, by way of the state after the chunk
        gwritten += (c.weights.transpose(-1, -2) @ gy_by_head).transpose(3, 4)
        from_start = (reading * (c.C @ starts.flatten(4)).unflatten(-1, sizes)).sum(-1)
        through = c.through[..., 0] * (ends * starts).sum((3, 5)).unsqueeze(3)

        gweights = gy_by_head @ c.written.transpose(-1, -2)
        between = c.weights.mul_(gweights)  # of what was written at j and read at i
        gscores = gweights.mul_(c.decay).sum(3)
        gC = gscores @ c.B + reading.flatten(4) @ starts.flatten(4).transpose(-1, -2)
        gB = gscores.transpose(-1, -2) @ c.C + (c.x * c.lasting).flatten(4) @ ends.flatten(4).transpose(-1, -2)

        glog = _gradient_of_log_decays(between, from_start, to_end, through)
        gx, gdelta = _join(gwritten * c.delta[..., None], length), _join((gwritten * c.x).sum(-1), length)
        glog = _join(glog, length)
        gA = (glog * delta).sum((0, 1))
        gB, gC = (_join(g.unsqueeze(4), length) for g in (gB, gC))
        gstart = gstate.movedim(2, -1).reshape(batch, heads, dim, -1) if ctx.given else None
        return gx, gdelta.addcmul_(glog, A), gA, gB, gC, gstart, None, None


def _gradient_of_log_decays(between: Tensor, from_start: Tensor, to_end: Tensor, through: Tensor) -> Tensor:
    """Gradients of Δ_t A, (B,C,G,T,K): each is what all passed through the decay of token t.

    What was written at j and read at i passed those of j < t <= i; what came from the start of the chunk to i those of
    t <= i; what went from j to its end those of j < t; what went through all. Sums only, so that nothing cancels.

    Args:
        between: (B,C,G,K,T,T), i by j. from_start, to_end: (B,C,G,T,K). through: (B,C,G,1,K).
    """
    written = to_end.cumsum(3) + between.cumsum(-1).tril_(-1).sum(-2).transpose(3, 4)  # at j <= t - 1, read at i >= t
    passed = from_start.flip(3).cumsum(3).flip(3) + through
    passed[:, :, :, 1:] += written[:, :, :, :-1]
    return passed


def chunked_ssd(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    initial_BHPN: Tensor | None,
    chunk: int,
    begins_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_BLHP and the last state of h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ, y_t = h_t C_t; differentiable once.

    The state starts anew from zero where begins_BL is true.
    """
    chunk = min(chunk, x_BLHP.shape[1])
    return _ChunkedSSD.apply(x_BLHP, delta_BLH, A_H, B_BLGN, C_BLGN, initial_BHPN, chunk, begins_BL)
