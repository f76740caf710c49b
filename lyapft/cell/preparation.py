"""From a config to a cell: all that can be wrong is found before a weight is loaded, and the cell gets its identity."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from lyapft import backbone, config, dashboard, data, launch, precision, recurrence, sharding, tasks
from lyapft.data.packing import faults as packing_faults
from lyapft.environment import resolve_device, resolve_threads
from lyapft.errors import InputError, behind
from lyapft.peft import faults as peft_faults

TOKENS = ".tokens"  # below the folder of all runs: studies share it


@dataclass(frozen=True)
class Cell:
    """A validated config with everything that its identity depends on.

    Attributes:
        config: the resolved config.
        science: the part that can change numbers, inputs by content.
        id: hash of `science`.
        folder: runs/STUDY/NAME-ID.
        device: `cpu` or `cuda`; threads: CPU threads.
        source, task: where its examples come from, and what it is scored on; both read and checked.
        role: `cell`, `reference` (made because another cell needed it) or `rerun` (of a cell, for the noise floor).
    """

    config: DictConfig
    science: dict[str, Any]
    id: str
    folder: Path
    device: str
    threads: int
    source: data.Source
    task: tasks.Task
    role: str

    @property
    def study(self) -> Path:
        """The folder of the study."""
        return self.folder.parent

    @property
    def tokens(self) -> Path:
        """Where tokenised data and queries are kept."""
        return self.study.parent / TOKENS


def prepare(cfg: DictConfig, role: str = "cell", like: Cell | None = None) -> Cell:
    """Check a config and give it its identity; loads no weights.

    Args:
        cfg: a resolved config.
        role: `cell`, `reference` or `rerun`.
        like: a cell of the same data and task, whose input need not be read again.
    Raises:
        InputError: everything that is wrong with it, at once.
    """
    device, found = resolve_device(cfg.device)
    kernel = Checked(lambda: recurrence.resolve(cfg.kernel.name, cfg.kernel.require, device))
    found = config.faults(cfg) + found + precision.faults(cfg.precision, device) + peft_faults(cfg.peft) + kernel.faults
    trainer = cfg.trainer
    here, together = launch.found(), launch.together(trainer)
    found += launch.faults(here, trainer.accumulate, trainer.batch_size, cfg.precision.name, trainer.oom, together)
    if trainer.strategy != "ddp":
        found += launch.sharding_faults(here, trainer, cfg.peft, cfg.precision.name, list(cfg.probe), cfg.guard.action)
    model_faults = backbone.faults(cfg.model)
    source = Checked(lambda: (like.source, like.science["data"]["content"]) if like else _read(cfg.data))
    task = Checked(lambda: like.task if like else _asked(instantiate(cfg.task)))
    found += model_faults + source.faults + task.faults + Checked(lambda: dashboard.check(cfg.logger)).faults
    if not model_faults and not kernel.faults and like is None:
        tokens = None if found else Path(cfg.runs) / TOKENS  # what is refused already leaves nothing behind
        found += _model_fit_faults(cfg, task.value, device, tokens)
    if found:
        raise InputError("this cell cannot run:\n" + "\n".join(f"  - {fault}" for fault in found))
    threads = resolve_threads(cfg.threads)
    content = {
        "model": backbone.fingerprint(cfg.model),
        "data": source.value[1],
        "task": task.value.fingerprint(),
    }
    runs_as = {"threads": threads, "device": device, "kernel": kernel.value}
    runs_as["emulated"] = precision.build(cfg.precision, device).emulated
    runs_as |= launch.identity(launch.found())
    science = config.science(cfg, content, runs_as)
    cell_id = config.identity(science)
    parts = [cfg.model.name, cfg.data.name, cfg.precision.name, cfg.peft.name, f"s{cfg.seed}"]
    parts += [f"r{cfg.replicate}"] if cfg.replicate else []
    folder = Path(cfg.runs) / cfg.study.name / "-".join([*parts, cell_id])
    return Cell(cfg, science, cell_id, folder, device, threads, source.value[0], task.value, role)


class Checked:
    """A value made by a function, or the faults that the function found instead."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.value: Any = None
        self.faults: list[str] = []
        try:
            self.value = make()
        except InputError as error:
            self.faults = str(error).splitlines()
        except InstantiationException as error:  # Hydra wraps what a constructor raised
            wrong = behind(error)
            if wrong is None:
                raise
            self.faults = str(wrong).splitlines()


def _read(node: DictConfig) -> tuple[data.Source, str]:
    """A source and its fingerprint, for which all of it is read and checked."""
    source = instantiate(node)
    return source, source.fingerprint()


def _asked(task: tasks.Task) -> tasks.Task:
    for shots in task.shots:
        task.queries(shots)
    return task


def _model_fit_faults(cfg: DictConfig, task: tasks.Task | None, device: str, tokens: Path | None) -> list[str]:
    """What does not fit the model, found on its tokenizer and on a copy of it without weights."""
    found, positions = [], backbone.max_positions(cfg.model)
    if positions is not None and cfg.data.max_length > positions:
        found.append(
            f"data.max_length={cfg.data.max_length} exceeds the {positions} positions of model={cfg.model.name}: "
            "lower it"
        )
    skeleton = Checked(lambda: backbone.skeleton(cfg.model))
    if skeleton.faults:
        return found + skeleton.faults
    if cfg.trainer.strategy == "tensor":
        size = cfg.trainer.tensor_parallel_size
        wrong = sharding.tensor_faults(skeleton.value.model, size)
        found += [f"trainer.strategy=tensor: {fault}; use trainer.strategy=fsdp or ddp" for fault in wrong]
    kernel = cfg.kernel
    seam = Checked(
        lambda: recurrence.install(skeleton.value.model, kernel.name, kernel.require, fused=kernel.fused, device=device)
    )
    found += seam.faults
    if cfg.data.packing and kernel.name == "stock" and not seam.faults and seam.value.layers:
        found.append("kernel=stock cannot keep packed sequences apart: use kernel=auto, or data.packing=false")
    if cfg.data.packing and not seam.faults:
        kind, tuned = skeleton.value.model.config.model_type, cfg.peft.get("state") == recurrence.INITIAL_STATE
        found += packing_faults(kind, seam.value.unknown, tuned)
    if not seam.faults and not peft_faults(cfg.peft):
        found += Checked(lambda: instantiate(cfg.peft).attach(skeleton.value, seam.value)).faults
    if task is not None:  # last: what is refused already leaves nothing behind
        kept = None if found else tokens
        found += tasks.context_faults(task, skeleton.value.tokenizer, positions, kept)
    return found
