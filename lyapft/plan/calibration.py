"""What a cell costs on this machine, from a short cell of the same recipe.

A calibration is an ordinary cell of a few steps in the study `calibration-ID` (ID names processor and torch), so its
record is the cache: it is never made again, and another machine's is not mistaken for this one's.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lyapft import cell, config, records
from lyapft.environment import cpu_name
from lyapft.plan.cells import Planned

log = logging.getLogger(__name__)

STEPS, SETTLED = 30, 4  # steps of a calibration, and those left out: caches and allocators settle
ITEMS = 64  # scored of each subset


@dataclass(frozen=True)
class Calibration:
    """What one short cell cost.

    Attributes:
        step_s: seconds of a training step. fixed_s: of everything else but scoring: loading, attaching, set-up.
        query_s: per query scored. peak_bytes: of its training, as a record has it; None where nothing measures it.
    """

    step_s: float
    fixed_s: float
    query_s: float
    peak_bytes: int | None

    def seconds(self, steps: int, queries: int) -> float:
        """Predicted wall time of a cell of this recipe."""
        return self.fixed_s + steps * self.step_s + queries * self.query_s


def study_name() -> str:
    """The study of this machine's calibrations."""
    machine = hashlib.sha256(f"{cpu_name()} {torch.__version__}".encode()).hexdigest()[:6]
    return f"calibration-{machine}"


def short(cfg: DictConfig, threads: int, replicate: int) -> DictConfig:
    """The short cell of a recipe: its settings with few steps, few items, no reference."""
    twin = cfg.copy()
    twin.study = OmegaConf.structured(config.StudyConfig(name=study_name()))
    twin.seed, twin.replicate, twin.threads, twin.reference = 0, replicate, threads, "off"
    twin.logger = config.load_choice("logger", "none")
    twin.trainer.steps, twin.trainer.progress = min(STEPS, cfg.trainer.steps), False
    twin.task.limit = min(ITEMS, cfg.task.limit or ITEMS)
    return twin


def calibrate(planned: Planned) -> Calibration:
    """Run the short cell of a recipe, or read what it cost before.

    Raises:
        InputError: the cell cannot run here. CellFailed: it did not finish.
    """
    first, later = (_run(planned, replicate) for replicate in (0, 1))
    steps, cost = _steps(later[0]), later[1]["cost"]
    # The first has caches to fill, so its steps are not used; it has no free heap either, so its memory is; what a cell
    # takes beside lies between the two, for it may be the first of its process, but its data are tokenised.
    peaks = [record["cost"].get("peak_bytes") for _, record in (first, later)]
    asked = sum(score["n"] for score in records.accuracies(later[1]))
    return Calibration(
        step_s=float(steps.iloc[min(SETTLED, len(steps) - 1) :].median()) if len(steps) else 0.0,
        fixed_s=(_beside(*first) + _beside(*later)) / 2,
        query_s=cost["eval_wall_s"] / asked,
        peak_bytes=None if None in peaks else max(peaks),
    )


def _run(planned: Planned, replicate: int) -> tuple[Path, records.Record]:
    """Folder and record of one short cell."""
    prepared = cell.prepare(short(planned.config, planned.threads, replicate))
    record = cell.ensure(prepared)
    if record["status"] != "ok":
        raise cell.CellFailed(f"calibration {record['name']}: {record['status']}: {record['error']['message']}")
    if record.get("oom"):
        raise cell.CellFailed(f"calibration {record['name']}: memory ran out for a whole batch")
    return prepared.folder, record


def _beside(folder: Path, record: records.Record) -> float:
    """Seconds of a cell beside its steps and its scoring."""
    cost = record["cost"]
    return float(cost["wall_s"] - cost["eval_wall_s"] - _steps(folder).sum())


def queries(cfg: DictConfig) -> int:
    """How many queries a cell scores, over all numbers of shots; reads the task's data."""
    task = instantiate(cfg.task)
    return sum(len(task.queries(shots)) for shots in task.shots)


def _steps(folder: Path) -> pd.Series:
    path = folder / records.STEPS
    return pd.read_parquet(path)["step_s"] if path.exists() else pd.Series(dtype=float)


def recipes(planned: Sequence[Planned]) -> list[Planned]:
    """One cell of each recipe and thread count: what has to be calibrated."""
    return list({(one.recipe, one.threads): one for one in reversed(planned)}.values())[::-1]
