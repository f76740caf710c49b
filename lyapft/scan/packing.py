"""Rows that hold several sequences, taken apart to one row each and joined again.

For kernels that know no packing. Letters: B rows, L tokens, S sequences, M tokens of the longest one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where each sequence lies in the packed rows.

    Attributes:
        token_SM: index into the B·L tokens; behind the end of a sequence: its last token.
        real_SM: false behind the end of a sequence.
        place_BL: index into the S·M tokens.
        first_B, last_B: the first and the last sequence of each row.
    """

    token_SM: Tensor
    real_SM: Tensor
    place_BL: Tensor
    first_B: Tensor
    last_B: Tensor

    def split(self, x: Tensor) -> Tensor:
        """(B,L,...) -> (S,M,...); behind the end of a sequence its last token is repeated."""
        return x.flatten(0, 1)[self.token_SM]

    def join(self, x: Tensor) -> Tensor:
        """(S,M,...) -> (B,L,...)."""
        return x.flatten(0, 1)[self.place_BL]


def rows(sequence_BL: Tensor) -> Rows:
    """One row for each sequence of a packed batch.

    Args:
        sequence_BL: integers; a sequence is a run of equal ones within a row.

    >>> rows(torch.tensor([[0, 0, 1, 1, 1]])).token_SM.tolist()
    [[0, 1, 1], [2, 3, 4]]
    """
    begins = torch.ones_like(sequence_BL, dtype=torch.bool)
    begins[:, 1:] = sequence_BL[:, 1:] != sequence_BL[:, :-1]
    number = (begins.flatten().cumsum(0) - 1).view_as(sequence_BL)
    lengths = torch.bincount(number.flatten())
    first_token = lengths.cumsum(0) - lengths
    within = torch.arange(int(lengths.max()), device=number.device)
    token = first_token[:, None] + torch.minimum(within, lengths[:, None] - 1)
    position = torch.arange(number.numel(), device=number.device).view_as(number) - first_token[number]
    place = number * within.numel() + position
    return Rows(token, within < lengths[:, None], place, number[:, 0], number[:, -1])


def run_apart(
    scan: Callable[..., tuple[Tensor, Tensor]],
    sequence_BL: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A scan over packed rows by one that knows no packing: (y, last state) as if each row were its sequences in turn.

    Args:
        scan: takes x, Δ, A, B, C and a first state of (S,...) rows.
        initial: the state before the first sequence of each row; the others begin with zero.
    """
    where = rows(sequence_BL)
    x, B, C = (where.split(tensor) for tensor in (x, B, C))
    real = where.real_SM.view(*where.real_SM.shape, *[1] * (delta.dim() - 2))
    delta = where.split(delta) * real  # Δ = 0 leaves the state as it is, so the last one is that of the last token
    if initial is not None:
        initial = initial.new_zeros(len(where.real_SM), *initial.shape[1:]).index_put((where.first_B,), initial)
    y, last = scan(x, delta, A, B, C, initial)
    return where.join(y), last[where.last_B]
