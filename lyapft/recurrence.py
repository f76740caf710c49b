"""The seam: routes the recurrence of one transformers model to a kernel, and shows its step sizes to a probe.

A mixer of transformers calls its recurrence through functions of its own module (`mamba_selective_scan`,
`mamba2_chunk_scan`, `causal_conv1d_fn`, ...). `install` gives each mixer *instance* a forward that is the same code
with other globals, in which these names are closures that know the layer. No modelling code is copied, another model
of the class is untouched, and `Seam.remove` deletes the one attribute that was added. Fused short-cuts, which read
weights raw and so pass adapters by, return None: the mixer then takes its unfused path, on which projections are
called as modules.

Letters: B batch, L tokens, D channels, N states, H heads, P head dim, G groups, K convolution taps.
"""

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyapft import scan
from lyapft.errors import InputError

KERNELS = ("auto", "reference", "cpu", "torch", "stock")
# family -> the function that a mixer of it calls on whole sequences
FAMILIES = {"selective_scan": "mamba_selective_scan", "ssd": "mamba2_chunk_scan"}
CONVOLUTION = "causal_conv1d_fn"
# Parameters that a mixer may hold besides its own: h_0, and h' in y_t = C_t (h_t + h')
INITIAL_STATE, STATE_OFFSET = "initial_state", "state_offset"
RECORDED_SCAN = {"cpu": "cpu-numba", "torch": "torch", "reference": "reference-float64"}
FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")
# recurrences that carry a state and have no adapter here: a function that the forward calls, or the name of the class
UNKNOWN_FUNCTIONS = frozenset(
    {
        "torch_chunk_gated_delta_rule",
        "chunk_gated_delta_rule",
        "chunk_kimi_delta_attention",
        "fused_recurrent_gated_delta_rule",
    }
)
UNKNOWN_CLASSES = frozenset(
    {"RwkvSelfAttention", "RecurrentGemmaRglru", "xLSTMLayer", "MiniMaxLightningAttention", "Mamba3Mixer"}
)


class Layer(NamedTuple):
    """One recurrent mixer of a model."""

    name: str
    family: str
    module: nn.Module


Tap = Callable[[Layer, Tensor, Tensor], None]


class Seam:
    """What `install` did to a model.

    Attributes:
        layers: the recurrent layers, in the order of the model.
        kernels: operation -> implementation that really ran, filled by the forward passes.
        unknown: names of modules with a recurrence that no adapter here knows; they run their own code, untapped.
        tap: None, or called on each full-sequence forward with the layer, detached float32 Δ after bias, softplus and
            clamp, (B,L,D) or (B,L,H), and A, (D,N) or (H,). Not called again when gradient checkpointing recomputes.
    """

    def __init__(self, kernel: str, require: str | None) -> None:
        self.kernel, self.require = kernel, require
        self.layers: list[Layer] = []
        self.kernels: dict[str, str] = {}
        self.unknown: list[str] = []
        self.tap: Tap | None = None

    def remove(self) -> None:
        """Give every layer its own forward back; a second call does nothing."""
        for layer in self.layers:
            if isinstance(layer.module.__dict__.get("forward"), _Forward):
                del layer.module.forward

    def choose(self, family: str, device: torch.device) -> str:
        """The kernel for tensors on a device: reference, cpu, torch or stock."""
        kernel = self.kernel
        if kernel == "auto":
            kernel = "stock" if device.type != "cpu" else "torch" if scan.available()["cpu"] else "cpu"
        if kernel == "cpu" and device.type not in ("cpu", "meta"):
            raise InputError(f"kernel.name=cpu cannot run {family} on {device.type}: use kernel.name=auto")
        if self.require is not None and kernel != self.require:
            raise InputError(
                f"kernel.require={self.require}, but {family} on {device.type} would run kernel {kernel!r}"
                f" (kernel.name={self.kernel}): set kernel.name={self.require}, or drop kernel.require"
            )
        return kernel

    def reads_raw(self, layer: Layer) -> frozenset[str]:
        """Names of the layers of a mixer whose weight the kernel that will run reads as a matrix, without a call."""
        return frozenset({"dt_proj", "conv1d"} if layer.family == "selective_scan" else {"conv1d"})

    def record(self, operation: str, implementation: str) -> None:
        """Note what ran; two implementations of one operation are both kept."""
        known = self.kernels.get(operation)
        if known is None:
            self.kernels[operation] = implementation
        elif implementation not in known.split(" + "):
            self.kernels[operation] = f"{known} + {implementation}"

    def show(self, layer: Layer, delta: Tensor, A: Tensor) -> None:
        """Hand Δ and A to the tap, unless this is a recomputation inside backward."""
        if self.tap is not None and torch._C._current_graph_task_id() == -1:
            self.tap(layer, delta.detach().float(), A.detach().float())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Seam":
        """The seam of a copied model: same kernels, no tap; its layers enter as they are copied."""
        other = Seam(self.kernel, self.require)
        other.kernels, other.unknown = dict(self.kernels), list(self.unknown)
        memo[id(self)] = other
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tap": None}


