"""The shadow: the same batch and weights in float32, beside what the cell's number format made of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lyapft import sensitivity

if TYPE_CHECKING:
    from lyapft.module import FineTuner
    from lyapft.recurrence import Seam

Arithmetic = Callable[[], AbstractContextManager[Any]]


class ShadowProbe(Callback):
    """Every `every` steps: KL, top-1 agreement and the deviation after every block, format against float32.

    Taken before the optimizer's step, on the weights that the forward pass had, without dropout and with random states
    forked, so that training is the same to the bit. Weights that are stored in half are widened in a copy. Columns:
    `shadow_kl` (nats per token), `shadow_top1` (share), `shadow_deviation` (largest of the blocks, relative) and
    `shadow_deviation/BLOCK`, `shadow_s` (seconds that it took).
    """

    def __init__(self, every: int = 20) -> None:
        """
        Args:
            every: steps between two measurements, the first at step 0.
        """
        self.every = every
        self._batch: dict[str, Tensor] = {}
        self._seam: Seam | None = None
        self._format: Arithmetic | None = None
        self._full: Arithmetic | None = None

    def bind(self, seam: Seam, arithmetic: Arithmetic, full: Arithmetic) -> None:
        """Observe this model, trained in `arithmetic()`, beside `full()` precision."""
        self._seam, self._format, self._full = seam, arithmetic, full

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Keep the micro-batch: the last of a step is the one that is measured."""
        self._batch = batch

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure, before the weights change."""
        if trainer.global_step % self.every or self._format is None or self._full is None:
            return
        module, started = cast("FineTuner", pl_module), time.perf_counter()
        model = module.model
        with _unwatched(self._seam):
            wide = _widened(model)
            found = sensitivity.shadow(
                model,
                self._batch["input_ids"],
                self._batch["attention_mask"],
                self._format,
                full=self._full,
                wide=wide,
                **module.token_arguments(self._batch),
            )
        names = [name for name, _ in sensitivity.residual_blocks(model)]
        deviation = found.deviation_N.tolist()
        module.observed |= {
            "shadow_kl": found.kl,
            "shadow_top1": found.top1_agreement,
            "shadow_deviation": max(deviation),
            **{f"shadow_deviation/{name}": value for name, value in zip(names, deviation, strict=True)},
            "shadow_s": time.perf_counter() - started,
        }


def _widened(model: nn.Module) -> nn.Module:
    """The model, or, where weights are stored in half, a copy in float32."""
    half = any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())
    return copy.deepcopy(model).float() if half else model


@contextmanager
def _unwatched(seam: Seam | None) -> Iterator[None]:
    """The forward passes inside are neither shown to other probes nor recorded as the training's."""
    if seam is None:
        yield
        return
    kept = seam.tap, seam.sequence, dict(seam.kernels), dict(seam.fallbacks)
    seam.tap = None
    try:
        yield
    finally:
        seam.tap, seam.sequence, seam.kernels, seam.fallbacks = kept
