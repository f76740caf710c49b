"""One cell: validate, build, fit, evaluate, record, compare with its full-precision counterparts.

Everything that can be wrong with the input is found before a weight is loaded. A cell that finished is never run
again; one that failed or was interrupted leaves its record and is run again by the same command.
"""

import errno
import logging
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
import transformers
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from lyapft import backbone, config, dashboard, data, divergence, precision, records, recurrence, tasks
from lyapft.environment import PeakMemory, describe, resolve_device, resolve_threads
from lyapft.errors import InputError
from lyapft.module import FineTuner, NonFiniteTrainingError
from lyapft.peft import Liveness, LivenessError
from lyapft.peft import faults as peft_faults
from lyapft.probes import AdapterLiveness, LyapunovProbe, ProgressBar, StepRecorder
from lyapft.records import Record

log = logging.getLogger(__name__)
_failed_references: dict[str, Record] = {}  # of this process: a sweep tries each of them once
WARM_UP_STEPS = 5  # left out of tokens/s: caches, allocators and compilation settle


class CellFailed(CompactHydraException):
    """A cell did not finish; the message says why, its record and log keep the details."""


@dataclass(frozen=True)
class Cell:
    """A validated config with everything that its identity depends on.

    Attributes:
        config: the resolved config.
        science: the part that can change numbers, inputs by content.
        id: hash of `science`.
        folder: runs/STUDY/NAME-ID.
        device: `cpu` or `cuda`; threads: CPU threads.
        source, task: where its examples come from, and what it is scored on; both read and checked.
        role: `cell` or `reference` (made because another cell needed it).
    """

    config: DictConfig
    science: dict[str, Any]
    id: str
    folder: Path
    device: str
    threads: int
    source: data.Source
    task: tasks.Task
    role: str

    @property
    def study(self) -> Path:
        """The folder of the study."""
        return self.folder.parent


def prepare(cfg: DictConfig, role: str = "cell", like: Cell | None = None) -> Cell:
    """Check a config and give it its identity; loads no weights.

    Args:
        cfg: a resolved config.
        role: `cell` or `reference`.
        like: a cell of the same data and task, whose input need not be read again.
    Raises:
        InputError: everything that is wrong with it, at once.
    """
    device, found = resolve_device(cfg.device)
    kernel = Checked(lambda: recurrence.resolve(cfg.kernel.name, cfg.kernel.require, device))
    found = config.faults(cfg) + found + precision.faults(cfg.precision, device) + peft_faults(cfg.peft) + kernel.faults
    model_faults = backbone.faults(cfg.model)
    source = Checked(lambda: (like.source, like.science["data"]["content"]) if like else _read(cfg.data))
    task = Checked(lambda: like.task if like else _asked(instantiate(cfg.task)))
    found += model_faults + source.faults + task.faults + Checked(lambda: dashboard.check(cfg.logger)).faults
    if not model_faults and like is None:
        found += _model_fit_faults(cfg, task.value)
    if found:
        raise InputError("this cell cannot run:\n" + "\n".join(f"  - {fault}" for fault in found))
    threads = resolve_threads(cfg.threads)
    content = {
        "model": backbone.fingerprint(cfg.model),
        "data": source.value[1],
        "task": task.value.fingerprint(),
    }
    runs_as = {"threads": threads, "device": device, "kernel": kernel.value}
    runs_as["emulated"] = precision.build(cfg.precision, device).emulated
    science = config.science(cfg, content, runs_as)
    cell_id = config.identity(science)
    parts = [cfg.model.name, cfg.data.name, cfg.precision.name, cfg.peft.name, f"s{cfg.seed}"]
    parts += [f"r{cfg.replicate}"] if cfg.replicate else []
    folder = Path(cfg.runs) / cfg.study.name / "-".join([*parts, cell_id])
    return Cell(cfg, science, cell_id, folder, device, threads, source.value[0], task.value, role)


