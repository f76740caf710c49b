"""One cell: found or made, recorded, compared with its full-precision counterparts.

A cell that finished is never run again; one that failed or was interrupted leaves its record and is run again by the
same command.
"""

import errno
import logging
import os
import re
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from safetensors import SafetensorError

from lyapft import config, containment, dashboard, divergence, holding, ranks, rates, records, secrets, study
from lyapft.cell import answers, summary
from lyapft.cell.crew import crew, follow
from lyapft.cell.execution import execute
from lyapft.cell.preparation import Cell, prepare
from lyapft.cell.state import is_elsewhere, log_file, only_one
from lyapft.errors import InputError
from lyapft.halving import Halvings, OutOfMemory, until_it_fits
from lyapft.holding import LostLeaseError
from lyapft.module import TrainingStopped
from lyapft.peft import LivenessError
from lyapft.records import Record
from lyapft.resume import CheckpointFiles, Interrupted, Signals
from lyapft.study import CellBrokeDown, CellFailed

__all__ = ["Cell", "CellFailed", "disk_message", "ensure", "prepare", "run"]

log = logging.getLogger(__name__)
_failed_references: dict[str, Record] = {}  # of this process: a sweep tries each of them once


def run(cfg: DictConfig, wait: bool = False) -> Record | None:
    """Run one cell of a job, or find that it is done; None: another process runs it, and the sweep comes back to it.

    Where torchrun or srun started several processes, all of them train, and the first does everything else.

    Args:
        cfg: of the cell.
        wait: for another process that runs it, also in a sweep.

    Raises:
        CellFailed: it did not finish; its record says why. CellBrokeDown: nor would it the next time.
    """
    if threading.current_thread() is not threading.main_thread():
        raise CellFailed(
            "cells in threads would share the random numbers and settings of their process: use processes, as "
            "hydra/launcher=joblib does by itself (hydra.launcher.backend=loky)"
        )
    with crew() as leads:
        try:
            if leads:
                return _run(cfg, wait)
            follow(cfg, execute)
            return None
        except InputError as error:
            log.error("%s", error)  # in a sweep, Hydra itself shows the first failure only
            raise CellFailed(str(error)) from None
        except OSError as error:  # of what the checks read and keep; a cell has its own
            raise CellFailed(disk_message(error, Path(cfg.runs))) from None


def _run(cfg: DictConfig, wait: bool) -> Record | None:
    log.info("cell: %s", ", ".join(HydraConfig.get().overrides.task) or "defaults")
    log.info("checking the model, the data and the tasks")
    original = cfg
    cfg = config.settled(rates.applied(cfg))
    if cfg.seed != original.seed:
        log.info("nothing is trained: the base is one cell whatever the seed, kept as seed %d", cfg.seed)
    cell = prepare(cfg)
    if not wait and study.can_postpone() and is_elsewhere(cell):
        log.info("%s is run by another process: going on, and coming back to it", cell.folder.name)
        study.postpone(partial(run, original, wait=True))
        return None
    record = ensure(cell)
    if record["status"] != "ok":
        raise (CellBrokeDown if records.is_final(record) else CellFailed)(
            f"{cell.folder.name}: {record['status']}: {record['error']['message']} (see {cell.folder / records.LOG})"
        )
    missing = [entry["counterpart"] for entry in record["divergence"] if entry["status"] == "missing"]
    if missing and cfg.reference == "auto":
        references = _references(cell)
        settled = all(twin is None or _has_outcome(twin) for twin in map(references.get, missing))
        raise (CellBrokeDown if settled else CellFailed)(
            f"{cell.folder.name} is done, but not its reference: {', '.join(missing)}"
        )
    for kind, twin in config.noise_floor_configs(cfg, cell.threads).items():
        rerun = prepare(twin, role="rerun", like=cell)
        log.info("%s for the noise floor: %s", rerun.folder.name, kind)
        ensure(rerun)
    return record


def ensure(cell: Cell) -> Record:
    """The finished record of a cell: found, or made under a lock so that parallel processes make it once."""
    if cell.id in _failed_references:
        return _failed_references[cell.id]
    entries = cell.folder.iterdir() if cell.folder.is_dir() else ()
    containment.check(Path(cell.config.runs), [*records.folders(cell.study), cell.folder, *entries])
    try:
        with only_one(cell):
            return _found_or_made(cell)
    except LostLeaseError as error:
        if ranks.many():  # the others cannot be met again
            raise CellFailed(f"{cell.folder.name}: {error}; the same command continues the study") from None
        log.error("%s: %s", cell.folder.name, error)
        return ensure(cell)  # as whoever finds that another process is at work on it
    except OSError as error:
        raise CellFailed(disk_message(error, cell.study)) from None


def _found_or_made(cell: Cell) -> Record:
    found = None
    if (cell.folder / records.RECORD).exists():
        found = records.load(cell.folder)
        if found["id"] != cell.id:
            raise InputError(f"{cell.folder} holds the record of another cell ({found['id']}): move it away")
        if records.is_final(found):
            CheckpointFiles(cell.folder, cell.id).remove()  # of a process that died between the two
            log.info("%s is done already: %s", cell.folder.name, found["status"])
            return _compared(cell, found)
    records.remove_leftovers(cell.folder)
    record = _run_and_record(cell, (found or {}).get("oom", []))
    if cell.role == "reference" and record["status"] != "ok":
        _failed_references[cell.id] = record
    return record


