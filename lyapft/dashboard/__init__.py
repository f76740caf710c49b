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
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

import pandas as pd
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig

from lyapft import records, secrets
from lyapft.dashboard.content import charts, summary, tables
from lyapft.errors import InputError
from lyapft.records import Record

__all__ = ["MODES", "alert", "build_loggers", "check", "finish", "push", "start", "summary", "wandb_mode"]

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
CONFIG_FIELDS = ("id", "name", "role", "choices", "seed", "replicate", "overrides", "config", "environment")
FINISH_S = 300.0  # that the end of a run may wait for its upload; by itself W&B waits without end
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
    """Send an alert to the W&B runs among the loggers; one that cannot be sent is logged and stops nothing."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            try:
                logger.experiment.alert(title=title, text=text)
            except Exception:  # wandb raises many kinds
                log.exception("the alert %r could not be sent", title)


def finish(loggers: Iterable[Logger], record: Record) -> None:
    """Close the loggers of a cell, however it ended; a W&B run gets the record's results: summary, tables, charts.

    The record is safe on disk by now, so a dashboard that cannot be reached is reported in the log and stops nothing.
    """
    for logger in loggers:
        try:
            if isinstance(logger, WandbLogger):
                _close(logger.experiment, record, Path(logger.save_dir or "."))
            else:
                logger.finalize("success" if record["status"] == "ok" else "failed")
        except Exception:  # wandb raises many kinds
            log.exception("%s: %s could not be closed; the record is complete", record["name"], type(logger).__name__)


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


def _wandb_logger(cfg: DictConfig, record: Record, folder: Path) -> WandbLogger:
    run = start(record, folder, wandb_mode(cfg), cfg.get("project") or "lyapft", cfg.get("entity"))
    return WandbLogger(experiment=run, save_dir=folder, project=run.project)


def start(
    record: Record, folder: Path, mode: Mode, project: str, entity: str | None = None, run_id: str | None = None
) -> Any:
    """A W&B run of its own for this cell, in the group of its study, also when the process holds other runs.

    Raises:
        InputError: W&B cannot be started.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        console="off",  # the progress bar is no log
        silent=True,
        disable_code=True,
        disable_git=True,  # a remote's address may hold a token
        x_disable_meta=True,  # so may the command line; the record describes machine and command
        x_disable_stats=True,
        finish_timeout=FINISH_S,  # what is left by then is on disk, for `wandb sync`
        finish_timeout_raises=True,
    )
    try:
        run = wandb.init(
            project=project,
            entity=entity,
            id=run_id,
            group=record["study"],
            name=record["name"],
            job_type=record["role"],
            tags=[str(choice) for choice in record["choices"].values()],
            config=secrets.without({name: record[name] for name in CONFIG_FIELDS if name in record}),
            dir=folder,
            mode=mode,
            reinit="create_new",
            settings=settings,
        )
    except (wandb.errors.Error, OSError) as error:
        raise InputError(
            f"W&B could not start a run in mode {mode} ({error}): set WANDB_MODE=offline, or use logger=csv"
        ) from None
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


def _close(run: Any, record: Record, folder: Path) -> None:
    """Log the tables and charts of a record, make its results the run's summary, and end the run.

    Rows beyond W&B's own limit of a shown table are not cut by lyapft: `items.parquet` has them all.
    """
    import wandb

    items = folder / records.ITEMS
    found = tables(record, pd.read_parquet(items) if items.exists() else None)
    made = {name: wandb.Table(columns=list(table), data=table.to_numpy().tolist()) for name, table in found.items()}
    content: dict[str, Any] = {f"tables/{name}": table for name, table in made.items()}
    for chart in charts(found):
        draw = {"line": wandb.plot.line, "bar": wandb.plot.bar}[chart.kind]
        data = wandb.Table(columns=list(found[chart.table]), data=found[chart.table].to_numpy().tolist())
        content[f"charts/{chart.name}"] = draw(data, chart.x, chart.y, title=chart.title, **chart.options)
    try:
        if content:
            run.log(content)
        run.summary.update(summary(record))
    finally:
        run.finish(exit_code=0 if record["status"] == "ok" else 1)


def push(study: Path, mode: Mode, project: str, entity: str | None = None) -> list[str]:
    """Make W&B runs of a study from its records alone, with what a live run would have shown; returns their cells.

    Left out are cells that are running, and cells that have a run of their own below their folder. A run's id comes
    from study and cell, so that a second push replaces the first one's runs.

    Raises:
        InputError: no such study, or W&B cannot be started.
    """
    pushed = []
    for folder, record in records.load_study(study):
        if record["status"] == "running" or any(folder.glob("wandb/*run-*")):
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
        _close(run, record, folder)
        pushed.append(folder.name)
    return pushed


def _run_id(record: Record) -> str:
    return hashlib.sha256(f"{record['study']}/{record['id']}".encode()).hexdigest()[:12]
