"""What is wrong with a cell's config, across its fields."""

import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lyapft import secrets, watch
from lyapft.config.choices import AdaLoraPeft
from lyapft.config.groups import RuleConfig
from lyapft.errors import InputError

GUARD_ACTIONS = ("skip", "rollback", "stop")
NOISE_FLOORS = ("replicate", "threads")
CHOICES = {
    "trainer.schedule": ("constant", "linear", "cosine", "hold_then_decay"),
    "reference": ("auto", "off"),
    "device": ("auto", "cpu", "cuda"),
    "model.init": ("pretrained", "scratch"),
    "trainer.strategy": ("ddp", "fsdp", "tensor"),
    "trainer.oom": ("auto", "halve", "stop"),
}
POSITIVE = (
    *(f"trainer.{name}" for name in ("batch_size", "accumulate", "max_nonfinite", "grad_clip")),
    "data.max_length",
    "task.batch_tokens",
)
POSITIVE_IF_GIVEN = ("data.limit", "task.limit", "threads", "trainer.learning_rate")
NOT_NEGATIVE = ("seed", "replicate", "trainer.steps", "trainer.validation_rows")
FOLDER_PARTS = (
    "study.name",
    *(f"{group}.name" for group in ("model", "data", "peft", "precision")),
)  # of a run's folder
FOLDER_PART = re.compile(r"[\w][\w.+-]*")


def faults(cfg: DictConfig) -> list[str]:
    """Everything that is wrong with a cell's own values; what needs files or devices is checked by their owners."""
    found = [
        *_size_faults(cfg),
        *_choice_faults(cfg),
        *_training_faults(cfg),
        *_learning_rate_faults(cfg),
        *_guard_faults(cfg),
    ]
    for name, probe in cfg.probe.items():
        if "every" in probe and probe.every < 1:
            found.append(f"probe.{name}.every={probe.every} must be 1 or more")
    for key in FOLDER_PARTS:
        found += name_faults(key, [OmegaConf.select(cfg, key)])
    return found + secrets.faults(OmegaConf.to_container(cfg, resolve=True))


def _size_faults(cfg: DictConfig) -> list[str]:
    """Numbers that are too small to count anything."""
    given = {key: OmegaConf.select(cfg, key) for key in (*POSITIVE, *POSITIVE_IF_GIVEN)}
    positive = {key: value for key, value in given.items() if value is not None}
    found = [f"{key}={value} must be greater than 0" for key, value in positive.items() if value <= 0]
    counts = {key: OmegaConf.select(cfg, key) for key in NOT_NEGATIVE}
    return found + [f"{key}={value} must not be negative" for key, value in counts.items() if value < 0]


def _choice_faults(cfg: DictConfig) -> list[str]:
    """Words that are none of those that a field knows."""
    found = []
    if cfg.data.streaming and "shuffle_buffer" not in cfg.data:
        found.append(
            f"data.streaming=true: data={cfg.data.name} is made in memory. Rows of files and of the hub stream: "
            "data=alpaca, sharegpt or text"
        )
    found += [
        f"study.noise_floor: {kind!r} is unknown: use {' and '.join(NOISE_FLOORS)}"
        for kind in cfg.study.noise_floor
        if kind not in NOISE_FLOORS
    ]
    chosen = {key: OmegaConf.select(cfg, key) for key in CHOICES}
    return found + [
        f"{key}={value} is unknown: use one of {', '.join(CHOICES[key])}"
        for key, value in chosen.items()
        if value not in CHOICES[key]
    ]


