"""Rows that hold several sequences, taken apart to one row each and joined again.

For kernels that know no packing. Letters: B rows, L tokens, S sequences, M tokens of the longest one, D channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where each sequence lies in the packed rows.

    Attributes:
        token_SM: index into the B·L tokens; of padding: the sequence's last token.
        place_BL: index into the S·M tokens.
    """

    token_SM: Tensor
    place_BL: Tensor

    def split(self, x_BLD: Tensor) -> Tensor:
        """(B,L,D) -> (S,M,D); behind the end of a sequence its last token is repeated."""
        return x_BLD.flatten(0, 1)[self.token_SM]

    def join(self, x_SMD: Tensor) -> Tensor:
        """(S,M,D) -> (B,L,D)."""
        return x_SMD.flatten(0, 1)[self.place_BL]


def starts(sequence_BL: Tensor) -> Tensor:
    """(B,L) booleans: the first token of each sequence, where the index differs from the one before it in the row."""
    first = torch.ones_like(sequence_BL, dtype=torch.bool)
    first[:, 1:] = sequence_BL[:, 1:] != sequence_BL[:, :-1]
    return first


def rows(sequence_BL: Tensor) -> Rows:
    """One row for each sequence of a packed batch.

    Args:
        sequence_BL: integers; a sequence is a run of equal ones within a row.

    >>> rows(torch.tensor([[0, 0, 1, 1, 1]])).token_SM.tolist()
    [[0, 1, 1], [2, 3, 4]]
    """
    number = starts(sequence_BL).flatten().cumsum(0) - 1
    lengths = torch.bincount(number)
    first = lengths.cumsum(0) - lengths
    longest = int(lengths.max())
    within = torch.arange(longest, device=number.device).clamp(max=lengths[:, None] - 1)
    token = first[:, None] + within
    place = number * longest + torch.arange(number.numel(), device=number.device) - first[number]
    return Rows(token, place.view_as(sequence_BL))
