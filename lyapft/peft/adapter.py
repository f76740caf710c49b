"""Adapters of peft: put on, kept alive where weights are read raw, saved in peft's layout, merged."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import AdaLoraConfig
from peft import PeftConfig as TunerConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lyapft.backbone import Backbone
from lyapft.errors import InputError
from lyapft.peft.base import Strategy, replace_module
from lyapft.peft.carry import ADAPTER, TiedHead, adapted_layers, carry, effective_bias, effective_weight
from lyapft.peft.memory_buffer import split_memory
from lyapft.peft.mixers import mixers
from lyapft.peft.targets import (
    coverage,
    leaf_counts,
    raw_counts,
    refuse_dead,
    refuse_gaps,
    resolve_targets,
    shared_layers,
    tied_head,
)
from lyapft.peft.views import MatrixView, SplitRows

if TYPE_CHECKING:
    from lyapft.config import AdapterPeft, PeftConfig
    from lyapft.recurrence import Seam

MEMORY_BUFFERS = ("tied", "untied")
REFUSED_BY_PEFT = ("out_proj", "conv1d", "dt_proj")  # of a mixer: refused, or adapted and then passed by


class Adapter(Strategy):
    """Small tensors beside frozen layers, by a method of peft.

    Where the output matrix is tied to the embeddings, an adapter of the embeddings acts on both: the adapted model
    stays tied, so a merged one is an ordinary tied model.

    Args:
        targets: `auto` (`sll` where there are mixers, `usual` elsewhere), `sll`, `all`, `memory_buffer`, `usual`, a
            list of module names (a leaf such as `in_proj`, or a dotted suffix) or a regular expression over full names.
        min_coverage: the least share, of all layers of a name that is adapted at all, that have to be.
        memory_buffer: for targets=memory_buffer, `tied` (one adapter for Δ, B and C) or `untied` (one for each).
        dropout: on the adapter's input, in [0, 1).
    Raises:
        InputError: from the constructor, a value out of range.
    """

    NATIVE: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)  # kinds that the method adapts as they are

    def __init__(
        self, name: str, targets: str | Sequence[str], min_coverage: float, memory_buffer: str, dropout: float = 0.0
    ) -> None:
        super().__init__(name)
        wrong = self._common_faults(min_coverage, memory_buffer, dropout)
        if wrong:
            raise InputError("\n".join(wrong))
        self.targets = targets if isinstance(targets, str) else list(targets)
        self.min_coverage, self.memory_buffer, self.dropout = min_coverage, memory_buffer, dropout
        self._present: dict[str, int] = {}
        self._names: list[str] = []  # of the layers that are adapted, as the stock model has them
        self._twins: dict[str, nn.Module] = {}  # layers that share their matrix with one that is adapted before them
        self._tuner: BaseTuner | None = None

    @classmethod
    def faults(cls, cfg: PeftConfig) -> list[str]:
        """Values out of range."""
        own = cast("AdapterPeft", cfg)
        return cls._common_faults(own.min_coverage, own.memory_buffer, getattr(own, "dropout", 0.0))

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The method's own settings: part of the record and of the identity of what is saved."""

    @abstractmethod
    def inject(self, model: PreTrainedModel, names: list[str]) -> BaseTuner:
        """Put the adapters of peft on the named modules, in place."""

    @property
    def tuner(self) -> BaseTuner:
        """peft's wrapper around the model."""
        if self._tuner is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a backbone yet: call attach first")
        return self._tuner

    def attach(self, backbone: Backbone, seam: Seam) -> None:
        """Put adapters on the targets; everything else stops training.

        Initial values come from torch's global generator: seed it first.

        Raises:
            InputError: a target that matches nothing, misses layers, or cannot be adapted; dropout where the adapter
                acts on a weight that is read as a matrix.
        """
        model = backbone.model
        self._names = self.resolve(model)
        self._present, head = leaf_counts(model) | raw_counts(model), tied_head(model)
        refuse_dead(model, self._names, seam, self.dropout)
        refuse_gaps(self._names, self._present, self.min_coverage)
        twins = shared_layers(model, self._names)
        self._twins = {name: model.get_submodule(name) for name in twins}
        names = self._as_linear(model, [name for name in self._names if name not in twins])
        with warnings.catch_warnings():
            # peft would tie by training the embedding's adapter as two; `TiedHead` ties it by using the one twice
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            self._tuner = self.inject(model, names)
        adapted = [name for name, _ in adapted_layers(model)]
        if sorted(adapted) != sorted(names):
            raise RuntimeError(f"peft adapted {sorted(adapted)} where {sorted(names)} was asked for")
        for name, first in twins.items():  # one matrix, one adapter: the merged model stays tied
            replace_module(model, name, model.get_submodule(first))
        carry(model)
        embedding = model.get_input_embeddings()
        if head is not None and isinstance(embedding, BaseTunerLayer):
            replace_module(model, head, TiedHead(cast(nn.Linear, model.get_submodule(head)), embedding))
        self._backbone = backbone

    def resolve(self, model: PreTrainedModel) -> list[str]:
        """Full names of the layers to adapt."""
        return resolve_targets(model, self.targets)

    def merge(self) -> None:
        """Give every adapted layer back to the model, its weight the adapted one.

        Raises:
            ValueError: a weight that is not finite; nothing was changed then.
        """
        model = self.backbone.model
        layers = adapted_layers(model)
        weights = {name: effective_weight(layer).detach() for name, layer in layers}
        broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
        if broken:
            raise ValueError(f"the adapted weights of {', '.join(broken)} are not finite: nothing was merged")
        for name, module in list(model.named_modules()):
            if isinstance(module, TiedHead):
                replace_module(model, name, module.linear)
        for name, layer in layers:
            base, bias = layer.get_base_layer(), effective_bias(layer)
            with torch.no_grad():
                cast(Tensor, base.weight).copy_(weights[name])
                if bias is not None:
                    cast(Tensor, base.bias).copy_(bias)
            replace_module(model, name, base.restored() if isinstance(base, MatrixView) else base)
        for name, module in list(model.named_modules()):
            if isinstance(module, SplitRows):
                replace_module(model, name, module.restored())
        for name, module in self._twins.items():
            replace_module(model, name, module)

    def record(self) -> dict[str, Any]:
        """Method, settings, counts, and per layer name how many were adapted of how many the model has."""
        found = coverage([*self._names, *self.tied_heads()], self._present)
        targets = sorted({name.rpartition(".")[2] for name in self._names})
        buffer = {"memory_buffer": self.memory_buffer} if self.targets == "memory_buffer" else {}
        chosen = {"method": self.name} | self.settings() | buffer
        plain = self.plain_peft()
        loads = {"plain_peft": "loads it" if plain is None else plain}
        return chosen | {"targets": targets, "coverage": found} | loads | self.parameters()

    def identity(self) -> dict[str, Any]:
        """Base weights, settings and adapted modules."""
        modules = sorted(name for name, _ in adapted_layers(self.backbone.model))
        return super().identity() | self.settings() | {"modules": modules}

    def stored_name(self, name: str) -> str:
        """peft's own name of a tensor in its files: without the adapter's, below its wrappers."""
        return f"base_model.model.{name.replace(f'.{ADAPTER}', '')}"

    def write(self, folder: Path) -> None:
        """Write the tensors, their identity, and peft's config where plain peft can take them up."""
        super().write(folder)
        if self.plain_peft() is None:
            self._plain_config().save_pretrained(str(folder))

    def plain_peft(self) -> str | None:
        """Why plain peft cannot take this adapter up with the same outputs; None where it can."""
        model = self.backbone.model
        mixed = mixers(model)
        if self._twins:
            return f"peft adapts {next(iter(self._twins))} apart from the layer that it shares its matrix with"
        for name, layer in adapted_layers(model):
            parent, _, leaf = name.rpartition(".")
            if isinstance(layer.get_base_layer(), MatrixView) or isinstance(model.get_submodule(parent), SplitRows):
                return f"peft has no adapter for {name} as it is used here"
            if parent in mixed and leaf in REFUSED_BY_PEFT:
                why = "refuses it" if leaf != "dt_proj" else "adapts its calls, and the model reads its weight"
                return f"{name}: plain peft {why}; leave {leaf} out of peft.targets, or merge to export"
        return None

    def tied_heads(self) -> list[str]:
        """Name of the output layer where it uses the adapter of the embeddings."""
        return [name for name, module in self.backbone.model.named_modules() if isinstance(module, TiedHead)]

    def _plain_config(self) -> TunerConfig:
        """The config of the tuner as plain peft needs it."""
        config = cast(TunerConfig, self.tuner.peft_config[ADAPTER])
        base = str(self.backbone.model.name_or_path)  # a hub's name; of a folder here, nobody elsewhere would find it
        fields: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None if Path(base).exists() else base or None,
        }
        if isinstance(config, AdaLoraConfig):  # else peft expects the tensors without their pruned rows
            fields["rank_pattern"] = None
        head = self.tied_heads()
        if head:  # peft ties the adapters of layers that are both targets
            fields |= {"target_modules": {*cast(set[str], config.target_modules), *head}, "ensure_weight_tying": True}
        plain = copy.copy(config)
        for key, value in fields.items():
            setattr(plain, key, value)
        return plain

    def _as_linear(self, model: PreTrainedModel, names: list[str]) -> list[str]:
        """Put views in the place of layers that the method cannot adapt as they are; names of what it is to adapt."""
        if self.targets == "memory_buffer":
            return split_memory(model, names, self.memory_buffer == "tied")
        for name in names:
            layer = model.get_submodule(name)
            if not isinstance(layer, self.NATIVE):
                replace_module(model, name, MatrixView(layer))
        return names

    @staticmethod
    def _common_faults(min_coverage: float, memory_buffer: str, dropout: float) -> list[str]:
        wrong = [] if 0 <= dropout < 1 else [f"peft.dropout={dropout} must lie in [0, 1)"]
        wrong += [] if 0 <= min_coverage <= 1 else [f"peft.min_coverage={min_coverage} must lie in [0, 1]"]
        if memory_buffer not in MEMORY_BUFFERS:
            wrong.append(f"peft.memory_buffer={memory_buffer} is unknown: use one of {', '.join(MEMORY_BUFFERS)}")
        return wrong
