"""One W&B run of one cell: its start, its live numbers, its end; and what it lacks where W&B failed on the way.

The record has everything that a run shows, so W&B is never a reason to lose a cell: the training goes on without it.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from lightning.pytorch.loggers import WandbLogger

from lyapft import records, secrets
from lyapft.dashboard.content import charts, summary, tables
from lyapft.errors import InputError
from lyapft.records import Record

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
CONFIG_FIELDS = ("id", "name", "role", "choices", "seed", "replicate", "overrides", "config", "environment")
FINISH_S = 300.0  # that the end of a run may wait for its upload; by itself W&B waits without end
BROKEN, NOT_UPLOADED = "broken", "not uploaded"
END = "the end of its upload: `wandb sync` its folder"


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


class LiveRun(WandbLogger):
    """Lightning's logger for a run that `start` made, whose training outlives W&B.

    Attributes:
        lacks: what could not be handed to W&B, in words. error: the first reason.
        broken: whether W&B takes nothing more: its service process died, or it refused the numbers of a step.
    """

    def __init__(self, run: Any, folder: Path) -> None:
        super().__init__(experiment=run, save_dir=folder, project=run.project)
        self.lacks: list[str] = []
        self.error: str | None = None
        self.broken = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hand over the numbers of a step; after the first failure none."""
        log_them = super().log_metrics
        what = f"numbers from step {step} on, perhaps the last before it"  # of what it took, some may not be on disk
        if not self.broken and not self.attempt(what, lambda: log_them(metrics, step)):
            self.broken = True
            log.warning(
                "W&B takes no more numbers from step %s on (%s): the training goes on, and its record will say so. "
                "`python -m lyapft.dashboard push runs/STUDY` makes a whole run of the record",
                step,
                self.error,
            )

    def attempt(self, what: str, action: Callable[[], object]) -> bool:
        """Do something with W&B; whether it could be done. What could not is named in `lacks`."""
        if not self.broken:
            try:
                action()
                return True
            except Exception as error:  # noqa: BLE001 - wandb raises many kinds
                self.error = self.error or secrets.hidden(f"{type(error).__name__}: {error}")
                if isinstance(error, ConnectionError):
                    self.broken = True
                    _forget_service()
        self.lacks.append(what)
        return False

    def close(self, record: Record, folder: Path) -> dict[str, Any] | None:
        """End the run with the record's results; what it lacks, for the record, or None where it is whole."""
        run = self.experiment
        whole = self.attempt("tables, charts and summary", lambda: write_results(run, record, folder))
        if not self.broken:
            self.attempt(END, lambda: run.finish(exit_code=exit_code(record)))
        if not self.lacks:
            return None
        state = NOT_UPLOADED if whole and self.lacks == [END] else BROKEN
        return {"run": state, "lacks": self.lacks, "error": self.error}


def _forget_service() -> None:
    """Let wandb start another service process for the next run; without this it waits for the dead one at exit."""
    import wandb

    try:
        wandb.teardown()
    except ConnectionError:
        log.debug("wandb's service process is gone")


def exit_code(record: Record) -> int:
    """As a process that ran the cell would have ended."""
    return 0 if record["status"] == "ok" else 1


def write_results(run: Any, record: Record, folder: Path) -> None:
    """Log the tables and charts of a record, and make its results the run's summary.

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
    if content:
        run.log(content)
    run.summary.update(summary(record))