def resolve(kernel: str, require: str | None, device_type: str) -> str:
    """The kernel that recurrences would run on a device ("cpu" or "cuda"): reference, cpu, torch or stock.

    Raises:
        InputError: an unknown or unavailable kernel, or another than the required one.
    """
    _check_choice(kernel, require)
    return Seam(kernel, require).choose("the recurrence", torch.device(device_type))


def _check_choice(kernel: str, require: str | None) -> None:
    for field, value in (("kernel.name", kernel), ("kernel.require", require or "auto")):
        if value not in KERNELS:
            raise InputError(f"{field}={value!r} is unknown: choose one of {', '.join(KERNELS)}")
    reason = scan.available().get(kernel)
    if reason:
        raise InputError(f"kernel.name={kernel} cannot run here: {reason}. Use kernel.name=torch or auto.")


def install(model: nn.Module, kernel: str = "auto", require: str | None = None) -> Seam:
    """Route the recurrence of every mixer of this model through the kernel.

    Args:
        model: a transformers model, wrapped by peft or not.
        kernel: "auto" (compiled on a CPU, plain torch where numba is absent, the model's own function elsewhere),
        "reference",
            "cpu", "torch", or "stock" for the model's own function everywhere.
        require: refuse, when it would run, any other kernel than this one.
    Returns:
        a Seam; without layers for a model that has no recurrence.
    Raises:
        InputError: an unknown or unavailable kernel; a mixer that already has a forward of its own.
    """
    _check_choice(kernel, require)
    seam = Seam(kernel, require)
    for name, module in model.named_modules():
        family = _family(module)
        if family == "unknown":
            seam.unknown.append(name)
        elif family is not None:
            if "forward" in module.__dict__:
                raise InputError(
                    f"layer {name} already has a forward of its own (a seam, or accelerate's hooks): remove it first"
                )
            seam.layers.append(Layer(name, family, module))
    first = next(model.parameters(), None)
    for layer in seam.layers:
        if first is not None:
            seam.choose(layer.family, first.device)
        layer.module.forward = _Forward(layer, seam)
    return seam


def _family(module: nn.Module) -> str | None:
    function = inspect.unwrap(type(module).forward)
    names = function.__code__.co_names if hasattr(function, "__code__") else ()
    for family, called in FAMILIES.items():
        if called in names and called in function.__globals__:
            return family
    unknown = UNKNOWN_FUNCTIONS.intersection(names) or type(module).__name__ in UNKNOWN_CLASSES
    return "unknown" if unknown else None


class _Forward:
    """A mixer's forward, bound to its instance, with the recurrence's functions replaced."""

    def __init__(self, layer: Layer, seam: Seam) -> None:
        self.layer, self.seam = layer, seam
        self._function = self._rebound()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.layer.module, *args, **kwargs)

    def _rebound(self) -> Callable:
        outer = type(self.layer.module).forward
        stock = inspect.unwrap(outer).__globals__
        replaced: dict[str, Callable] = {name: _none for name in FUSED if name in stock}
        called = FAMILIES[self.layer.family]
        make = _selective_scan if self.layer.family == "selective_scan" else _ssd
        replaced[called] = make(self.layer, self.seam, stock[called])
        if CONVOLUTION in stock:
            replaced[CONVOLUTION] = _causal_conv(self.layer, self.seam, stock[CONVOLUTION])
        return _with_globals(outer, replaced)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        seam = copy.deepcopy(self.seam, memo)
        layer = Layer(self.layer.name, self.layer.family, copy.deepcopy(self.layer.module, memo))
        seam.layers.append(layer)
        return _Forward(layer, seam)

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "seam": self.seam}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._function = self._rebound()


def _with_globals(function: Callable, replaced: dict[str, Callable]) -> Callable:
    """The same code with some globals replaced; decorators that wrap it by functools.wraps are rebuilt around it."""
    assert isinstance(function, types.FunctionType)
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        names = {**function.__globals__, **replaced}
        return types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
    rebound = _with_globals(inner, replaced)
    cells = tuple(types.CellType(rebound) if c.cell_contents is inner else c for c in function.__closure__ or ())
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)


def _none(*_: Any, **__: Any) -> None:
    """In place of a fused kernel: nothing was computed, take the unfused path."""


