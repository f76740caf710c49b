"""Which dimensions of a recurrence to train, and tensors of which only some entries do.

Letters: D channels, N states, H heads, G groups, I inputs. An index counts the entries of a flattened tensor.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lyapft.peft.memory_buffer import blocks
from lyapft.peft.mixers import is_selective_scan


def dimensions_of_a_scan(change_DN: Tensor, channels: float, states: float) -> tuple[Tensor, Tensor]:
    """The channels with the largest ‖change‖, and in each the states with the largest |change|.

    Args:
        change_DN: of A, over a warm-up.
        channels, states: shares to select, in (0, 1]; at least one of each.
    Returns:
        channels (d,), and states (d, n), the largest first.

    >>> dimensions_of_a_scan(torch.tensor([[0.0, 0.1], [2.0, 1.0], [3.0, -4.0]]), channels=2 / 3, states=0.5)
    (tensor([2, 1]), tensor([[1],
            [0]]))
    """
    D, N = change_DN.shape
    chosen = change_DN.square().sum(1).topk(count(channels, D)).indices
    return chosen, change_DN[chosen].abs().topk(count(states, N)).indices


def entries(mixer: nn.Module, change_A: Tensor, change_OI: Tensor, channels: float, states: float) -> list[Tensor]:
    """Indices into A_log and into the weight whose rows make B and C, of the dimensions that changed most.

    Mamba-1: `dimensions_of_a_scan` of A_log (D, N), and for B and C all states of those channels. Mamba-2: the heads
    whose A (H,) changed most; for B and C, which are made from the layer's input, the states whose two rows did.
    """
    span, inputs = rows_of_b_and_c(mixer), change_OI.shape[1]
    if is_selective_scan(mixer):
        columns, of_each = dimensions_of_a_scan(change_A, channels, states)
        decay = columns[:, None] * change_A.shape[1] + of_each
        lines = torch.arange(span.start, span.stop, device=change_OI.device)
    else:
        decay = change_A.abs().topk(count(channels, len(change_A))).indices
        of_b, of_c = change_OI[span].square().sum(1).chunk(2)
        chosen = (of_b + of_c).topk(count(states, len(of_b))).indices
        lines = span.start + torch.cat([chosen, chosen + len(of_b)])
        columns = torch.arange(inputs, device=change_OI.device)
    return [decay.flatten(), (lines[:, None] * inputs + columns).flatten()]


def rows_of_b_and_c(mixer: nn.Module) -> slice:
    """B's rows of the mixer's projection, then C's."""
    sizes = blocks(mixer, tied=False)
    before = list(sizes)[: list(sizes).index("B")]
    start = sum(sizes[name] for name in before)
    return slice(start, start + sizes["B"] + sizes["C"])


def count(share: float, of: int) -> int:
    """How many of so many a share is; at least one."""
    return max(1, round(share * of))


class Selected(nn.Module):
    """A parametrization: a tensor of which some entries train and the rest is frozen.

    Attributes:
        values: the entries that train.
        index: which they are.
        open: the tensor is its original, all of it.
    """

    index: Tensor

    def __init__(self, original: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.values = nn.Parameter(original.detach().flatten()[index])
        self.open = False

    def forward(self, original: Tensor) -> Tensor:
        """The tensor with its trained entries."""
        if self.open:
            return original
        return original.flatten().index_copy(0, self.index, self.values.to(original.dtype)).view_as(original)

    def select(self, index: Tensor, original: Tensor) -> None:
        """Let other entries train, from the values that they have in the original."""
        with torch.no_grad():
            self.index.copy_(index)
            self.values.copy_(original.flatten()[index])


class Place(NamedTuple):
    """A tensor of a module of which entries are selected."""

    module: nn.Module
    name: str

    def put(self, index: Tensor) -> None:
        """Let some of its entries train, and no other."""
        original = cast(nn.Parameter, getattr(self.module, self.name)).requires_grad_(False)
        parametrize.register_parametrization(self.module, self.name, Selected(original, index))

    @property
    def original(self) -> nn.Parameter:
        """The tensor without what was trained."""
        return cast(nn.Parameter, self._parametrizations.original)

    @property
    def selected(self) -> Selected:
        """Which entries train, and their values."""
        return cast(Selected, self._parametrizations[0])

    def settle(self) -> None:
        """Write the trained entries into the tensor, an ordinary one again.

        torch takes the property off the module's class, which a copy of the module shares: give it its own first.
        """
        shared = type(self.module)
        members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        self.module.__class__ = type(shared.__name__, shared.__bases__, members)
        parametrize.remove_parametrizations(self.module, self.name, leave_parametrized=True)

    @property
    def _parametrizations(self) -> parametrize.ParametrizationList:
        return cast(parametrize.ParametrizationList, self.module.parametrizations[self.name])  # type: ignore[index]