class Checked:
    """A value made by a function, or the faults that the function found instead."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.value: Any = None
        self.faults: list[str] = []
        try:
            self.value = make()
        except InputError as error:
            self.faults = str(error).splitlines()
        except InstantiationException as error:  # Hydra wraps what a constructor raised
            if not isinstance(error.__cause__, InputError):
                raise
            self.faults = str(error.__cause__).splitlines()


def _read(node: DictConfig) -> tuple[data.Source, str]:
    """A source and its fingerprint, for which all of it is read and checked."""
    source = instantiate(node)
    return source, source.fingerprint()


def _asked(task: tasks.Task) -> tasks.Task:
    for shots in task.shots:
        task.queries(shots)
    return task


def _model_fit_faults(cfg: DictConfig, task: tasks.Task | None) -> list[str]:
    """What does not fit the model, found on its tokenizer and on a copy of it without weights."""
    found, positions = [], backbone.max_positions(cfg.model)
    if positions is not None and cfg.data.max_length > positions:
        found.append(
            f"data.max_length={cfg.data.max_length} exceeds the {positions} positions of model={cfg.model.name}: "
            "lower it"
        )
    skeleton = Checked(lambda: backbone.skeleton(cfg.model))
    if skeleton.faults:
        return found + skeleton.faults
    if task is not None:
        found += tasks.context_faults(task, skeleton.value.tokenizer, positions)
    if not peft_faults(cfg.peft):
        seam = recurrence.install(skeleton.value.model)
        found += Checked(lambda: instantiate(cfg.peft).attach(skeleton.value, seam)).faults
    return found


def run(cfg: DictConfig) -> Record:
    """Run one cell of a job, or find that it is done.

    Raises:
        CellFailed: it did not finish; its record says why.
    """
    log.info("cell: %s", ", ".join(HydraConfig.get().overrides.task) or "defaults")
    try:
        cell = prepare(cfg)
        record = ensure(cell)
    except InputError as error:
        log.error("%s", error)  # in a sweep, Hydra itself shows the first failure only
        raise CellFailed(str(error)) from None
    if record["status"] != "ok":
        raise CellFailed(
            f"{cell.folder.name}: {record['status']}: {record['error']['message']} (see {cell.folder / records.LOG})"
        )
    missing = [entry["counterpart"] for entry in record["divergence"] if entry["status"] == "missing"]
    if missing and cfg.reference == "auto":
        raise CellFailed(f"{cell.folder.name} is done, but not its reference: {', '.join(missing)}")
    return record


def ensure(cell: Cell) -> Record:
    """The finished record of a cell: found, or made under a lock so that parallel processes make it once."""
    if cell.id in _failed_references:
        return _failed_references[cell.id]
    try:
        with _only_one(cell):
            if (cell.folder / records.RECORD).exists():
                found = records.load(cell.folder)
                if found["id"] != cell.id:
                    raise InputError(f"{cell.folder} holds the record of another cell ({found['id']}): move it away")
                if records.is_final(found):
                    log.info("%s is done already: %s", cell.folder.name, found["status"])
                    return _compared(cell, found)
            record = _run_and_record(cell)
            if cell.role == "reference" and record["status"] != "ok":
                _failed_references[cell.id] = record
            return record
    except OSError as error:
        raise CellFailed(disk_message(error, cell.study)) from None


@contextmanager
def _only_one(cell: Cell) -> Iterator[None]:
    """No other process works on this cell meanwhile; the system frees the lock of a process that died."""
    lock = FileLock(cell.study / ".locks" / f"{cell.id}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that runs %s", cell.folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _compared(cell: Cell, record: Record) -> Record:
    """A finished record with its divergences, made up for where its references were off or had failed."""
    known = {entry["status"] for entry in record["divergence"]}
    if cell.config.reference != "auto" or record["status"] != "ok" or (known and "missing" not in known):
        return record
    return records.save_divergence(cell.folder, divergence.against_counterparts(record, _counterparts(cell)))


def _run_and_record(cell: Cell) -> Record:
    """Run a cell; whatever happens, its record and its log say so."""
    record = _stub(cell)
    records.save(cell.folder, record)
    loggers: list[Logger] = []
    with _log_file(cell.folder / records.LOG):
        try:
            counterparts = _counterparts(cell) if cell.config.reference == "auto" else {}
            loggers += dashboard.build_loggers(cell.config.logger, record, cell.folder)
            _execute(cell, record, loggers)
            record["divergence"] = divergence.against_counterparts(record, counterparts)
            record["status"] = "ok"
        except NonFiniteTrainingError as error:
            _failed(record, error.status, error)
        except (InputError, LivenessError) as error:
            _failed(record, "failed", error)
        except KeyboardInterrupt as error:
            _failed(record, "interrupted", error, "stopped by the user; the same command continues the study")
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke, its record and its log say so
            _failed(record, "oom" if _out_of_memory(error) else "failed", error)
        finally:
            record["finished"] = records.now()
            records.save(cell.folder, record)
            dashboard.finish(loggers, record)
    return record


def _failed(record: Record, status: str, error: BaseException, message: str | None = None) -> None:
    text = (
        message or (disk_message(error, Path()) if isinstance(error, OSError) else str(error)) or type(error).__name__
    )
    record |= {"status": status, "error": {"type": type(error).__name__, "message": text}}
    log.error("%s: %s: %s", record["name"], status, text)
    log.debug("%s", "".join(traceback.format_exception(error)))


def _counterparts(cell: Cell) -> dict[str, Record | None]:
    """Records of the two full-precision counterparts, made where they are missing; None is the cell itself."""
    found: dict[str, Record | None] = {}
    for name, twin in config.reference_configs(cell.config).items():
        reference = prepare(twin, role="reference", like=cell)
        if reference.id == cell.id:
            found[name] = None
            continue
        log.info("%s needs its reference %s", cell.folder.name, reference.folder.name)
        found[name] = ensure(reference)
    return found


def _execute(cell: Cell, record: Record, loggers: list[Logger]) -> None:
    """Build, fit, evaluate, save; fills the record as it goes."""
    cfg, started = cell.config, time.perf_counter()
    with _clean_state(cell) as strategy:
        base = backbone.load(cfg.model)
        if cfg.model.init == "scratch":  # so that whoever loads these weights knows which lengths they have seen
            base.model.config.trained_length = base.trained_length = cfg.data.max_length
        seam = recurrence.install(base.model, cfg.kernel.name, cfg.kernel.require)
        peft = instantiate(cfg.peft)
        peft.attach(base, seam)
        dataset = data.build(cell.source, base.tokenizer, cfg.data.max_length, cell.science["data"]["content"])
        record |= {
            "model": {"name": cfg.model.name, "architecture": base.architecture, "hash": base.hash} | peft.parameters(),
            "precision": strategy.record(),
            "recurrences_unknown": seam.unknown,
            "data": dataset.record(),
            "tasks": cell.task.record(),
            "peft": peft.record(),
        }
        memory = PeakMemory(base.model, cell.device)
        liveness = Liveness(base.model, steps=min(3, cfg.trainer.steps))
        series, skipped = _fit(cell, base.model, seam, strategy, dataset, loggers, liveness)
        record["peft"]["proven_alive"] = liveness.proven
        record["kernels"] = dict(seam.kernels)
        record["training"] = _training(series, skipped, config.learning_rate(cfg))
        record["cost"] = _cost(series, memory, cfg.trainer.accumulate)
        record["stability"] = _stability(series, seam)
        evaluation = time.perf_counter()
        scores, items = tasks.evaluate(
            base.model.to(cell.device),
            base.tokenizer,
            cell.task,
            batch_tokens=cfg.task.batch_tokens,
            autocast=strategy.autocast,
            trained_length=base.trained_length,
            max_positions=base.max_positions,
            progress=cfg.trainer.progress,
        )
        record["scores"] = [score.as_dict() for score in scores]
        records.save_items(cell.folder, items)
        record["files"]["weights"] = peft.save(cell.folder)
        ended = time.perf_counter()
        record["cost"] |= {"eval_wall_s": ended - evaluation, "wall_s": ended - started}


def _fit(
    cell: Cell,
    model: torch.nn.Module,
    seam: recurrence.Seam,
    strategy: precision.Precision,
    dataset: data.TokenDataset,
    loggers: list[Logger],
    liveness: Liveness,
) -> tuple[pd.DataFrame, int]:
    """Train; returns the step series and how many steps were skipped."""
    settings = cell.config.trainer
    module = FineTuner(model, settings, config.learning_rate(cell.config))
    probes = [instantiate(node) for node in cell.config.probe.values()]
    for probe in probes:
        if isinstance(probe, LyapunovProbe):
            probe.bind(seam)
    series = records.StepSeries(cell.folder / records.STEPS)
    callbacks: list[Callback] = [
        AdapterLiveness(liveness),
        *probes,
        StepRecorder(series, settings.record_every_s),
    ]
    if settings.progress:
        callbacks.append(ProgressBar(_title(cell)))
    trainer = L.Trainer(
        accelerator=cell.device,
        devices=1,
        plugins=[strategy.plugin],
        max_steps=settings.steps,
        accumulate_grad_batches=settings.accumulate,
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=settings.progress,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    model.train()
    log.info("training %s: %d steps", _title(cell), settings.steps)
    loader = data.batches(dataset, settings.batch_size, settings.steps * settings.accumulate, cell.config.seed)
    try:
        trainer.fit(module, loader)
    except SystemExit:  # what Lightning makes of Ctrl-C, after it has switched the signal off
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from None
    finally:
        series.flush()
    return pd.DataFrame(series.rows), module.skipped_steps


def _title(cell: Cell) -> str:
    title = cell.folder.name.removesuffix(f"-{cell.id}")
    return f"{title} (reference)" if cell.role == "reference" else title


def _training(series: pd.DataFrame, skipped: int, learning_rate: float) -> dict[str, Any]:
    """The training part of a record."""
    tail = series["loss"].tail(max(1, len(series) // 10))
    return {
        "steps": len(series),
        "loss_first": float(series["loss"].iloc[0]),
        "loss_last": float(series["loss"].iloc[-1]),
        "loss_mean_last_10pct": float(tail.mean()),
        "skipped_steps": skipped,
        "loss_scale_last": float(series["loss_scale"].iloc[-1]),
        "learning_rate": learning_rate,
    }


def _cost(series: pd.DataFrame, memory: PeakMemory, accumulate: int) -> dict[str, Any]:
    """Median speed after warm-up, and the training's peak memory."""
    steady = series.iloc[min(WARM_UP_STEPS, len(series) - 1) :]
    peak = memory.peak_bytes()
    in_flight = float(series["tokens"].max()) / accumulate
    return {
        "tokens_per_s": float(steady["tokens_per_s"].median()),
        "peak_bytes": peak,
        "peak_bytes_per_token": None if peak is None else peak / in_flight,
        "peak_source": memory.source,
    }


