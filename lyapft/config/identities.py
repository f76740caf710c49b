"""Which cell a config is: the part of it that can change a number, and its hash."""

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lyapft import watch


def learning_rate(cfg: DictConfig) -> float:
    """The rate that this cell trains with: its own if set, else the one tuned for its (architecture, peft)."""
    if cfg.trainer.learning_rate is not None:
        return float(cfg.trainer.learning_rate)
    return float(cfg.model.learning_rate[cfg.peft.name])


NOT_SCIENCE = (
    "runs",
    "rates",
    "study",
    "logger",
    "probe",
    "reference",
    "device",
    "threads",
)  # cannot change a number by themselves
NOT_SCIENCE_TRAINER = ("progress", "record_every_s", "checkpoint_every_s")
PATHS = ("path", "tokenizer")  # known by content instead


def science(cfg: DictConfig, fingerprints: dict[str, str], runs_as: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that can change numbers; inputs by content, never by path.

    Args:
        cfg: the resolved cell config.
        fingerprints: content hashes by input: `model`, `data`, `task`.
        runs_as: what the cell really runs with: threads, device, kernel, emulated half arithmetic or not.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {key: value for key, value in plain.items() if key not in NOT_SCIENCE}
    for key in NOT_SCIENCE_TRAINER:
        kept["trainer"].pop(key)
    for key in _without_effect(kept["data"]):
        kept["data"].pop(key)
    if cfg.guard._target_ is None:
        kept.pop("guard")
    else:
        read = {watch.measured_by(rule["metric"]) for rule in kept["guard"]["rules"].values()}
        settings = {name: probe for name, probe in plain["probe"].items() if name in read}
        kept["guard"] |= {"probes": settings} if settings else {}  # they say at which steps it sees a number
    if not kept["trainer"]["validation_rows"]:
        kept["trainer"].pop("validation_rows")
    if kept["trainer"]["strategy"] != "tensor":
        kept["trainer"].pop("tensor_parallel_size")
    if kept["trainer"]["strategy"] == "ddp":
        kept["trainer"].pop("strategy")
    kept["trainer"].pop("oom")  # changes a cell only where memory ran out, which its record says
    kept["trainer"]["learning_rate"] = learning_rate(cfg)
    kept["kernel"].pop("require")  # it can stop a cell, not change it
    for key in ("learning_rate", "pretrain_steps", "pretrain_seed"):  # they act through the trainer and the seed
        kept["model"].pop(key)
    for group, content in fingerprints.items():
        kept[group] = without_paths(kept[group]) | {"content": content}
    return kept | {"runs_as": runs_as}


def _without_effect(data: dict[str, Any]) -> list[str]:
    """Settings of streaming that change no number: how many processes read ahead, and all where nothing is streamed."""
    idle = ("workers",) if data.get("streaming") else ("workers", "streaming", "shuffle_buffer")
    return [key for key in idle if key in data]


def settled(cfg: DictConfig) -> DictConfig:
    """The config that a cell of it runs: a pretrained model that is not trained is one cell whatever the seed."""
    if cfg.trainer.steps or cfg.model.init != "pretrained" or not cfg.seed:
        return cfg
    once = cfg.copy()
    once.seed = 0
    return once


def without_paths(node: dict[str, Any]) -> dict[str, Any]:
    """A group's settings without the paths in it, those of the tasks of a suite too."""
    kept = {key: value for key, value in node.items() if key not in PATHS}
    return {key: without_paths(value) if isinstance(value, dict) else value for key, value in kept.items()}


def paths_of(node: DictConfig) -> dict[str, Any]:
    """The paths in a group, of the tasks of a suite too: what the science part leaves out."""
    found = {key: node[key] for key in PATHS if key in node}
    parts = {key: paths_of(value) for key, value in node.items() if isinstance(value, DictConfig)}
    return found | {str(key): value for key, value in parts.items() if value}


def identity(science_part: dict[str, Any]) -> str:
    """Twelve hex digits that name a cell by its science part."""
    canonical = json.dumps(science_part, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
