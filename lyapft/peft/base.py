"""What every choice of trainable parameters has in common: its life from attaching to merging, and its files."""

from __future__ import annotations

import contextlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lyapft import holding
from lyapft.backbone import Backbone
from lyapft.errors import NOT_JSON, InputError
from lyapft.peft.liveness import listed
from lyapft.records import flush

if TYPE_CHECKING:
    from lyapft.config import PeftConfig
    from lyapft.recurrence import Seam

ADAPTER_FOLDER = "adapter"  # inside the folder of a cell
TENSORS, IDENTITY = "adapter_model.safetensors", "adapter.json"

Batch = dict[str, Tensor]


class Strategy(ABC):
    """A choice of trainable parameters.

    `attach` comes first, then `prepare` before the first step; `save`, `load` and `merge` at any time after `attach`.
    What is saved is every tensor that trains and nothing else, beside what it belongs to (`identity`).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._backbone: Backbone | None = None

    @classmethod
    def faults(cls, cfg: PeftConfig) -> list[str]:
        """What is wrong with a choice of this strategy's settings; nothing by default."""
        return []

    @property
    def backbone(self) -> Backbone:
        """What the strategy was attached to."""
        if self._backbone is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a backbone yet: call attach first")
        return self._backbone

    @abstractmethod
    def attach(self, backbone: Backbone, seam: Seam) -> None:
        """Choose the trainable parameters of the backbone's model, in place; it may have no weights yet (meta)."""

    @abstractmethod
    def merge(self) -> None:
        """Turn the model into an ordinary one of transformers with the same outputs, in place."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What was adapted, for the record of a cell."""

    def prepare(self, gradients: Callable[[Batch], None], batches: Iterable[Batch]) -> None:  # noqa: B027 - a hook
        """What has to be learnt from data before the first step; by default nothing, and no batch is drawn.

        Args:
            gradients: adds those of the training loss of a batch, as the model now stands.
            batches: those that training will see, in its order.
        """

    def parameter_groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups: one rate for all, weight decay on matrices only."""
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ]
        return [group | {"lr": learning_rate} for group in groups if group["params"]]

    def penalty(self) -> Tensor | None:
        """What the strategy adds to the loss of each micro-batch; by default nothing."""
        return None

    def after_step(self, step: int) -> None:  # noqa: B027 - a hook
        """Called after each optimizer step that was really taken, its gradients still there; `step` counts from 1."""

    def training_state(self) -> dict[str, Any]:
        """What a training has to remember besides `tensors` to go on after it was cut off; by default nothing."""
        return {}

    def take_up(self, state: dict[str, Any]) -> None:  # noqa: B027 - a hook
        """Remember what `training_state` gave."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every tensor that trains, each once."""
        return [p for p in self.backbone.model.parameters() if p.requires_grad]

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: total and trainable, shared ones once, adapters in both."""
        parameters = list(self.backbone.model.parameters())
        return {
            "parameters_total": sum(p.numel() for p in parameters),
            "parameters_trainable": sum(p.numel() for p in parameters if p.requires_grad),
        }

    def identity(self) -> dict[str, Any]:
        """What the saved tensors belong to: they are refused where any of it differs."""
        return {"method": self.name, "base_hash": self.backbone.hash}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, by its name in the model: every tensor that trains."""
        return {name: p for name, p in self.backbone.model.named_parameters() if p.requires_grad}

    def stored_name(self, name: str) -> str:
        """The name in the file of a parameter of the model."""
        return name

    def save(self, folder: Path) -> str:
        """Write what was trained below a cell's folder, as safetensors; returns where, relative to it."""
        with written_whole(folder / ADAPTER_FOLDER) as partial:
            self.write(partial)
        return f"{ADAPTER_FOLDER}/"

    def write(self, folder: Path) -> None:
        """Write the tensors and their identity into a folder that exists."""
        tensors = {self.stored_name(n): p.detach().cpu().contiguous() for n, p in self.tensors().items()}
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / IDENTITY).write_text(json.dumps(self.identity(), indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote below a cell's folder.

        Raises:
            InputError: nothing of the kind in the folder; tensors of other base weights or settings.
        """
        where = folder / ADAPTER_FOLDER
        if not (where / TENSORS).is_file() or not (where / IDENTITY).is_file():
            raise InputError(f"{where} holds no adapter ({TENSORS} and {IDENTITY}): give the folder of a finished run")
        try:
            saved = dict(json.loads((where / IDENTITY).read_text(encoding="utf-8")))
            tensors = load_file(where / TENSORS)
        except (SafetensorError, TypeError, *NOT_JSON) as error:
            raise InputError(
                f"the adapter in {where} cannot be read: {TENSORS} or {IDENTITY} is damaged, or no file of its kind "
                f"({error}). Only safetensors are read; run the cell again, or restore the folder"
            ) from None
        for key, mine in json.loads(json.dumps(self.identity())).items():
            if saved.get(key) != mine:
                raise InputError(
                    f"the adapter in {where} was trained with {key}={saved.get(key)}, this one has {key}={mine}: "
                    "give the model and the peft settings that it was trained with"
                )
        places = {self.stored_name(n): p for n, p in self.tensors().items()}
        copy_into(places, tensors, set(places), where)


def copy_into(places: Mapping[str, Tensor], weights: dict[str, Tensor], expected: set[str], folder: Path) -> None:
    """Copy tensors into others by name: every one must have its place, every expected one its value."""
    wrong = sorted(set(weights) - set(places)) + sorted(expected - set(weights))
    wrong += [n for n in weights if n in places and weights[n].shape != places[n].shape]
    if wrong:
        raise InputError(
            f"the weights in {folder} are not those of this model: {listed(wrong)}. Give the run of this model"
        )
    with torch.no_grad():
        for name, value in weights.items():
            places[name].copy_(value)


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes its name only when all of it is written.

    Raises:
        LostLeaseError: the folder above it is another process's by now.
    """
    holding.check(folder.parent)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in partial.glob("*.safetensors"):  # written for the owner alone: whoever may read the folder may read all
        path.chmod(partial.stat().st_mode & 0o666)
    for path in (*partial.iterdir(), partial):  # a record that is final speaks of weights that a power cut left there
        flush(path)
    holding.check(folder.parent)
    if folder.exists():  # from an attempt that was cut off before its record was final
        shutil.rmtree(folder)
    partial.rename(folder)
    flush(folder.parent)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
