"""Rows that hold several sequences: where one ends and the next begins, and one row for each.

Letters: B rows, L tokens, S sequences, M tokens of the longest one.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Rows:
    """Where each sequence lies in the packed rows.

    Attributes:
        token_SM: index into the B·L tokens; behind the end of a sequence: its last token.
        real_SM: false behind the end of a sequence.
        place_BL: index into the S·M tokens.
    """

    token_SM: Tensor
    real_SM: Tensor
    place_BL: Tensor

    def split(self, x: Tensor) -> Tensor:
        """(B,L,...) -> (S,M,...); behind the end of a sequence its last token is repeated."""
        return x.flatten(0, 1)[self.token_SM]

    def join(self, x: Tensor) -> Tensor:
        """(S,M,...) -> (B,L,...)."""
        return x.flatten(0, 1)[self.place_BL]


def rows(sequence_BL: Tensor) -> Rows:
    """One row for each sequence of a packed batch, for kernels that know no packing.

    Args:
        sequence_BL: integers; a sequence is a run of equal ones within a row.

    >>> rows(torch.tensor([[0, 0, 1, 1, 1]])).token_SM.tolist()
    [[0, 1, 1], [2, 3, 4]]
    """
    first = begins(sequence_BL)
    first[:, 0] = True
    number = (first.flatten().cumsum(0) - 1).view_as(sequence_BL)
    lengths = torch.bincount(number.flatten())
    first_token = lengths.cumsum(0) - lengths
    within = torch.arange(int(lengths.max()), device=number.device)
    token = first_token[:, None] + torch.minimum(within, lengths[:, None] - 1)
    position = torch.arange(number.numel(), device=number.device).view_as(number) - first_token[number]
    place = number * within.numel() + position
    return Rows(token, within < lengths[:, None], place)
