"""What the seam knows of one model: its recurrent layers, which kernel runs each operation, and who is watching."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lyapft import scan
from lyapft.errors import InputError
from lyapft.scan import mamba_ssm

log = logging.getLogger(__name__)

KERNELS = ("auto", "reference", "cpu", "torch", "mamba_ssm", "stock")
IMPLEMENTATION = {"reference": "reference-float64", "cpu": "cpu-numba"}  # how records name what ran; others as chosen
# Parameters that a strategy may register on a mixer; shapes (D, N) of a selective scan, (H, P, N) of an SSD.
INITIAL_STATE = "initial_state"  # h_0, the state before the first token
STATE_OFFSET = "state_offset"  # h', added where the output reads the state: y_t = C_t (h_t + h')


class Layer(NamedTuple):
    """One recurrent mixer of a model; family is "selective_scan" or "ssd"."""

    name: str
    family: str
    module: nn.Module


Tap = Callable[[Layer, Tensor, Tensor], None]
InputTap = Callable[[Layer, Tensor, Tensor, Tensor, Tensor], None]


class Seam:
    """What `install` did to a model.

    Attributes:
        device: where the model will run; None: where it is.
        layers: the recurrent layers, in the order of the model.
        kernels: operation -> implementation that really ran, filled by the forward passes.
        fallbacks: operation -> why another kernel ran than the preferred one.
        unknown: names of modules with a recurrence that no adapter here knows; they run their own code, untapped.
        sequence: None, or (B,L) integers: the sequence that each token of the present batch belongs to, where rows are
            packed. State and convolution start anew wherever it changes. Leave it set until backward is over.
        tap: None, or called on each full-sequence forward with the layer, detached float32 Δ after bias, softplus and
            clamp, (B,L,D) or (B,L,H), and A, (D,N) or (H,). Not called again when gradient checkpointing recomputes.
        input_tap: None, or called before each scan that no kernel fuses with the layer, u, Δ, A and B: what the state
            is computed from; u (B,L,D) or (B,L,H,P), B (B,L,N) or (B,L,G,N). For experiments, not for training.
    """

    def __init__(
        self, kernel: str, require: str | None = None, fused: bool = True, device: torch.device | None = None
    ) -> None:
        self.kernel, self.require, self.fused, self.device = kernel, require, fused, device
        self.layers: list[Layer] = []
        self.kernels: dict[str, str] = {}
        self.fallbacks: dict[str, str] = {}
        self.unknown: list[str] = []
        self.sequence: Tensor | None = None
        self.tap: Tap | None = None
        self.input_tap: InputTap | None = None
        self._looked_at: tuple[Tensor | None, bool] = (None, False)

    def remove(self) -> None:
        """Give every layer its own forward back; a second call does nothing."""
        for layer in self.layers:
            layer.module.__dict__.pop("forward", None)

    def choose(self, operation: str, device: torch.device) -> str:
        """The kernel for tensors on a device: reference, cpu, torch, mamba_ssm or stock.

        Args:
            operation: "selective_scan", "ssd" or "causal_conv1d".
        Raises:
            InputError: the chosen kernel cannot run there, or is not the required one.
        """
        kernel = self.kernel
        if kernel == "auto":
            kernel = self._automatic(operation, device)
        elif kernel == "cpu" and device.type not in ("cpu", "meta"):
            raise InputError(f"kernel=cpu cannot run {operation} on {device.type}: use kernel=auto")
        elif kernel == "mamba_ssm" and (reason := mamba_ssm.missing(operation, device.type)):
            if operation == "causal_conv1d":  # a package of its own, and the convolution is no recurrence
                return self.instead(operation, "torch", reason)
            raise InputError(f"kernel=mamba_ssm cannot run {operation} here: {reason}. Or use kernel=auto")
        self._check(operation, kernel, f"on {device.type} kernel={self.kernel} means it")
        return kernel

    def instead(self, operation: str, kernel: str, reason: str) -> str:
        """Run another kernel than the preferred one: said once, recorded, refused under `kernel.require`."""
        self._check(operation, kernel, reason)
        if operation not in self.fallbacks:
            self.fallbacks[operation] = f"{kernel}: {reason}"
            log.warning("%s runs kernel %s: %s", operation, kernel, reason)
        return kernel

    def only(self, operation: str, kernel: str, reason: str) -> str:
        """Run the one kernel that an operation has, slower or not than what was asked for: only `require` minds."""
        self._check(operation, kernel, reason)
        return kernel

    def apart(self, layer: Layer, mask: Tensor | None) -> str | None:
        """Why one kernel may not do convolution, recurrence and output projection of this layer at once, if so.

        Not where the state is tuned, which needs the state's outputs; nor with padding on the left: a fused kernel
        does not hide padding from the state after the convolution.
        """
        if any(hasattr(layer.module, name) for name in (INITIAL_STATE, STATE_OFFSET)):
            return "a tuned state is not known to the fused kernel"
        return "padding on the left would reach the state" if self._starts_with_padding(mask) else None

    def unfused(self, operation: str, reason: str) -> None:
        """Run the parts of a fused kernel apart, which takes longer: said once, and recorded."""
        name = f"{operation}, fused"
        if name not in self.fallbacks:
            self.fallbacks[name] = f"unfused: {reason}"
            log.warning("%s runs unfused: %s", operation, reason)

    def reads_raw(self, layer: Layer) -> frozenset[str]:
        """Names of the layer's modules whose weight is read as a matrix, so that calling them is bypassed."""
        device = self.device or next(layer.module.parameters()).device
        raw = {"conv1d"} | ({"dt_proj"} if layer.family == "selective_scan" else set())
        if self.fused and self.choose(layer.family, device) in ("mamba_ssm", "stock"):
            raw |= {"x_proj", "out_proj"}
        return frozenset(name for name in raw if isinstance(getattr(layer.module, name, None), nn.Module))

    def record(self, operation: str, implementation: str) -> None:
        """Note what ran; two implementations of one operation are both kept."""
        name = IMPLEMENTATION.get(implementation, implementation)
        known = self.kernels.get(operation)
        if known is None:
            self.kernels[operation] = name
        elif name not in known.split(" + "):
            self.kernels[operation] = f"{known} + {name}"

    def watched(self) -> bool:
        """Whether Δ and A of this forward pass are wanted: somebody taps, and backward is not recomputing it."""
        return self.tap is not None and torch._C._current_graph_task_id() == -1

    def show(self, layer: Layer, delta: Tensor, A: Tensor) -> None:
        """Hand Δ and A to the tap."""
        if self.tap is not None and self.watched():
            self.tap(layer, delta.detach().float(), A.detach().float())

    def _automatic(self, operation: str, device: torch.device) -> str:
        if device.type in ("cpu", "meta"):
            return self.instead(operation, "torch", reason) if (reason := scan.available()["cpu"]) else "cpu"
        reason = mamba_ssm.missing(operation, device.type)
        return self.instead(operation, "torch", reason) if reason else "mamba_ssm"

    def _check(self, operation: str, kernel: str, reason: str) -> None:
        if self.require not in (None, "auto", kernel):
            raise InputError(
                f"kernel.require={self.require}, but {operation} would run kernel {kernel!r} ({reason}): "
                + (
                    f"set kernel={self.require}, or drop kernel.require"
                    if self.kernel != self.require
                    else "drop kernel.require, or change what it cannot do"
                )
            )

    def _starts_with_padding(self, mask: Tensor | None) -> bool:
        if mask is None:
            return False
        if self._looked_at[0] is not mask:  # all layers get the same mask: on CUDA each look waits for the device
            self._looked_at = (mask, not bool(mask[:, 0].all()))
        return self._looked_at[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Seam":
        """The seam of a copied model: same kernels, no tap, no batch; its layers enter as they are copied."""
        other = Seam(self.kernel, self.require, self.fused, self.device)
        other.kernels, other.fallbacks, other.unknown = dict(self.kernels), dict(self.fallbacks), list(self.unknown)
        memo[id(self)] = other
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tap": None, "input_tap": None, "sequence": None, "_looked_at": (None, False)}