def _stability(series: pd.DataFrame, seam: recurrence.Seam) -> dict[str, Any]:
    """The worst numbers of the whole training, for the model and per layer."""
    if not seam.layers and seam.unknown:
        return {"not_applicable": f"lyapft does not know the recurrence of {', '.join(seam.unknown)}"}
    if not seam.layers:
        return {"not_applicable": "the model has no fixed-size recurrent state: a key-value cache only grows"}
    if "lambda_max" not in series:
        return {"not_applicable": "no Lyapunov probe was switched on (probe=lyapunov)"}

    def worst(suffix: str) -> dict[str, float]:
        lambda_max = float(series[f"lambda_max{suffix}"].max())
        return {
            "lambda_max": lambda_max,
            "margin": -lambda_max,
            "norm_bound": float(series[f"norm_bound{suffix}"].max()),
        }

    measured = [layer for layer in seam.layers if f"lambda_max/{layer.name}" in series]
    layers = [{"layer": layer.name, "family": layer.family} | worst(f"/{layer.name}") for layer in measured]
    return worst("") | {"layers": layers}


def _stub(cell: Cell) -> Record:
    """What is known of a cell before it runs."""
    cfg = cell.config
    return {
        "schema_version": records.SCHEMA_VERSION,
        "id": cell.id,
        "name": cell.folder.name,
        "study": cfg.study.name,
        "status": "running",
        "error": None,
        "role": cell.role,
        "created": records.now(),
        "finished": None,
        "config": cell.science,
        "paths": {
            group: {k: cfg[group][k] for k in config.PATHS if k in cfg[group]} for group in ("model", "data", "task")
        },
        "overrides": list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else [],
        "choices": {group: cfg[group].name for group in ("model", "data", "task", "peft", "precision")},
        "seed": cfg.seed,
        "replicate": cfg.replicate,
        "environment": describe(cell.device, cell.threads),
        "files": {"steps": records.STEPS, "items": records.ITEMS, "weights": None},
        "scores": [],
        "divergence": [],
    }


