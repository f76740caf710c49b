"""Rows that hold several sequences: where one ends and the next begins.

Letters: B batch, L tokens.
"""

import torch
from torch import Tensor


def begins(sequence_BL: Tensor) -> Tensor:
    """Whether a token is the first of another sequence than the one before it; never so for the first of a row.

    >>> begins(torch.tensor([[4, 4, 7, -1]])).tolist()
    [[False, False, True, True]]
    """
    result = torch.zeros_like(sequence_BL, dtype=torch.bool)
    result[:, 1:] = sequence_BL[:, 1:] != sequence_BL[:, :-1]
    return result
