"""Means over the real tokens of a batch. Letters: B batch, L tokens, C anything."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def check_tokens(tokens_B: Tensor) -> None:
    """
    Raises:
        ValueError: a sequence without a real token.
    """
    if not bool(tokens_B.all()):
        empty = torch.nonzero(tokens_B == 0).flatten().tolist()
        raise ValueError(f"sequences {empty} have no real token: drop empty rows first")


def real_tokens(mask_BL: Tensor) -> Tensor:
    """Tokens per sequence.

    Raises:
        ValueError: a sequence without a real token.
    """
    tokens_B = mask_BL.sum(1)
    check_tokens(tokens_B)
    return tokens_B


def mean_over_tokens(x_BLC: Tensor, mask_BL: Tensor) -> Tensor:
    """(B, ...) means over real tokens; what stands at padding is never read, so it may be infinite.

    >>> mean_over_tokens(torch.tensor([[1.0, 3.0, torch.inf]]), torch.tensor([[1, 1, 0]]))
    tensor([2.])
    """
    tokens_B = real_tokens(mask_BL)
    padding = ~mask_BL.bool().reshape(*mask_BL.shape, *[1] * (x_BLC.dim() - 2))
    total = x_BLC.masked_fill(padding, 0).sum(1)
    return total / tokens_B.reshape(-1, *[1] * (total.dim() - 1))
