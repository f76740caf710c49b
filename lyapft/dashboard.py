"""Live numbers beside the record: W&B runs and CSV files. The only import of wandb, and only when it is chosen.

`logger=wandb` needs no account: without a login the run is written offline below the cell's folder, and
`wandb sync runs/STUDY/CELL/wandb/offline-run-*` uploads it later. `WANDB_MODE` decides where it is set.
"""

import logging
import math
import netrc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig

from lyapft import secrets
from lyapft.errors import InputError
from lyapft.records import Record

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = get_args(Mode)
CONFIG_FIELDS = ("id", "name", "role", "choices", "seed", "replicate", "overrides", "config", "environment")


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
    """Close the loggers of a cell, however it ended; a W&B run gets the record's results as its summary.

    The record is safe on disk by now, so a dashboard that cannot be reached is reported in the log and stops nothing.
    """
    for logger in loggers:
        try:
            if isinstance(logger, WandbLogger):
                run = logger.experiment
                run.summary.update(summary(record))
                run.finish(exit_code=0 if record["status"] == "ok" else 1)
            else:
                logger.finalize("success" if record["status"] == "ok" else "failed")
        except Exception:  # wandb raises many kinds
            log.exception("%s: %s could not be closed; the record is complete", record["name"], type(logger).__name__)


def summary(record: Record) -> dict[str, Any]:
    """A record's results as flat names and plain values; what the cell has not got is left out.

    >>> summary({"status": "ok", "scores": [{"task": "mmlu", "shots": 5, "value": 0.5}]})
    {'status': 'ok', 'score/mmlu/5-shot': 0.5}
    """
    flat: dict[str, Any] = {"status": record["status"], "error": (record.get("error") or {}).get("message")}
    for part in ("training", "cost", "shadow"):
        flat |= {f"{part}/{name}": value for name, value in (record.get(part) or {}).items()}
    for name, value in (record.get("stability") or {}).items():
        if name == "layers":
            flat |= {
                f"stability/{layer['layer']}/{key}": layer[key] for layer in value for key in ("lambda_max", "margin")
            }
        else:
            flat[f"stability/{name}"] = value
    for score in record.get("scores") or []:
        other = "" if score.get("metric", "acc") == "acc" else f"/{score['metric']}"
        flat[f"score/{score['task']}/{score['shots']}-shot{other}"] = score["value"]
    for entry in record.get("divergence") or []:
        flat[f"divergence/{entry['counterpart']}/status"] = entry["status"]
        flat[f"divergence/{entry['counterpart']}/mean_abs_points"] = entry.get("mean_abs_points")
        for score in entry.get("per_score") or []:
            name = f"divergence/{entry['counterpart']}/{score['task']}/{score['shots']}-shot"
            flat[name] = score["signed_points"]
    return {name: value for name, value in flat.items() if isinstance(value, str) or _finite(value)}


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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
    """A run of its own for this cell, in the group of its study, also when the process holds other runs."""
    mode = wandb_mode(cfg)
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        console="off",  # the progress bar is no log
        silent=True,
        disable_code=True,
        disable_git=True,  # a remote's address may hold a token
        x_disable_meta=True,  # so may the command line; the record describes machine and command
        x_disable_stats=True,
    )
    try:
        run = wandb.init(
            project=cfg.get("project") or "lyapft",
            entity=cfg.get("entity"),
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
            f"logger=wandb could not start a run in mode {mode} ({error}): set WANDB_MODE=offline, or use logger=csv"
        ) from None
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run, save_dir=folder, project=run.project)
