"""Precision strategies: fp32, tf32 and automatic mixed precision in bf16 and fp16."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, Self

import torch

from lyapft.precision.emulation import emulated_half
from lyapft.precision.flags import matmul_flags
from lyapft.precision.hardware import has_half_arithmetic
from lyapft.precision.plugins import FullPlugin, MixedPlugin

HALF_OF = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("fp32", "tf32", *HALF_OF)
EMULATE = ("auto", "never", "always")
FLOAT32 = {"storage": "float32", "operands": "float32", "accumulation": "float32", "result": "float32"}


class Settings(Protocol):
    """The fields of conf/precision that are read here."""

    name: str
    emulate: str
    init_scale: float
    growth_interval: int


def faults(cfg: Settings, device_type: str) -> list[str]:
    """Everything that keeps these settings from running on this machine, one message each."""
    found = []
    if cfg.name not in NAMES:
        found.append(f"precision={cfg.name} is unknown: use one of {', '.join(NAMES)}")
    if cfg.name == "tf32":
        found += _tf32_faults(device_type)
    if cfg.emulate not in EMULATE:
        found.append(f"precision.emulate={cfg.emulate} is unknown: use one of {', '.join(EMULATE)}")
    if cfg.emulate == "always" and device_type != "cpu":
        found.append(
            f"precision.emulate=always is for CPUs; this run is on {device_type}. "
            "Use device=cpu or precision.emulate=auto"
        )
    if not 1.0 <= cfg.init_scale <= 2.0**32:
        found.append(f"precision.init_scale={cfg.init_scale:g} must lie between 1 and 2^32: use 65536")
    if cfg.growth_interval < 1:
        found.append(f"precision.growth_interval={cfg.growth_interval} must be 1 or more updates: use 200")
    return found


def build(cfg: Settings, device_type: str) -> "Precision":
    """The strategy that `cfg` names, on "cpu" or "cuda"; call `faults` first.

    Raises:
        ValueError: settings that `faults` would have reported.
    """
    if found := faults(cfg, device_type):
        raise ValueError("; ".join(found))
    return Precision(cfg, device_type)


class Precision:
    """One cell's number formats. Enter it around training and evaluation; leaving puts the process back as it was.

    Args:
        cfg: name, emulate, init_scale, growth_interval.
        device_type: "cpu" or "cuda".

    Attributes:
        plugin: for `Trainer(plugins=[…])`, which must get no `precision=` beside it.
        emulated: half matmuls are emulated while this is entered.
        scan_format: the format that recurrences run in: fp32, bf16 or fp16.
    """

    def __init__(self, cfg: Settings, device_type: str) -> None:
        self.name = cfg.name
        self.device_type = device_type
        self.dtype = HALF_OF.get(cfg.name)
        self.emulated = self.dtype is not None and device_type == "cpu" and _wants_emulation(cfg.emulate, self.dtype)
        self.scan_format = "fp32"  # recurrences run outside autocast
        self.plugin: FullPlugin | MixedPlugin = FullPlugin()
        if self.dtype is not None:
            self.plugin = MixedPlugin(
                self.dtype,
                device_type,
                init_scale=cfg.init_scale,
                growth_interval=cfg.growth_interval,
                emulated=self.emulated,
            )
        self._entered: list[ExitStack] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(matmul_flags(tf32=self.name == "tf32"))
            if self.emulated:
                stack.enter_context(emulated_half())
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().close()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The formats of a training step's forward pass, for evaluation; usable inside the strategy and by itself."""
        with self, torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            yield

    def record(self) -> dict[str, Any]:
        """Formats per op class: how values are stored, what is multiplied, what sums run in, what comes out."""
        return {
            "requested": self.name,
            "effective": self.name,
            "emulated": self.emulated,
            "ops": _formats(self.name, self.device_type, self.emulated),
        }


def _wants_emulation(choice: str, dtype: torch.dtype) -> bool:
    return choice == "always" or (choice == "auto" and not has_half_arithmetic(dtype))


def _tf32_faults(device_type: str) -> list[str]:
    needs = "precision=tf32 needs a CUDA device of compute capability 8.0 or newer"
    if device_type != "cuda":
        place = "this run is on the CPU (device=cpu)" if torch.cuda.is_available() else "this machine has only a CPU"
        return [f"{needs}; {place}. Use precision=fp32"]
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return [f"{needs}; this one has {capability[0]}.{capability[1]}. Use precision=fp32"]
    return []


def _formats(name: str, device_type: str, emulated: bool) -> dict[str, dict[str, str]]:
    if name in ("fp32", "tf32"):
        product = FLOAT32 | {"operands": "tf32" if name == "tf32" else "float32"}
        follows, normalised = FLOAT32, FLOAT32
    else:
        half = str(HALF_OF[name]).removeprefix("torch.")
        # Stock kernels on a CPU choose by themselves; CUDA's are told, the emulation's are ours.
        known = emulated or device_type == "cuda"
        product = {"storage": half, "operands": half, "result": half}
        product["accumulation"] = "float32" if known else "chosen by torch's CPU kernels"
        as_inputs = f"{half} where an input is, else float32"
        follows = {"storage": as_inputs, "operands": as_inputs, "accumulation": "float32", "result": as_inputs}
        normalised = FLOAT32 if device_type == "cuda" else follows  # autocast's float32 list has them on CUDA only
    return {
        "matmul": product,
        "conv": product,
        "attention": product | {"scores": product["accumulation"]},
        "elementwise": follows,
        "norm/softmax": normalised,
        "recurrence scan": FLOAT32,
        "parameters": FLOAT32,
        "gradients and optimizer": FLOAT32,
    }
