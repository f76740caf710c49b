"""Scoring a finished run again: its model as the record has it, on its own tasks or on others."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lyapft import backbone, config, containment, peft, precision, records, recurrence, tasks, trust
from lyapft.cell import CellFailed, disk_message
from lyapft.config.recorded import merged, part, typed
from lyapft.environment import describe, resolve_device, resolve_threads
from lyapft.errors import InputError
from lyapft.peft.base import ADAPTER_FOLDER
from lyapft.records import Record

log = logging.getLogger(__name__)
FOLDER = "evaluations"
REBUILT = ("model", "task", "peft", "precision")  # groups of a record that something is built from


def run(cfg: DictConfig) -> None:
    """Evaluate a run and write the scores beside its record.

    Raises:
        CellFailed: the run or the task cannot be used; the message says why.
    """
    try:
        _run(cfg)
    except InputError as error:
        raise CellFailed(str(error)) from None
    except OSError as error:
        raise CellFailed(disk_message(error, Path(str(cfg.run)))) from None


def _run(cfg: DictConfig) -> None:
    if OmegaConf.is_missing(cfg, "run"):
        raise InputError("which run? Give its folder: python evaluate.py run=runs/STUDY/CELL")
    folder = Path(cfg.run)
    record, cell = finished(folder, cfg.trust_remote_code)
    task_node = cfg.task if cfg.task is not None else cell.task
    device, found = resolve_device(cfg.device)
    found += backbone.faults(cell.model) + precision.faults(cell.precision, device) + tasks.faults(task_node)
    if found:
        raise InputError("this run cannot be scored:\n" + "\n".join(f"  - {fault}" for fault in found))
    content = backbone.fingerprint(cell.model)
    if content != record["config"]["model"]["content"]:
        raise InputError(
            f"the base weights of {cell.model.name} are not those that {folder} was trained from "
            f"(content {content[:12]}…, the record has {record['config']['model']['content'][:12]}…)"
        )
    check_fit(folder, record, cell)
    _score(cfg, folder, record, cell, task_node, device)


def _score(cfg: DictConfig, folder: Path, record: Record, cell: DictConfig, task_node: DictConfig, device: str) -> None:
    task = instantiate(task_node)
    science = {
        "run": record["id"],
        "task": config.without_paths(_plain(task_node)) | {"path": None},
        "content": task.fingerprint(),
        "device": device,
        "threads": resolve_threads(cfg.threads),
    }
    torch.set_num_threads(science["threads"])
    identity = config.identity(science)
    target = folder / FOLDER / f"{identity}.json"
    containment.check(folder, [target.parent])
    target.parent.mkdir(exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        _score_once(cfg, target, record, cell, task, task_node, science, device)


def _score_once(
    cfg: DictConfig,
    target: Path,
    record: Record,
    cell: DictConfig,
    task: tasks.Task,
    task_node: DictConfig,
    science: dict[str, Any],
    device: str,
) -> None:
    folder = target.parent.parent
    if target.exists():
        log.info("done already: %s", target)
        print(_table(json.loads(target.read_text(encoding="utf-8"))["scores"]))
        return
    with precision.build(cell.precision, device) as strategy:
        base = backbone.load(cell.model)
        seam = recurrence.install(base.model, cell.kernel.name, fused=cell.kernel.fused)
        method = instantiate(cell.peft)
        method.attach(base, seam)
        strategy.cast(base.model)
        if record["files"]["weights"] is not None:  # a cell of no steps is its base
            method.load(folder)
        found = tasks.context_faults(task, base.tokenizer, base.max_positions)
        if found:
            raise InputError("; ".join(found))
        scores, items = tasks.evaluate(
            base.model.to(device),
            base.tokenizer,
            task,
            batch_tokens=task_node.batch_tokens,
            autocast=strategy.autocast,
            trained_length=base.trained_length,
            max_positions=base.max_positions,
            progress=cfg.progress,
        )
    rows = [score.as_dict() for score in scores]
    result = {
        "schema_version": records.SCHEMA_VERSION,
        "id": target.stem,
        "run": record["name"],
        "task": science["task"],
        "scores": rows,
        "kernels": dict(seam.kernels),
        "environment": describe(device, science["threads"]),
        "created": records.now(),
    }
    records.write_atomically(target.with_suffix(".parquet"), lambda path: items.to_parquet(path, index=False))
    records.save_json(target, result)
    print(_table(rows))
    print(f"scores: {target}")


def finished(folder: Path, trust_remote_code: bool = False) -> tuple[Record, DictConfig]:
    """The record of a run that ended well, and the config that it was made from.

    Raises:
        InputError: there is none, it did not end well, or its record cannot be used: names the file and the key.
    """
    record = records.load(folder)
    try:
        if part(record, "status", str) != "ok":
            raise InputError(f"status {record['status']}: only a finished run has weights to be used")
        part(record, "id", str)
        part(record, "files.weights", str, None)
        part(record, "config.model.content", str)
        cell = rebuild_config(record, trust_remote_code)
        if wrong := peft.faults(cell.peft):
            raise InputError("; ".join(wrong))
        return record, cell
    except InputError as error:
        raise InputError(f"{folder / records.RECORD}: {error}") from None


def check_fit(folder: Path, record: Record, cell: DictConfig) -> None:
    """Put the adapter of a run on its model without weights, where wrong settings take no memory.

    Raises:
        InputError: settings that the model cannot have, or that are not those of the weights.
    """
    base, method = backbone.skeleton(cell.model), instantiate(cell.peft)
    with torch.device("meta"):
        method.attach(base, recurrence.install(base.model))
    if record["files"]["weights"] == f"{ADAPTER_FOLDER}/":
        method.load(folder)


def rebuild_config(record: Record, trust_remote_code: bool = False) -> DictConfig:
    """The typed config that a record was made from, with the paths it had then.

    Raises:
        InputError: settings that no cell has; or it would run code that is not lyapft's, of which
            `trust_remote_code` allows the one that came with a model.
    """
    part(record, "name", str)
    nodes: dict[str, Any] = {}
    for group in (*REBUILT, "kernel"):
        values = {key: value for key, value in part(record, f"config.{group}", dict).items() if key != "content"}
        paths = part(record, f"paths.{group}", dict) if group in part(record, "paths", dict) else {}
        nodes[group] = merged(values, paths)
    trust.check(record, {group: nodes[group] for group in REBUILT}, trust_remote_code)
    return OmegaConf.create({group: typed(group, values) for group, values in nodes.items()})


def _plain(node: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))


def _stderr(row: dict[str, Any]) -> str:
    return "n/a" if row["stderr"] is None else f"{row['stderr']:.3f}"  # one item has no spread


def _table(scores: list[dict[str, Any]]) -> str:
    width = max(len(row["task"]) for row in scores)
    lines = [f"{'task':<{width}}  shots  metric    score    n  stderr"]
    lines += [
        f"{row['task']:<{width}}  {row['shots']:>5}  {row['metric']:<8}  "
        f"{row['value']:.3f}  {row['n']:>4}  {_stderr(row)}"
        for row in scores
    ]
    return "\n".join(lines)
