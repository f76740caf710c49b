"""What a command will run: every cell of its matrix, their references and reruns, found without loading anything.

Overrides are expanded by Hydra's own parser and sweeper. Nothing here imports torch: a sweep writes its plan while its
workers are still starting.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lyapft import config, rates
from lyapft.errors import InputError
from lyapft.plan.cores import threads_per_cell

CELL, REFERENCE, RERUN = "cell", "reference", "rerun"
FREE = ("seed", "replicate")  # what may differ between cells of one recipe, threads besides
BY_CONTENT = ("model", "data", "task")


@dataclass(frozen=True)
class Planned:
    """One cell that a command will run or find done.

    Attributes:
        config: its resolved config, of this seed or another. role: `cell`, or `reference` or `rerun` of a cell.
        threads: CPU threads that it will have.
        settings: the science part without what only reading files and devices would tell (see `settings_of`).
    """

    config: DictConfig
    role: str
    seed: int
    threads: int
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Equal to `key_of` of its record."""
        return _hash(self.settings, self.threads)

    @property
    def recipe(self) -> str:
        """Equal for cells that differ in seed, replicate and threads alone."""
        return recipe_of(self.settings)

    @property
    def choices(self) -> dict[str, str]:
        """The names by which a record and the report call it."""
        return {group: str(self.config[group].name) for group in ("model", "data", "task", "peft", "precision")}


def settings_of(science: Mapping[str, Any]) -> dict[str, Any]:
    """A science part without contents of files and what the cell runs as: a plan does not know those yet.

    >>> settings_of({"model": {"name": "m", "content": "1f"}, "seed": 0, "runs_as": {"threads": 1}})
    {'model': {'name': 'm'}, 'seed': 0}
    """
    kept = {key: value for key, value in science.items() if key != "runs_as"}
    for group in BY_CONTENT:
        if group in kept:
            kept[group] = {key: value for key, value in kept[group].items() if key != "content"}
    return kept


def key_of(record: Mapping[str, Any]) -> str:
    """The key of the planned cell that a record is of: its settings and threads."""
    science = record["config"]  # has been through JSON already
    return config.identity({"settings": settings_of(science), "threads": science["runs_as"]["threads"]})


def recipe_of(settings: Mapping[str, Any]) -> str:
    """By which cells of one recipe find each other."""
    return _hash({key: value for key, value in settings.items() if key not in FREE}, None)


def _hash(settings: Mapping[str, Any], threads: int | None) -> str:
    # through JSON, as a record has been: there a number that is not finite is null, and a tuple a list
    return config.identity(json.loads(json.dumps({"settings": settings, "threads": threads}, default=str)))


def jobs(overrides: Sequence[str], params: Mapping[str, Any]) -> list[list[str]]:
    """The overrides of every job of a sweep: what is given goes before the preset's own `hydra.sweeper.params`."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    given = parser.parse_overrides([*(f"{key}={value}" for key, value in params.items()), *overrides])
    return [list(job) for job in BasicSweeper.split_arguments(given, None)[0]]


def cells(command: DictConfig) -> list[Planned]:
    """Every cell of a composed command, its references and its reruns, each once, in the order of running.

    Args:
        command: the config with its `hydra` node, as Hydra's callbacks and `composed` have it.
    Raises:
        InputError: a cell whose settings cannot be resolved.
    """
    multirun = command.hydra.mode == RunMode.MULTIRUN
    given, params, launcher = (_unresolved(command, key) for key in ("overrides.task", "sweeper.params", "launcher"))
    spanned = jobs(given, params or {}) if multirun else [given]
    found: dict[str, Planned] = {}
    for planned in _families(spanned, launcher if multirun else {}):
        known = found.get(planned.key)
        if known is None or (planned.role == CELL != known.role):  # a reference that is a cell of the matrix too
            found[planned.key] = planned
    return list(found.values())


def _unresolved(command: DictConfig, key: str) -> Any:
    """A node of Hydra's own as it was typed: an override may hold an interpolation, which is the cell's to resolve."""
    node = OmegaConf.select(command.hydra, key)
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _families(spanned: Sequence[Sequence[str]], launcher: Mapping[str, Any]) -> Iterator[Planned]:
    """The cells of each job; jobs that differ in the seed alone are composed once, as that takes most of the time."""
    composed: dict[tuple[str, ...], DictConfig] = {}
    families: dict[tuple[tuple[str, ...], bool], list[Planned]] = {}
    for job in spanned:
        one_of_many = [override for override in job if override.startswith("seed=")]
        rest = tuple(override for override in job if override not in one_of_many)
        if any("${seed}" in override for override in rest):
            rest = tuple(job)
        if rest not in composed:
            composed[rest] = rates.applied(_compose(rest, RunMode.RUN))
        cfg = composed[rest]
        if one_of_many:
            cfg.seed = one_of_many[-1].removeprefix("seed=")
        cfg = config.settled(cfg)
        floor = cfg.seed in cfg.study.noise_floor_seeds
        if (rest, floor) not in families:
            families[rest, floor] = list(_family(cfg, threads_per_cell(cfg.threads, launcher)))
        for planned in families[rest, floor]:
            yield replace(planned, seed=cfg.seed, settings={**planned.settings, "seed": cfg.seed})


def _family(cfg: DictConfig, threads: int) -> Iterator[Planned]:
    """References before the cell that needs them, reruns after it."""
    cell = _planned(cfg, CELL, threads)
    if cfg.reference == "auto":
        for twin in config.reference_configs(cfg).values():
            reference = _planned(twin, REFERENCE, threads)
            if reference.key != cell.key:
                yield reference
    yield cell
    for twin in config.noise_floor_configs(cfg, threads).values():
        yield _planned(twin, RERUN, twin.threads or threads)


def _planned(cfg: DictConfig, role: str, threads: int) -> Planned:
    try:
        science = config.science(cfg, dict.fromkeys(BY_CONTENT, ""), {})
    except (KeyError, OmegaConfBaseException) as error:
        faults = config.faults(cfg)
        raise InputError("\n".join(faults) or str(error)) from None
    return Planned(cfg, role, cfg.seed, threads, settings_of(science))


@contextmanager
def composing() -> Iterator[None]:
    """Hydra initialised on conf/, where no entry point has done that."""
    config.register()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        yield


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config of a command, its `hydra` node with it, as if it were typed behind `train.py`, or `train.py -m` where
    it spans choices; inside `composing`.

    Raises:
        InputError: what Hydra says against it.
    """
    cfg = _compose(overrides, RunMode.MULTIRUN, hydra=True)
    if any(one.is_sweep_override() for one in OverridesParser.create().parse_overrides(list(overrides))):
        cfg.hydra.mode = RunMode.MULTIRUN
    return cfg


def _compose(overrides: Sequence[str], mode: RunMode, hydra: bool = False) -> DictConfig:
    active = GlobalHydra.instance().hydra
    if active is None:
        raise RuntimeError("call this inside a Hydra entry point, or inside `composing`")
    try:
        cfg = active.compose_config("train", list(overrides), run_mode=mode, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(str(error)) from None
    if not hydra:
        with open_dict(cfg):
            del cfg["hydra"]
    return cfg