@contextmanager
def _clean_state(cell: Cell) -> Iterator[precision.Precision]:
    """Seeds, threads, precision flags as this cell wants them; put back afterwards, so that cells share a process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    L.seed_everything(cell.config.seed, workers=True, verbose=False)
    try:
        with warnings.catch_warnings(), precision.build(cell.config.precision, cell.device) as strategy:
            _quiet_libraries()
            yield strategy
    finally:
        torch.set_num_threads(threads)


def _quiet_libraries() -> None:
    """Only warnings of Lightning and transformers, and none about their own inner workings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message=r".*does not have many workers")  # tokens are in memory already
    warnings.filterwarnings(
        "ignore", message=r".*lr_scheduler.step\(\)` before `optimizer.step"
    )  # the first step was skipped


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Everything that is logged meanwhile also goes to this file, with the tracebacks that the console is spared."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("lyapft")
    level = ours.level
    ours.setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        yield
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def _out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text


def disk_message(error: OSError, folder: Path) -> str:
    """What a failed read or write means, and what to do."""
    where = error.filename or folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left for {where}: free some or set runs=FOLDER to another disk; the same command then continues"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{where} cannot be written ({os.strerror(error.errno)}): set runs=FOLDER to a folder of your own"
    return f"{where}: {error.strerror or error}"
