"""The shadow: the same batch and weights in float32, beside what the cell's number format made of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lyapft import ranks, sensitivity

if TYPE_CHECKING:
    from lyapft.module import FineTuner
    from lyapft.recurrence import Seam

Arithmetic = Callable[[], AbstractContextManager[Any]]


class ShadowProbe(Callback):
    """Every `every` steps: KL, top-1 agreement and the deviation after every block, format against float32.

    Taken before the optimizer's step, on the weights that the forward pass had, without dropout and with random states
    forked, so that training is the same to the bit. Weights that are stored in half are widened in copies. Columns:
    `shadow_kl` (nats per token), `shadow_top1` (share), `shadow_deviation` (largest of the blocks, relative) and
    `shadow_deviation/BLOCK`, `shadow_s` (seconds that it took).
    """

    def __init__(self, every: int = 20) -> None:
        """
        Args:
            every: steps between two measurements, the first at step 0.
        """
        self.every = every
        self._batch: Mapping[str, Tensor] = {}
        self._seam: Seam | None = None
        self._format: Arithmetic | None = None
        self._full: Arithmetic | None = None

    def bind(self, seam: Seam, arithmetic: Arithmetic, full: Arithmetic) -> None:
        """Observe this model, trained in `arithmetic()`, beside `full()` precision."""
        self._seam, self._format, self._full = seam, arithmetic, full

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hear of batches that go through the model in parts."""
        cast("FineTuner", pl_module).watchers.append(self._keep)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Keep the micro-batch: the last of a step is the one that is measured."""
        self._keep(batch)

    def _keep(self, batch: Mapping[str, Tensor]) -> None:
        self._batch = batch

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure, before the weights change."""
        if trainer.global_step % self.every or self._format is None or self._full is None:
            return
        module = cast("FineTuner", pl_module)
        model = module.model
        if module.device.type == "cuda":  # the backward pass that is still running is no cost of the shadow
            torch.cuda.synchronize()
        started = time.perf_counter()
        with _unwatched(self._seam):
            found = sensitivity.shadow(
                model,
                self._batch["input_ids"],
                self._batch["attention_mask"],
                self._format,
                full=self._full,
                weights=_widened(model),
                **module.token_arguments(self._batch),
            )
        names = [name for name, _ in sensitivity.residual_blocks(model)]
        deviation = found.deviation_N.tolist()
        numbers = {
            "shadow_kl": found.kl,
            "shadow_top1": found.top1_agreement,
            "shadow_deviation": max(deviation),
            **{f"shadow_deviation/{name}": value for name, value in zip(names, deviation, strict=True)},
            "shadow_s": time.perf_counter() - started,
        }
        module.observed |= ranks.from_last(numbers)


def _widened(model: nn.Module) -> dict[str, Tensor]:
    """Float32 copies of the weights that are stored in half.

    They stand in for the model's own during one pass: a copy of the model would have a seam of its own, which knows
    nothing of the batch, and would hold the gradients twice.
    """
    stored = model.named_parameters()
    return {name: p.detach().float() for name, p in stored if p.is_floating_point() and p.element_size() < 4}


@contextmanager
def _unwatched(seam: Seam | None) -> Iterator[None]:
    """The forward passes inside are neither shown to other probes nor recorded as the training's."""
    if seam is None:
        yield
        return
    kept = seam.tap, seam.input_tap, seam.sequence, dict(seam.kernels), dict(seam.fallbacks)
    seam.tap = seam.input_tap = None
    try:
        yield
    finally:
        seam.tap, seam.input_tap, seam.sequence, seam.kernels, seam.fallbacks = kept
