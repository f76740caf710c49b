"""The training of a cell: Lightning's trainer with the probes, guards and files of this cell, and what it proved."""

import logging
import signal
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lyapft import config, precision, ranks, records
from lyapft.cell import summary
from lyapft.cell.assembly import Assembly
from lyapft.cell.preparation import Cell
from lyapft.data import Stream, TokenDataset
from lyapft.environment import PeakMemory, warm_up
from lyapft.halving import SELECTION, Halvings, out_of_memory
from lyapft.module import IGNORED, FineTuner
from lyapft.peft import Liveness
from lyapft.probes import AdapterLiveness, AlertProbe, LyapunovProbe, ProgressBar, ShadowProbe, StepRecorder
from lyapft.records import Record
from lyapft.resume import CheckpointFiles, Resume, Signals

log = logging.getLogger(__name__)
Batch = dict[str, torch.Tensor]


def train(
    cell: Cell,
    record: Record,
    parts: Assembly,
    rows: TokenDataset | Stream,
    loggers: list[Logger],
    signals: Signals,
    halvings: Halvings,
) -> None:
    """Fit, and record what training selected, proved, cost and showed of the recurrence."""
    training = Training(cell, parts, signals, halvings, record["environment"])
    try:
        training.fit(rows, loggers)
    finally:
        record |= training.events()
    series = training.series.table()
    proven = {"proven_alive": training.liveness.proven, "stalled": training.liveness.stalled}
    record["peft"] = parts.peft.record() | proven
    record["training"] = summary.training(series, training.module.skipped_steps, config.learning_rate(cell.config))
    record["cost"] = summary.cost(series, training.memory, cell.config.trainer.accumulate)
    record["stability"] = summary.stability(series, parts.seam, parts.precision.scan_format)
    record |= summary.shadow(series)
    for probe in training.probes:
        if ranks.leads() and isinstance(probe, LyapunovProbe) and probe.spectra:
            records.save_stability(cell.folder, probe.table())
            record["files"]["stability"] = records.STABILITY


class Training:
    """One attempt at the training of a cell.

    Attributes:
        settings: of the trainer, with this process's share of a step.
        module, probes, guards: what trains, what looks on, what steps in.
        series: a row for each step. memory: its peak. liveness: the proof that every trainable tensor trains.
    """

    def __init__(
        self, cell: Cell, parts: Assembly, signals: Signals, halvings: Halvings, environment: dict[str, Any]
    ) -> None:
        self.cell, self.parts, self.signals = cell, parts, signals
        self.settings = ranks.share(cell.config.trainer)
        model, cfg = parts.backbone.model, cell.config
        self.memory = PeakMemory(model, cell.device)
        self.liveness = Liveness(model, steps=min(3, self.settings.steps))
        self.module = FineTuner(model, self.settings, config.learning_rate(cfg), parts.peft, parts.seam, halvings)
        self.probes: list[Callback] = [instantiate(node) for node in cfg.probe.values()]
        for probe in self.probes:
            if isinstance(probe, LyapunovProbe):
                probe.bind(parts.seam)
            elif isinstance(probe, ShadowProbe):
                probe.bind(parts.seam, parts.precision.autocast, partial(precision.matmul_flags, tf32=False))
        self.guards: list[Callback] = [] if cfg.guard._target_ is None else [instantiate(cfg.guard)]
        self.series = records.StepSeries(cell.folder / records.STEPS if ranks.leads() else None)
        self.files = CheckpointFiles(cell.folder, cell.id)
        every_s = self.settings.checkpoint_every_s
        self.resume = Resume(self.files, every_s, signals, parts.seam, self.memory, environment)

    def fit(self, rows: TokenDataset | Stream, loggers: list[Logger]) -> None:
        """Train from the start, or from where an earlier attempt was."""
        checkpoint = ranks.from_first(self.files.latest() if ranks.leads() else None)
        trainer = self._trainer(loggers)
        self.module.model.train()
        cfg = self.cell.config
        loader = rows.batches(cfg.trainer.batch_size, cfg.trainer.steps * cfg.trainer.accumulate, cfg.seed)
        place = ranks.place(self.settings)
        own = loader.share(place, self.module.copies)
        self.module.to(self.cell.device)
        self._warm_up(loader)
        self.memory.start()
        if checkpoint is None:
            self._prepare(loader)
        ranks.part_random_numbers(cfg.seed, place)
        continued = ", continued" if checkpoint else ""
        log.info("training %s: %d steps%s", _title(self.cell), self.settings.steps, continued)
        try:
            with self.signals.deferred():
                trainer.fit(self.module, own, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C, after it has switched the signal off
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        finally:
            self.memory.stop()
            self.parts.seam.sequence = None
            self.series.flush()

    def events(self) -> Record:
        """What happened on the way: attempts, and what probes and guards noted."""
        return {"resumed": self.resume.record()} | summary.events(self.module, self.probes, self.guards)

    def _trainer(self, loggers: list[Logger]) -> L.Trainer:
        launched = ranks.trainer_arguments(self.settings)
        return L.Trainer(
            accelerator=self.cell.device,
            plugins=[self.parts.precision.plugin, self.files, *launched.pop("plugins")],
            max_steps=self.settings.steps,
            accumulate_grad_batches=self.settings.accumulate,
            callbacks=self._callbacks(),
            logger=loggers or False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=self.settings.progress,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            **launched,
        )

    def _callbacks(self) -> list[Callback]:
        alerts = [probe for probe in self.probes if isinstance(probe, AlertProbe)]
        return [
            AdapterLiveness(self.liveness),
            *(probe for probe in self.probes if probe not in alerts),
            StepRecorder(self.series, self.settings.record_every_s),
            *alerts,  # they and guards read whole rows
            *self.guards,
            *([ProgressBar(_title(self.cell))] if self.settings.progress else []),
            self.resume,
        ]

    def _loss(self, batch: Mapping[str, torch.Tensor], of: int | None = None) -> torch.Tensor:
        with self.parts.precision.autocast():
            return self.module.loss(batch, of)

    def _prepare(self, loader: Iterable[Batch]) -> None:
        """Let the peft learn what it needs to, of batches in the parts that fit."""
        halvings = self.module.halvings

        def gradients(batch: Batch) -> None:
            whole = int((batch["labels"][:, 1:] != IGNORED).sum())
            parts = halvings.parts(batch)
            for part in parts:
                self._loss(part, whole if len(parts) > 1 else None).backward()

        halvings.doing = SELECTION
        self.parts.peft.prepare(gradients, loader)
        halvings.doing = None

    def _warm_up(self, loader: Iterable[Batch]) -> None:
        try:
            warm_up(self.module, self._loss, loader)
        except Exception as error:
            if not (self.module.halvings.allowed and out_of_memory(error)):
                raise
            self.module.zero_grad(set_to_none=True)  # the first step will meet it again, and know which step it is


def _title(cell: Cell) -> str:
    title = cell.folder.name.removesuffix(f"-{cell.id}")
    return f"{title} (reference)" if cell.role == "reference" else title
