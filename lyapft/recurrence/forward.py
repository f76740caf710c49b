"""A mixer's own forward, bound to one instance, with the functions of its recurrence routed.

A mixer of transformers calls its recurrence through functions of its own module (`mamba_selective_scan`,
`mamba2_chunk_scan`, `causal_conv1d_fn`, ...). `Forward` runs the same code with other globals, in which these names
are methods that know the layer. No modelling code is copied, and the class and its other instances are untouched.
torch.compile breaks its graph at these methods, which choose, record and call compiled code; the rest it compiles.
"""

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lyapft.recurrence.convolution import Convolution
from lyapft.recurrence.seam import Layer, Seam
from lyapft.recurrence.selective_scan import SelectiveScan
from lyapft.recurrence.ssd import SSD

# family -> what its mixers call; each class maps names of transformers' functions to its methods
FAMILIES: dict[str, type[SelectiveScan] | type[SSD]] = {"selective_scan": SelectiveScan, "ssd": SSD}


def family_of(module: nn.Module) -> str | None:
    """The recurrence family that a module's own forward calls, None for any other module."""
    for family, operations in FAMILIES.items():
        if calls(module, operations.SCAN):
            return family
    return None


def calls(module: nn.Module, name: str) -> bool:
    """Whether the forward of the module's class names this global function."""
    function = inspect.unwrap(type(module).forward)
    return name in getattr(getattr(function, "__code__", None), "co_names", ()) and name in function.__globals__


class Forward:
    """Callable in place of `mixer.forward`.

    Attributes:
        layer, seam: what it routes, and by which rules.
        gate: the (B,D,L) gate of the present call, from the half that the convolution left; None where it is not known.
        mask: the (B,L) mask of the present call, 0 where a token is padding; None where all are real.
    """

    def __init__(self, layer: Layer, seam: Seam) -> None:
        self.layer, self.seam = layer, seam
        self.gate: Tensor | None = None
        self.mask: Tensor | None = None
        self._function = self._routed()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.mask = kwargs.get("attention_mask")
        try:
            return self._function(self.layer.module, *args, **kwargs)
        finally:
            self.gate = None

    def _routed(self) -> Callable:
        outer = type(self.layer.module).forward
        stock = inspect.unwrap(outer).__globals__
        operations = [FAMILIES[self.layer.family](self, stock), Convolution(self, stock)]
        replaced = {n: getattr(o, method) for o in operations for n, method in o.FUNCTIONS.items() if n in stock}
        return with_globals(outer, replaced)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forward":
        seam = copy.deepcopy(self.seam, memo)
        layer = Layer(self.layer.name, self.layer.family, copy.deepcopy(self.layer.module, memo))
        seam.layers.append(layer)
        return Forward(layer, seam)

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "seam": self.seam}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.gate = self.mask = None
        self._function = self._routed()


def with_globals(function: Callable, replaced: dict[str, Callable]) -> Callable:
    """The same code with some globals replaced; decorators that wrap it by functools.wraps are rebuilt around it."""
    assert isinstance(function, types.FunctionType)
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        names = {**function.__globals__, **replaced}
        code = function.__code__.replace()  # its own: torch.compile keeps what it compiled by code, not by globals
        return types.FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    rebound = with_globals(inner, replaced)
    cells = tuple(types.CellType(rebound) if c.cell_contents is inner else c for c in function.__closure__ or ())
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
