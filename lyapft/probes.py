"""Callbacks that observe a training run and never change it.

`LyapunovProbe` measures the recurrent state, `AdapterLiveness` proves that every trainable tensor learns,
`StepRecorder` writes the step series, `ProgressBar` shows it. Probes leave their numbers in `FineTuner.observed`; no
mathematics lives here.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import Tensor

from lyapft import lyapunov
from lyapft.records import StepSeries
from lyapft.scan import packing

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lyapft.module import FineTuner
    from lyapft.peft import Liveness
    from lyapft.recurrence import Layer, Seam


class LyapunovProbe(Callback):
    """λ_max, margin, norms and neutral zones of every recurrent layer at every step, from the Δ of the forward pass.

    Each layer's Δ is reduced when the tap shows it, while it is still in the cache, and is not kept. Over the
    micro-batches of one optimizer step, and over layers, the maximum of each number (the worst) is reported.

    Attributes:
        profiles: layer -> the last measured micro-batch per sequence and per token.
    """

    def __init__(self, every: int = 1, per_layer: bool = True) -> None:
        """
        Args:
            every: steps between two measurements.
            per_layer: report each layer besides the whole model.
        """
        self.every = every
        self.per_layer = per_layer
        self._seam: Seam | None = None
        self._mask = torch.empty(0)
        self._packed: Tensor | None = None  # (S,M) tokens of the sequences of a packed batch
        self._worst: dict[str, list[float]] = {}
        self.profiles: dict[str, lyapunov.Profile] = {}

    def bind(self, seam: Seam) -> None:
        """Observe the recurrence of this model."""
        self._seam = seam

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the tap on the steps that are measured."""
        if self._seam is None or not self._seam.layers:
            return
        self.profiles = {}
        self._mask, self._packed = batch["attention_mask"], None
        if "sequence" in batch:
            self._unpack(packing.rows(batch["sequence"]))
        self._seam.tap = self._reduce if trainer.global_step % self.every == 0 else None

    def _unpack(self, rows: packing.Rows) -> None:
        """λ is per sequence: one row for each of a packed batch, padding left out."""
        mask_SM = rows.split(self._mask) * rows.real_SM
        kept = mask_SM.any(1)
        self._mask, self._packed = mask_SM[kept], rows.token_SM[kept]

    def _reduce(self, layer: Layer, delta: Tensor, A: Tensor) -> None:
        if self._packed is not None:
            delta = delta.flatten(0, 1)[self._packed]
        self.profiles[layer.name] = lyapunov.stability_profile(delta, A, self._mask)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Take over what the layers said, with one copy to the host."""
        if self._seam is None or not self.profiles:
            return
        self._seam.tap = None
        module = cast("FineTuner", pl_module)
        numbers = torch.stack([profile.numbers for profile in self.profiles.values()]).tolist()
        if batch_idx % module.settings.accumulate == 0:
            self._worst = {}
        for name, row in zip(self.profiles, numbers, strict=True):
            self._worst[name] = [max(pair) for pair in zip(row, self._worst.get(name, row), strict=True)]
        module.observed.update(self._summary())

    def _summary(self) -> dict[str, float]:
        worst = [max(column) for column in zip(*self._worst.values(), strict=True)]
        summary = _named(worst, "")
        if self.per_layer:
            for name, numbers in self._worst.items():
                summary |= _named(numbers, f"/{name}")
        return summary


def _named(numbers: list[float], suffix: str) -> dict[str, float]:
    named = {f"{field}{suffix}": number for field, number in zip(lyapunov.FIELDS, numbers, strict=True)}
    return named | {f"margin{suffix}": -named[f"lambda_max{suffix}"]}


class AdapterLiveness(Callback):
    """Stops the run if a trainable tensor got no finite, non-zero gradient in the first steps, or none were taken."""

    def __init__(self, liveness: Liveness) -> None:
        self.liveness = liveness

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Look at the gradients until every tensor has shown life."""
        self.liveness.observe_gradients()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge, once enough steps were really taken."""
        taken = trainer.global_step - cast("FineTuner", pl_module).skipped_steps
        self.liveness.verdict(taken)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so where the steps were too few, or too many of them withheld, for a proof."""
        self.liveness.verdict_at_end(trainer.global_step - cast("FineTuner", pl_module).skipped_steps)
        if stalled := self.liveness.stalled:
            log.warning(
                "%d half weights never moved: every update rounds to nothing; the record names them", len(stalled)
            )
        elif not self.liveness.proven:
            log.warning("too few updates to prove that every trainable tensor learns; the record says so")


class StepRecorder(Callback):
    """One row per optimizer step: into the step series, and to the loggers.

    Put it last among the callbacks: it reads what the others left in `FineTuner.observed`.
    """

    def __init__(self, series: StepSeries, flush_every_s: float) -> None:
        self.series = series
        self.flush_every_s = flush_every_s
        self._started = self._flushed = time.perf_counter()
        self._last_step = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the step's clock."""
        if batch_idx % cast("FineTuner", pl_module).settings.accumulate == 0:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the row once the optimizer has stepped."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        observed = cast("FineTuner", pl_module).observed
        elapsed = time.perf_counter() - self._started
        observed["step_s"] = elapsed
        observed["tokens_per_s"] = observed["tokens"] / elapsed
        self.series.append({"step": trainer.global_step, **observed})
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in observed.items()}, step=trainer.global_step)
        if time.perf_counter() - self._flushed > self.flush_every_s:
            self.flush()

    def flush(self) -> None:
        """Write the series so far."""
        self.series.flush()
        self._flushed = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the whole series."""
        self.flush()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what was measured before the failure."""
        self.flush()


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, tokens/s and λ_max of the present step."""

    def __init__(self, title: str) -> None:
        # A terminal sees every change; a log file or a pipe gets a line now and then.
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 50)
        self.title = title

    def init_train_tqdm(self) -> Any:
        """The stock bar under the cell's name."""
        bar = super().init_train_tqdm()
        bar.set_description(self.title)
        return bar

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The stock text counts epochs; a cell has one pass of a set number of steps."""
        self.train_progress_bar.reset(int(trainer.num_training_batches))
        self.train_progress_bar.initial = 0
        self.train_progress_bar.set_description(self.title)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What the bar shows beside its count."""
        observed = cast("FineTuner", pl_module).observed
        shown: dict[str, int | str | float | dict[str, float]] = {"loss": f"{observed.get('loss', float('nan')):.3f}"}
        if "tokens_per_s" in observed:
            shown["tok/s"] = f"{observed['tokens_per_s']:.0f}"
        if "lambda_max" in observed:
            shown["λ_max"] = f"{observed['lambda_max']:.2e}"
        return shown