def _training_faults(cfg: DictConfig) -> list[str]:
    """Schedule, optimizer and shots."""
    found = [
        f"trainer.{key}={cfg.trainer[key]} must lie between 0 and 1"
        for key in ("warmup", "hold", "final_lr")
        if not 0 <= cfg.trainer[key] <= 1
    ]
    if len(cfg.trainer.betas) != 2 or not all(isinstance(b, float) and 0 <= b < 1 for b in cfg.trainer.betas):
        found.append(f"trainer.betas={list(cfg.trainer.betas)} must be two numbers in [0, 1)")
    shots = [s for s in cfg.task.shots if isinstance(s, int) and s >= 0]  # OmegaConf lets a list into a list of numbers
    if not shots or len(set(shots)) != len(cfg.task.shots):
        found.append(
            f"task.shots={list(cfg.task.shots)} must be one or more different numbers, none negative: task.shots=[0,5]"
        )
    return found


def _learning_rate_faults(cfg: DictConfig) -> list[str]:
    """Learning rates that the model lacks, for the cell or for its full fine-tuning reference."""
    if cfg.trainer.learning_rate is not None:
        return []
    found = []
    if cfg.peft.name not in cfg.model.learning_rate:
        known = ", ".join(cfg.model.learning_rate) or "none"
        found.append(
            f"model {cfg.model.name} has no learning rate for peft={cfg.peft.name} (it has: {known}): "
            f"set trainer.learning_rate=… or +model.learning_rate.{cfg.peft.name}=…"
        )
    if cfg.reference == "auto" and "none" not in cfg.model.learning_rate:
        found.append(
            f"model {cfg.model.name} has no learning rate for its full fine-tuning reference: "
            "set +model.learning_rate.none=… or reference=off"
        )
    return found


def name_faults(key: str, names: Iterable[Any]) -> list[str]:
    """Names that are no plain part of a folder's name: they would lead out of the folder that a run may write to."""
    return [
        f"{key}={name!r} must be a plain folder name: letters, digits and . _ + - after a letter, a digit or _"
        for name in names
        if not FOLDER_PART.fullmatch(str(name))
    ]


def _guard_faults(cfg: DictConfig) -> list[str]:
    """What is wrong with the guard, and with the rules of guard and alerts."""
    guard, found = cfg.guard, []
    ruled = {"guard": guard.rules} | {f"probe.{name}": p.rules for name, p in cfg.probe.items() if "rules" in p}
    for where, rules in ruled.items():
        for name, rule in rules.items():
            try:
                watch.Rule(str(name), **OmegaConf.merge(OmegaConf.structured(RuleConfig), rule))  # type: ignore[arg-type]
            except InputError as error:
                found.append(f"{where}.rules: {error}")
            except (OmegaConfBaseException, ValueError) as error:
                fields = ", ".join(RuleConfig.__dataclass_fields__)
                found.append(f"{where}.rules.{name}: {str(error).splitlines()[0]}; a rule has {fields}")
    if guard._target_ is None:
        return found
    if guard.action not in GUARD_ACTIONS:
        found.append(f"guard.action={guard.action} is unknown: use one of {', '.join(GUARD_ACTIONS)}")
    if not guard.rules and not guard.nonfinite:
        found.append(f"guard={guard.name} has no rules: it would never act")
    for name, rule in guard.rules.items():
        try:
            probe = watch.measured_by(str(rule.get("metric")))
        except InputError as error:
            found.append(f"guard.rules.{name}: {error}")
            continue
        if probe is not None and probe not in cfg.probe:
            found.append(f"guard.rules.{name} reads {rule.metric}, which probe={probe} measures: switch it on")
    late = [str(name) for name, rule in guard.rules.items() if rule.get("metric") not in ("loss", "grad_norm")]
    if guard.action == "skip" and late:
        found.append(
            f"guard.rules {', '.join(late)}: only loss and grad_norm are known before an update, which action=skip "
            "withholds: use action=rollback or stop"
        )
    if guard.action == "rollback" and OmegaConf.get_type(cfg.peft) is AdaLoraPeft:
        found.append("guard.action=rollback cannot restore what adalora remembers of each rank: use skip or stop")
    values = {"skip_steps": (guard.skip_steps, 0), "every": (guard.every, 1), "limit": (guard.limit, 0)}
    return found + [f"guard.{k}={v} must be at least {least}" for k, (v, least) in values.items() if v < least]