def _selective_scan(layer: Layer, seam: Seam, stock: Callable) -> Callable:
    def mamba_selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        """(B,D,L) in and out, B and C (B,N,L); float32 whatever autocast says, result in the dtype of the input."""
        kernel = seam.choose("selective_scan", hidden_states.device)
        start, offset = (getattr(layer.module, name, None) for name in (INITIAL_STATE, STATE_OFFSET))
        kernel = kernel if start is None and offset is None else "torch"
        if kernel == "stock":
            if seam.tap is not None:
                with torch.autocast(hidden_states.device.type, enabled=False):
                    seam.show(layer, _step_sizes(dt.transpose(1, 2), delta_bias, delta_softplus), A)
            seam.record("selective_scan", "stock")
            given = {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
            return stock(hidden_states, dt, A, B, C, **given, return_last_state=return_last_state, **kwargs)
        if kernel == "cpu" and hidden_states.dtype == torch.float64:
            if seam.require == "cpu":
                raise InputError("kernel.require=cpu, but that kernel is float32 and the model is float64: use torch")
            kernel = "torch"
        run = _scan_fused if kernel == "cpu" else _scan_plain
        x, u, b, c = (t.transpose(1, 2) for t in (hidden_states, dt, B, C))
        with torch.autocast(hidden_states.device.type, enabled=False):
            if start is None and offset is None:
                y, last, delta = run(kernel, x, u, A, b, c, D, z, delta_bias, delta_softplus)
            else:
                delta = _step_sizes(u, delta_bias, delta_softplus)
                start = None if start is None else start.expand(len(x), -1, -1)
                y, last = scan.selective_scan(x.to(delta.dtype), delta, A, b, c, start, kernel=kernel)
                y = y if offset is None else y + c.to(y.dtype) @ offset.T
                y = y if D is None else y + x * D
                y = y if z is None else y * F.silu(z.transpose(1, 2).to(y.dtype))
        seam.record("selective_scan", RECORDED_SCAN[kernel])
        seam.show(layer, delta, A)
        y = y.to(hidden_states.dtype).transpose(1, 2)
        return (y, last.to(hidden_states.dtype)) if return_last_state else y

    return mamba_selective_scan


def _causal_conv(layer: Layer, seam: Seam, stock: Callable) -> Callable:
    def causal_conv1d_fn(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
    ) -> Tensor:
        """(B,D,L) in and out, weight (D,K); float32 inside, result in the dtype of the input."""
        packed = any(value is not None for value in kwargs.values())  # several sequences in a row: not known here
        plain = activation in (None, "silu", "swish") and hidden_states.dtype != torch.float64
        if packed or not plain or seam.choose(layer.family, hidden_states.device) != "cpu":
            seam.record("causal_conv1d", "stock")
            return stock(hidden_states, weight, bias, activation, **kwargs)
        from lyapft.scan.conv import CausalConv  # needs numba

        with torch.autocast("cpu", enabled=False):
            inputs = (None if t is None else t.float() for t in (hidden_states.transpose(1, 2), weight, bias))
            y = CausalConv.apply(*inputs, activation is not None)
        seam.record("causal_conv1d", "cpu-numba")
        return y.to(hidden_states.dtype).transpose(1, 2)

    return causal_conv1d_fn


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Δ in float32 (float64 stays): softplus(dt + bias), the channel last."""
    dt = dt if dt.dtype == torch.float64 else dt.float()
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _scan_fused(kernel, x, dt, A, B, C, skip, z, bias, softplus):  # type: ignore[no-untyped-def]
    from lyapft.scan.cpu import FusedSelectiveScan  # needs numba

    if bias is not None and not softplus:
        dt, bias = dt + bias, None
    gate = None if z is None else z.transpose(1, 2)
    tensors = (None if t is None else t.float() for t in (x, dt, A, B, C, bias, skip, gate))
    return FusedSelectiveScan.apply(*tensors, None, softplus)


def _scan_plain(kernel, x, dt, A, B, C, skip, z, bias, softplus):  # type: ignore[no-untyped-def]
    delta = _step_sizes(dt, bias, softplus)
    x = x.to(delta.dtype)
    y, last = scan.selective_scan(x, delta, A, B, C, kernel=kernel)
    if skip is not None:
        y = y + x * skip
    if z is not None:
        y = y * F.silu(z.transpose(1, 2).to(y.dtype))
    return y, last, delta


def _ssd(layer: Layer, seam: Seam, stock: Callable) -> Callable:
    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """(B,L,H,P) in and out; float32 whatever autocast says, as the stock function, and like it returns float32."""
        kernel = seam.choose("ssd", hidden_states.device)
        start, offset = (getattr(layer.module, name, None) for name in (INITIAL_STATE, STATE_OFFSET))
        if start is not None and initial_states is None:
            initial_states = start.expand(len(hidden_states), -1, -1, -1)
        with torch.autocast(hidden_states.device.type, enabled=False):
            if kernel != "stock" or seam.tap is not None:
                delta = _step_sizes(dt, dt_bias, dt_softplus).clamp(*dt_limit)
                seam.show(layer, delta, A)
            if kernel != "stock":
                x = hidden_states.to(delta.dtype)
                y, last = scan.ssd(x, delta, A, B, C, initial_states, kernel=kernel)
                seam.record("ssd", {"reference": "reference-float64"}.get(kernel, "torch-chunked"))
                if offset is not None:
                    per_head = C.repeat_interleave(x.shape[2] // C.shape[2], 2).to(y.dtype)
                    y = y + torch.einsum("blhn,hpn->blhp", per_head, offset)
                y = y if D is None else y + x * D[:, None]
                return (y, last) if return_final_states else y
        seam.record("ssd", "stock")
        given = {"D": D, "dt_bias": dt_bias, "initial_states": initial_states, "dt_softplus": dt_softplus}
        return stock(
            hidden_states,
            dt,
            A,
            B,
            C,
            chunk_size,
            **given,
            dt_limit=dt_limit,
            return_final_states=return_final_states,
            **kwargs,
        )

    return mamba2_chunk_scan
