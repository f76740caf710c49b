"""Precision strategies: fp32, tf32, automatic mixed precision in bf16 and fp16, and weights stored in half."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, Self

import torch
from torch import nn

from lyapft.precision import formats
from lyapft.precision.emulation import emulated_half
from lyapft.precision.flags import matmul_flags
from lyapft.precision.hardware import has_half_arithmetic
from lyapft.precision.plugins import FullPlugin, MixedPlugin, TrueHalfPlugin
from lyapft.precision.storage import store_in

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
TRUE_HALF = {"bf16_true": torch.bfloat16, "fp16_true": torch.float16, "bf16_true_unpinned": torch.bfloat16}
NAMES = ("fp32", "tf32", *MIXED, *TRUE_HALF)
EMULATE = ("auto", "never", "always")


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
        self.dtype = (MIXED | TRUE_HALF).get(cfg.name)
        self.emulated = self.dtype is not None and device_type == "cpu" and _wants_emulation(cfg.emulate, self.dtype)
        self.scan_format = "fp32"  # recurrences run outside autocast
        self.plugin: FullPlugin | MixedPlugin = FullPlugin()
        if self.dtype is not None:
            plugin = MixedPlugin if cfg.name in MIXED else TrueHalfPlugin
            self.plugin = plugin(
                self.dtype,
                device_type,
                init_scale=cfg.init_scale,
                growth_interval=cfg.growth_interval,
                emulated=self.emulated,
            )
        self._pinned: dict[str, int] = {}
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

    def cast(self, model: nn.Module) -> None:
        """Store the model's parameters in the format of this strategy, in place; once, after adapters are attached.

        Raises:
            InputError: a weight that the format cannot hold.
        """
        if self.dtype is not None and self.name in TRUE_HALF:
            self._pinned = store_in(model, self.dtype, pin=self._pins)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The formats of a training step's forward pass, for evaluation; usable inside the strategy and by itself."""
        mixed = self.name in MIXED
        with self, torch.autocast(self.device_type, self.dtype, enabled=mixed, cache_enabled=False):
            yield

    def record(self) -> dict[str, Any]:
        """Formats per op class: how values are stored, what is multiplied, what sums run in, what comes out.

        `pinned` counts the tensors that `cast` left in float32, by kind.
        """
        return {
            "requested": self.name,
            "effective": self.name,
            "emulated": self.emulated,
            "pinned": self._pinned,
            "ops": self._formats(),
        }

    @property
    def _pins(self) -> bool:
        return not self.name.endswith("_unpinned")

    def _formats(self) -> dict[str, formats.Formats]:
        if self.dtype is None:
            return formats.full("tf32" if self.name == "tf32" else "float32")
        half = str(self.dtype).removeprefix("torch.")
        if self.name in MIXED:
            return formats.mixed(half, self.device_type, self.emulated)
        return formats.true_half(half, self.device_type, self.emulated, pinned=self._pins)


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
