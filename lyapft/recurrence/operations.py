"""What the routed operations of a mixer share: the call that they belong to, and the functions that they stand for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from lyapft.scan import mamba_ssm

if TYPE_CHECKING:
    from lyapft.recurrence.forward import Forward


class Token(NamedTuple):
    """What a one-token update is given; names and order are transformers' and mamba-ssm's alike."""

    state: Tensor  # changed in place
    hidden_states: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    z: Tensor | None = None


class Operations:
    """Methods in place of functions that a mixer's module holds; the signatures are transformers'.

    Attributes:
        FUNCTIONS: name of a function of the module -> the method that stands for it.
        call: the forward of the layer.
    """

    FUNCTIONS: ClassVar[dict[str, str]]

    def __init__(self, call: Forward, stock: dict[str, Any]) -> None:
        self.call = call
        self._stock: dict[str, Callable[..., Any]] = {name: stock[name] for name in self.FUNCTIONS if name in stock}

    def _tuned(self, name: str) -> Tensor | None:
        """A state that a strategy registered on the mixer."""
        return getattr(self.call.layer.module, name, None)

    def _one_token(
        self, operation: str, stock: str, name: str, in_float64: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        """What takes one token after a cache: mamba-ssm's `name`, transformers' choice, or transformers' torch code.

        Args:
            stock: the function's name in transformers; in_float64: what kernel=reference runs, with its signature.
        """
        seam = self.call.seam
        kernel = seam.choose(operation, next(self.call.layer.module.parameters()).device)
        if kernel == "cpu":
            kernel = seam.only(f"{operation}, one token", "torch", "for one token there is no compiled kernel")
        seam.record(f"{operation}, one token", kernel)
        if kernel == "mamba_ssm":
            return mamba_ssm.function(name)
        if kernel == "stock":
            return self._stock[stock]
        return in_float64 if kernel == "reference" else inspect.unwrap(self._stock[stock])
