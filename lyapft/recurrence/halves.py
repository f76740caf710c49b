"""The two halves of an input projection, the recurrence's input and its gate, with a gradient that is joined by rows.

Letters: B batch, L tokens, D channels.

A mixer cuts its projection, seen as (B,2D,L), in two. Autograd joins the gradients of the halves in that layout, from
kernels that wrote them as (B,L,D), and then turns the result around for the projection: two passes against the order
of memory. Where the halves are taken from the projection itself, one pass in order is left.
"""

import torch
from torch import Tensor


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole_BLD2: Tensor):  # type: ignore[no-untyped-def]
        return whole_BLD2.chunk(2, dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, first: Tensor, second: Tensor):  # type: ignore[no-untyped-def]
        return torch.cat((first, second), dim=-1)


def halves(first_BDL: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both halves (B,D,L) of what this is the first half of, None where it is no half of a projection (B,L,2D)."""
    whole = first_BDL._base
    if whole is None or not torch.is_grad_enabled() or not whole.requires_grad:
        return None
    batch, channels, length = first_BDL.shape
    if whole.shape != (batch, length, 2 * channels) or not same(first_BDL, whole[..., :channels].transpose(1, 2)):
        return None
    first, second = _Halves.apply(whole)
    return first.transpose(1, 2), second.transpose(1, 2)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers at the same place."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
