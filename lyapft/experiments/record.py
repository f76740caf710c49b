"""`python evaluate.py experiment=NAME`: runs an experiment, writes its numbers and a page with its figures."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lyapft import config, records
from lyapft.environment import describe, resolve_threads
from lyapft.errors import InputError
from lyapft.report.experiments import page


def run(cfg: DictConfig, folder: Path = Path("runs") / "experiments") -> Path:
    """Run the experiment once; the same settings again find their record and only show it. Returns the record.

    With `run=runs/STUDY` the record lies in that study, whose report then shows its figures.
    """
    if not OmegaConf.is_missing(cfg, "run"):
        folder = study_folder(Path(cfg.run))
    settings: Any = OmegaConf.to_container(cfg.experiment, resolve=True)
    if settings.get("models") == []:
        raise InputError("experiment.models is empty: name models of conf/model/ or folders of finished runs")
    threads = resolve_threads(cfg.threads)
    name = settings["_target_"].split(".")[-2]
    target = folder / f"{name}-{config.identity(settings | {'threads': threads})}.json"
    if not target.exists():
        torch.set_num_threads(threads)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        found = instantiate(cfg.experiment, progress=cfg.progress, _convert_="all")
        result = {
            "schema_version": records.SCHEMA_VERSION,
            "name": name,
            "experiment": settings,
            "rows": found.rows,
            "series": found.series,
            "wall_s": time.perf_counter() - started,
            "environment": describe("cpu", threads),
            "created": records.now(),
        }
        records.save_json(target, result)
    content = json.loads(target.read_text(encoding="utf-8"))
    shown = page.write(content, target.with_suffix(".html"))
    print(_table(content["rows"]))
    print(f"numbers: {target}\nfigures: {shown}")
    return target


def study_folder(study: Path) -> Path:
    """Where a study keeps the records of its experiments.

    Raises:
        InputError: no such study.
    """
    if not study.is_dir():
        raise InputError(f"run={study} is not a folder: give the study that is to show the experiment, runs/STUDY")
    return study / records.EXPERIMENTS


def _table(rows: list[dict[str, Any]]) -> str:
    shown = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in shown) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)) for line in shown)


def _cell(value: Any) -> str:
    return "n/a" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