def _compared(cell: Cell, record: Record) -> Record:
    """A finished record with its divergences, made up for where its references were off or had failed."""
    known = {entry["status"] for entry in record["divergence"]}
    if cell.config.reference != "auto" or record["status"] != "ok" or (known and "missing" not in known):
        return record
    references = _references(cell)
    return records.save_divergence(cell.folder, _divergence(cell, record, references, _counterparts(cell, references)))


def _divergence(
    cell: Cell, record: Record, references: dict[str, Cell | None], counterparts: dict[str, Record | None]
) -> list[dict[str, Any]]:
    """A record's comparisons, scores and answers."""
    entries = divergence.against_counterparts(record, {name: counterparts[name] for name in references})
    return answers.counted(entries, cell.folder, {twin.id: twin.folder for twin in references.values() if twin})


def _run_and_record(cell: Cell, halved: list[dict[str, Any]]) -> Record:
    """Run a cell; whatever happens, its record and its log say so. `halved`: where memory ran out before."""
    record = summary.stub(cell)
    halvings = _halvings(cell, halved)
    if halvings.allowed:
        record["oom"] = halvings.entries
    records.save(cell.folder, record)
    loggers: list[Logger] = []
    with log_file(cell.folder / records.LOG), Signals() as signals:
        try:
            references = _references(cell) if cell.config.reference == "auto" else {}
            # what another process is making will be there when this cell is done: nobody waits with work to do
            later = {name: twin for name, twin in references.items() if twin is not None and is_elsewhere(twin)}
            counterparts = _counterparts(cell, {name: references[name] for name in references if name not in later})
            loggers += dashboard.build_loggers(cell.config.logger, record, cell.folder)
            until_it_fits(
                lambda: execute(cell, record, loggers, signals, halvings),
                halvings,
                save=lambda: records.save(cell.folder, record),
            )
            counterparts |= {name: _awaited(twin) for name, twin in later.items()}
            record["divergence"] = _divergence(cell, record, references, counterparts)
            record["status"] = "ok"
        except TrainingStopped as error:
            _failed(record, error.status, error)
        except (InputError, LivenessError) as error:
            _failed(record, "failed", error)
        except KeyboardInterrupt as error:
            _failed(record, "interrupted", error, "stopped by the user; the same command continues the study")
            raise
        except Interrupted as error:
            _failed(record, "interrupted", error)
            raise error.leave() from None
        except LostLeaseError:
            record["status"] = "interrupted"
            raise
        except OutOfMemory as error:
            _failed(record, "oom", error)
        except Exception as error:  # noqa: BLE001 - whatever broke, its record and its log say so
            _failed(record, "failed", error)
        finally:
            _close(cell, record, loggers)
    return record


def _close(cell: Cell, record: Record, loggers: list[Logger]) -> None:
    """Write the record, however the cell ended, then close its dashboards; once its lease is lost only these."""
    record["finished"] = records.now()
    try:
        holding.check(cell.folder)  # before the record that may be there already, and final, is taken for a fault
        records.save(cell.folder, record)
        if records.is_final(record):
            CheckpointFiles(cell.folder, cell.id).remove()
    finally:
        lost = dashboard.finish(loggers, record)
    if lost:
        record["dashboard"] = lost
        records.save_dashboard(cell.folder, lost)


def _halvings(cell: Cell, entries: list[dict[str, Any]]) -> Halvings:
    cfg, trainer = cell.config, cell.config.trainer
    return Halvings(
        list(entries),
        trainer.batch_size,
        trainer.accumulate,
        cfg.task.batch_tokens,
        longest=cfg.data.max_length,
        allowed=trainer.oom == "halve" or (trainer.oom == "auto" and ranks.count() == 1),
    )


def _failed(record: Record, status: str, error: BaseException, message: str | None = None) -> None:
    disk = _disk_error(error)
    text = message or (disk_message(disk, Path(record["name"])) if disk else str(error)) or type(error).__name__
    text = secrets.hidden(text)
    record |= {"status": status, "error": {"type": type(error).__name__, "message": text}}
    log.error("%s: %s: %s", record["name"], status, text)
    log.debug("%s", "".join(traceback.format_exception(error)))


def _references(cell: Cell) -> dict[str, Cell | None]:
    """The cells of the two full-precision counterparts; None is the cell itself."""
    found: dict[str, Cell | None] = {}
    for name, twin in config.reference_configs(cell.config).items():
        reference = prepare(twin, role="reference", like=cell)
        found[name] = None if reference.id == cell.id else reference
    return found


def _has_outcome(cell: Cell) -> bool:
    return (cell.folder / records.RECORD).exists() and records.is_final(records.load(cell.folder))


def _counterparts(cell: Cell, references: dict[str, Cell | None]) -> dict[str, Record | None]:
    """Records of references, made where they are missing; None is the cell itself."""
    found: dict[str, Record | None] = {}
    for name, reference in references.items():
        if reference is not None:
            log.info("%s needs its reference %s", cell.folder.name, reference.folder.name)
        found[name] = None if reference is None else ensure(reference)
    return found


def _awaited(reference: Cell) -> Record:
    """The record of a reference that another process makes; made here if that process was cut off before it was done.

    Where it failed by itself, it would here too: its record says why, and the next command tries again.
    """
    with only_one(reference):
        made = (reference.folder / records.RECORD).exists()
        found = records.load(reference.folder) if made else None
    if found is not None and found["status"] not in records.CUT_OFF:
        return found
    log.info("%s was left unfinished by another process: making it here", reference.folder.name)
    return ensure(reference)  # which waits for whoever was quicker


def _disk_error(error: BaseException) -> OSError | None:
    """The system's error that an exception is about; safetensors gives its number as text."""
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return error if isinstance(error, OSError) else None


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
