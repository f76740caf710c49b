"""`python evaluate.py experiment=NAME`: runs an experiment, writes its numbers and a page with its figures."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from lyapft import config, containment, records
from lyapft.cell import CellFailed, disk_message
from lyapft.environment import describe, resolve_threads
from lyapft.errors import InputError, behind
from lyapft.report.experiments import page


def run(cfg: DictConfig, folder: Path = Path("runs") / "experiments") -> Path:
    """Run the experiment once; the same settings again find their record and only show it. Returns the record.

    With `run=runs/STUDY` the record lies in that study, whose report then shows its figures.

    Raises:
        CellFailed: wrong settings; the message says what.
    """
    try:
        return _run(cfg, folder)
    except (InputError, InstantiationException) as error:
        wrong = behind(error)
        if wrong is None:
            raise
        raise CellFailed(str(wrong)) from None
    except OSError as error:
        raise CellFailed(disk_message(error, folder)) from None


def _run(cfg: DictConfig, folder: Path) -> Path:
    if faults := _faults(cfg.experiment):
        raise InputError("this experiment cannot run:\n" + "\n".join(f"  - {fault}" for fault in faults))
    if not OmegaConf.is_missing(cfg, "run"):
        folder = study_folder(Path(cfg.run))
    settings: Any = OmegaConf.to_container(cfg.experiment, resolve=True)
    threads = resolve_threads(cfg.threads)
    name = settings["_target_"].split(".")[-2]
    target = folder / f"{name}-{config.identity(settings | {'threads': threads})}.json"
    if not target.exists():
        containment.check(folder.parent, [folder, target])
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


def _faults(node: DictConfig) -> list[str]:
    """Values that no experiment can use."""
    found = []
    for key, value in ((str(key), value) for key, value in node.items()):
        if isinstance(value, int | float) and (value < 0 or (value == 0 and key not in ("seed", "token"))):
            found.append(f"experiment.{key}={value} must be {'0 or more' if key in ('seed', 'token') else 'above 0'}")
        if isinstance(value, ListConfig) and not len(value):
            what = ": name models of conf/model/ or folders of finished runs" * (key == "models")
            found.append(f"experiment.{key} is empty{what}")
    if "token" in node and node.token >= node.tokens:
        found.append(f"experiment.token={node.token} must be one of the {node.tokens} tokens of a prompt")
    return found


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
