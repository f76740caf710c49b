"""Lightning precision plugins that say whether the last update was skipped and what the loss scale is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.plugins.precision import Precision as LightningPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lyapft.precision import emulation


class FullPlugin(LightningPrecision):
    """Float32 throughout; never scales, never skips."""

    precision = "32-true"
    last_step_skipped: bool = False
    loss_scale: float | None = None


class MixedPlugin(MixedPrecision):
    """torch.autocast over float32 weights, and for float16 a GradScaler, on any device.

    Lightning's `precision="16-mixed"` trains in bf16 on a CPU; the plugin given as an object does not. Around one step
    Lightning scales the loss, unscales the gradients, clips them, and lets the scaler withhold the update if one is
    not finite.

    Args:
        dtype: torch.bfloat16 or torch.float16.
        device_type: "cpu" or "cuda".
        init_scale: first loss scale (float16).
        growth_interval: updates without overflow before the scale doubles (float16).
        emulated: half matmuls are emulated; training outside `emulated_half` is then refused.
    """

    def __init__(
        self, dtype: torch.dtype, device_type: str, *, init_scale: float, growth_interval: int, emulated: bool
    ) -> None:
        scaler = None
        if dtype == torch.float16:
            scaler = torch.amp.GradScaler(device_type, init_scale=init_scale, growth_interval=growth_interval)
        super().__init__("16-mixed" if dtype == torch.float16 else "bf16-mixed", device_type, scaler)
        self.emulated = emulated
        self.last_step_skipped = False

    @property
    def loss_scale(self) -> float | None:
        """The scale that the next loss is multiplied by; None where losses are not scaled."""
        return None if self.scaler is None else float(self.scaler.get_scale())

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """One update, or none: a scale that shrank is GradScaler's public sign that it withheld this one."""
        before = self.loss_scale
        output = super().optimizer_step(optimizer, model, closure, **kwargs)
        after = self.loss_scale
        self.last_step_skipped = before is not None and after is not None and (after < before or after == 0.0)
        return output

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast for one forward pass."""
        self._check_emulation()
        with super().forward_context():
            yield

    def _check_emulation(self) -> None:
        if self.emulated and not emulation.is_active():
            raise RuntimeError("half matmuls are recorded as emulated: run this plugin inside `with build(...)`")


class TrueHalfPlugin(MixedPlugin):
    """Weights stored in half, without float32 masters: no autocast, the dtype of a weight is that of its operation.

    bfloat16: torch's fused AdamW as it is, so gradients and moments are stored like their weight and the update is
    rounded to it. float16: gradients arrive in float32 (`Tensor.grad_dtype`), so that a GradScaler accepts and unscales
    them without loss; moments are float32 as well, as squares of gradients below 2e-4 underflow in float16 and AdamW
    would divide by zero. Nothing else keeps a float32 copy of a weight.
    The default dtype is left alone, unlike in Lightning's HalfPrecision: kernels make float32 scratch memory.
    """

    def connect(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        """Give float16 weights float32 gradients and moments, before the first step."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                weights = [p for p in group["params"] if p.dtype == torch.float16]
                for weight in weights:
                    weight.grad_dtype = torch.float32
                    optimizer.state[weight] = _float32_moments(weight)
                if weights:
                    group["fused"] = group["foreach"] = False  # these want one dtype; the plain loop promotes
        return super().connect(model, optimizers, lr_schedulers)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """One forward pass, in the formats that the weights have."""
        self._check_emulation()
        yield


def _float32_moments(weight: Tensor) -> dict[str, Tensor]:
    """The state that torch's AdamW starts from, which it would make in the weight's format."""
    moment = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.preserve_format)
    return {"step": torch.tensor(0.0), "exp_avg": moment, "exp_avg_sq": moment.clone()}
