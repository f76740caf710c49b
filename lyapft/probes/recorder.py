"""What a step said, into the step series, the loggers and the progress bar."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from lyapft.records import StepSeries

if TYPE_CHECKING:
    from lyapft.module import FineTuner


class StepRecorder(Callback):
    """One row per optimizer step: into the step series, and to the loggers.

    Put it behind the probes, whose numbers it reads in `FineTuner.observed`, and before alerts and guards, which read
    its own and may end the training. The seconds of a shadow are no part of a step's time.
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
        elapsed = time.perf_counter() - self._started - observed.get("shadow_s", 0.0)
        observed["step_s"] = elapsed
        observed["tokens_per_s"] = observed["tokens"] / elapsed
        self.series.append({"step": trainer.global_step, **observed})
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in observed.items()}, step=trainer.global_step)
        if time.perf_counter() - self._flushed > self.flush_every_s:
            self.flush()

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.series.packed(), "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the rows of a checkpoint; later ones will come again."""
        self.series.unpack(state_dict["rows"])
        self._last_step = state_dict["last_step"]

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
