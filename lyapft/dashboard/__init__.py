"""Live numbers beside the record: W&B runs and CSV files. No other house imports
wandb, and this one only when it is chosen.

`logger=wandb` needs no account: without a login the run is written offline below the cell's folder, and
`wandb sync runs/STUDY/CELL/wandb/offline-run-*` uploads it later. `WANDB_MODE` decides where it is set.
"""

import hashlib
import logging
import netrc
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import urlsplit

import pandas as pd
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig

from lyapft import records
from lyapft.dashboard.content import summary
from lyapft.dashboard.runs import BROKEN, LiveRun, Mode, exit_code, start, write_results
from lyapft.errors import InputError
from lyapft.records import Record

__all__ = ["MODES", "alert", "build_loggers", "check", "finish", "push", "start", "summary", "wandb_mode"]

log = logging.getLogger(__name__)

MODES: tuple[Mode, ...] = get_args(Mode)


def check(cfg: DictConfig) -> None:
    """Refuse what `build_loggers` would refuse, before anything runs.

    Raises:
        InputError: an unknown W&B mode.
    """
    if cfg.name == "wandb":
        wandb_mode(cfg)


def build_loggers(cfg: DictConfig, record: Record, folder: Path) -> list[Logger]:
    """Lightning loggers of one cell, as its `logger` group says; their files lie in the cell's folder.

    Args:
        cfg: the `logger` node: `name` is none, csv or wandb.
        record: what is known of the cell before it runs.
        folder: of the cell.
    Raises:
        InputError: an unknown name or mode, or W&B cannot be started.
    """
    if cfg.name == "none":
        return []
    if cfg.name == "csv":
        return [CSVLogger(folder, name="csv")]  # its next free version: a continued cell keeps the earlier file
    if cfg.name == "wandb":
        return [_wandb_logger(cfg, record, folder)]
    raise InputError(f"logger={cfg.name} is unknown: use none, csv or wandb")


def alert(loggers: Iterable[Logger], title: str, text: str) -> None:
    """Send an alert to the W&B runs among the loggers; one that cannot be sent stops nothing."""
    for run in (logger for logger in loggers if isinstance(logger, LiveRun)):
        run.attempt(f"the alert {title!r} ({text})", partial(run.experiment.alert, title=title, text=text))


def finish(loggers: Iterable[Logger], record: Record) -> dict[str, Any] | None:
    """Close the loggers of a cell, however it ended; a W&B run gets the record's results: summary, tables, charts.

    The record is safe on disk by now, so a dashboard that cannot be reached is reported in the log and stops nothing.

    Returns:
        What the W&B run lacks, for the record; None where nothing was lost.
    """
    lost = None
    for logger in loggers:
        if isinstance(logger, LiveRun):
            if found := logger.close(record, Path(logger.save_dir or ".")):
                lost = found
                log.error("%s: its W&B run lacks %s (%s)", record["name"], "; ".join(found["lacks"]), found["error"])
            continue
        try:
            logger.finalize("success" if record["status"] == "ok" else "failed")
        except Exception:
            log.exception("%s: %s could not be closed; the record is complete", record["name"], type(logger).__name__)
    return lost


def wandb_mode(cfg: DictConfig) -> Mode:
    """Where a W&B run goes: the config's `mode`, else WANDB_MODE, else online with a login and offline without.

    Raises:
        InputError: a mode that does not exist.
    """
    chosen = cfg.get("mode") or os.environ.get("WANDB_MODE")
    if chosen is None:
        return "online" if _logged_in() else "offline"
    if chosen == "dryrun":  # W&B's former name
        return "offline"
    if chosen not in MODES:
        raise InputError(f"W&B mode {chosen!r} (logger.mode or WANDB_MODE) is unknown: use one of {', '.join(MODES)}")
    return cast(Mode, chosen)


def _logged_in() -> bool:
    """Whether wandb would find a key without asking for one: in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    candidates = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in (Path(candidate) for candidate in candidates if candidate):
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _wandb_logger(cfg: DictConfig, record: Record, folder: Path) -> LiveRun:
    return LiveRun(start(record, folder, wandb_mode(cfg), cfg.get("project") or "lyapft", cfg.get("entity")), folder)


def push(study: Path, mode: Mode, project: str, entity: str | None = None) -> list[str]:
    """Make W&B runs of a study from its records alone, with what a live run would have shown; returns their cells.

    Left out are cells that are running, and cells that have a whole run of their own below their folder. A run's id
    comes from study and cell, so that a second push replaces the first one's runs.

    Raises:
        InputError: no such study, or W&B cannot be started.
    """
    pushed = []
    for folder, record in records.load_study(study):
        broken = (record.get("dashboard") or {}).get("run") == BROKEN
        if record["status"] == "running" or (any(folder.glob("wandb/*run-*")) and not broken):
            log.info("%s is left out: it is running or has a W&B run of its own", folder.name)
            continue
        run = start(record, study, mode, project, entity, run_id=_run_id(record))
        if (folder / records.STEPS).exists():
            for row in pd.read_parquet(folder / records.STEPS).to_dict("records"):
                numbers = {str(name): float(value) for name, value in row.items() if pd.notna(value) and name != "step"}
                run.log(numbers | {"trainer/global_step": int(row["step"])})
        for given in record.get("alerts") or []:
            run.alert(
                title=f"lyapft: {given['rule']}",
                text=f"step {given['step']}: {given['metric']} is {given['value']:.4g}",
            )
        write_results(run, record, folder)
        run.finish(exit_code=exit_code(record))
        pushed.append(folder.name)
    return pushed


def _run_id(record: Record) -> str:
    return hashlib.sha256(f"{record['study']}/{record['id']}".encode()).hexdigest()[:12]
