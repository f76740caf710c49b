"""The causal depthwise convolution in front of every Mamba recurrence, routed.

Letters: B batch, L tokens, D channels, K taps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lyapft.recurrence.halves import halves
from lyapft.recurrence.operations import Operations
from lyapft.scan import mamba_ssm, packing

OPERATION = "causal_conv1d"


class Convolution(Operations):
    """What a mixer calls for its convolution; the signatures are transformers'."""

    FUNCTIONS = {"causal_conv1d_fn": "convolve", "causal_conv1d_update": "update"}

    @torch.compiler.disable
    def convolve(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
    ) -> Tensor:
        """Whole sequences: (B,D,L) in and out, weight (D,K); result in the dtype of the input."""
        seam = self.call.seam
        kernel = seam.choose(OPERATION, hidden_states.device)
        plain = activation in (None, "silu", "swish")
        if kernel == "cpu" and (hidden_states.dtype == torch.float64 or not plain):
            kernel = seam.instead(OPERATION, "torch", f"float32 and SiLU only, not {hidden_states.dtype}, {activation}")
        seam.record(OPERATION, kernel)
        if kernel in ("cpu", "mamba_ssm"):
            if kernel == "cpu" and (parts := halves(hidden_states)) is not None:
                hidden_states, self.call.gate = parts
            run = _compiled if kernel == "cpu" else _cuda
            return run(hidden_states, weight, bias, activation, seam.sequence)
        stock = self._stock["causal_conv1d_fn"]
        run = stock if kernel == "stock" else inspect.unwrap(stock)
        run = in_float64(run) if kernel == "reference" else run
        if seam.sequence is None:
            return run(hidden_states, weight, bias, activation=activation)
        where = packing.rows(seam.sequence)
        apart = where.split(hidden_states.transpose(1, 2)).transpose(1, 2)
        return where.join(run(apart, weight, bias, activation=activation).transpose(1, 2)).transpose(1, 2)

    @torch.compiler.disable
    def update(self, hidden_states: Tensor, *state_weight_bias: Any, **options: Any) -> Tensor:
        """One token after a cache, (B,D,1)."""
        plain = inspect.unwrap(self._stock["causal_conv1d_update"])
        take = self._one_token(OPERATION, "causal_conv1d_update", "causal_conv1d_update", in_float64(plain, state=1))
        return take(hidden_states, *state_weight_bias, **options)


def in_float64(function: Callable[..., Tensor], state: int | None = None) -> Callable[..., Tensor]:
    """The function computed in float64, outside autocast; its result in the dtype of its first argument.

    Args:
        state: position of an argument that the function changes in place.
    """

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) else value

    def run(*given: Any, **options: Any) -> Tensor:
        arguments = [wide(value) for value in given]
        with torch.autocast(given[0].device.type, enabled=False):
            result = function(*arguments, **{name: wide(value) for name, value in options.items()})
        if state is not None:
            given[state].copy_(arguments[state])
        return result.to(given[0].dtype)

    return run


def _compiled(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, sequence: Tensor | None
) -> Tensor:
    from lyapft.scan.conv import CausalConv  # needs numba

    with torch.autocast("cpu", enabled=False):
        inputs = (None if t is None else t.float() for t in (x.transpose(1, 2), weight, bias))
        y = CausalConv.apply(*inputs, activation is not None, sequence)
    return y.to(x.dtype).transpose(1, 2)


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, sequence: Tensor | None) -> Tensor:
    if sequence is not None:  # that kernel wants int32, and channels last in memory
        sequence, x = sequence.int(), x.transpose(1, 2).contiguous().transpose(1, 2)
    function = mamba_ssm.function("causal_conv1d_fn")
    return function(x, weight, bias, activation=activation, seq_idx=sequence)
