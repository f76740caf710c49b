"""Which parameters of a backbone train: strategies, and the proof that what trains is alive.

A strategy is attached once, saved as safetensors, loaded again onto the same base weights, and merged into an ordinary
model. Letters: B batch, L tokens, V vocabulary, D hidden size, R rank.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from hydra.utils import get_class
from peft import LoraConfig
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lyapft.backbone import Backbone, no_progress_bars
from lyapft.errors import InputError
from lyapft.peft.liveness import Liveness, LivenessError, listed
from lyapft.peft.targets import leaf_counts, refuse_dead, resolve_targets, tied_head
from lyapft.peft.thin import ThinLinear

if TYPE_CHECKING:
    from lyapft.config import LoraPeft, PeftConfig
    from lyapft.recurrence import Seam

__all__ = ["FullFineTuning", "Liveness", "LivenessError", "Lora", "Strategy", "TiedHead", "adapted_layers", "faults"]

ADAPTER = "default"  # peft's name of the one adapter that a model carries here
ADAPTER_FOLDER, WEIGHTS_FOLDER = "adapter", "weights"  # inside the folder of a cell


def faults(cfg: PeftConfig) -> list[str]:
    """Everything wrong with the peft choice that can be known without a model; empty when all is well."""
    return cast("type[Strategy]", get_class(cfg._target_)).faults(cfg)


class Strategy(ABC):
    """A choice of trainable parameters; `attach` comes first, everything else after it."""

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

    @abstractmethod
    def attach(self, backbone: Backbone, seam: Seam) -> None:
        """Choose the trainable parameters of the backbone's model, in place."""

    @abstractmethod
    def save(self, folder: Path) -> str:
        """Write what was trained below a cell's folder, as safetensors; returns where, relative to it."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take up what `save` wrote below a cell's folder; attach first."""

    @abstractmethod
    def merge(self) -> None:
        """Turn the model into an ordinary one of transformers with the same outputs, in place."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What was adapted, for the record of a cell."""


class FullFineTuning(Strategy):
    """Every weight trains."""

    def __init__(self, name: str = "none") -> None:
        super().__init__(name)

    def attach(self, backbone: Backbone, seam: Seam) -> None:
        """Make every parameter trainable."""
        backbone.model.requires_grad_(True)
        self._backbone = backbone

    def save(self, folder: Path) -> str:
        """Write model and tokenizer in transformers' layout."""
        with _written_whole(folder / WEIGHTS_FOLDER) as partial:
            with no_progress_bars():
                self.backbone.model.save_pretrained(partial)
            self.backbone.tokenizer.save_pretrained(partial)
        return f"{WEIGHTS_FOLDER}/"

    def load(self, folder: Path) -> None:
        """Load the weights that `save` wrote.

        Raises:
            InputError: a folder without those weights, or weights of another model.
        """
        model = self.backbone.model
        where, kept = folder / WEIGHTS_FOLDER, {name for name, _ in model.named_parameters()}
        try:
            # by transformers itself: it may store a weight under another name than the model's
            with no_progress_bars():
                saved, info = type(model).from_pretrained(
                    where, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{where} holds no weights of this model: {error}. Give the folder of a finished run"
            ) from error
        weights = {n: p for n, p in saved.named_parameters() if n not in info["missing_keys"]}
        _copy_into(model, weights, kept, where)

    def merge(self) -> None:
        """Nothing to do: the model is an ordinary one already."""

    def record(self) -> dict[str, Any]:
        """Method and counts."""
        return {"method": self.name, "targets": "all"} | self.parameters()


class Lora(Strategy):
    """Low-rank adapters, W + (alpha / r) B A, on chosen modules.

    Where the output matrix is tied to the embeddings, an adapter of the embeddings acts on both: the adapted model
    stays tied, so a merged one is an ordinary tied model.

    Args:
        r: rank, > 0.
        alpha: the update is multiplied by alpha / r.
        dropout: on the adapter's input, in [0, 1).
        targets: `auto` (`sll` on Mamba and Mamba-2, `usual` elsewhere), `sll`, `usual`, a list of module names (a leaf
            such as `in_proj`, or a dotted suffix) or a regular expression over full module names.
    Raises:
        InputError: from the constructor, a value out of range.
    Source: Hu et al. 2021; target sets of Mamba: Halloran et al. 2025.
    """

    def __init__(
        self,
        name: str = "lora",
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "auto",
    ) -> None:
        super().__init__(name)
        wrong = self._range_faults(r, alpha, dropout)
        if wrong:
            raise InputError("\n".join(wrong))
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.targets = targets if isinstance(targets, str) else list(targets)
        self._present: dict[str, int] = {}

    @classmethod
    def faults(cls, cfg: PeftConfig) -> list[str]:
        """Values out of range."""
        lora = cast("LoraPeft", cfg)
        return cls._range_faults(lora.r, lora.alpha, lora.dropout)

    def attach(self, backbone: Backbone, seam: Seam) -> None:
        """Put adapters on the targets; everything else stops training.

        A's initial values come from torch's global generator: seed it first.

        Raises:
            InputError: a target that matches nothing, cannot be adapted, or would be dead because the model reads its
                weight without calling it; dropout where the adapter acts on the weight.
        """
        model = backbone.model
        names = resolve_targets(model, self.targets)
        refuse_dead(model, names, seam, self.dropout)
        self._present, head = leaf_counts(model), tied_head(model)
        config = LoraConfig(
            r=self.r, lora_alpha=cast(int, self.alpha), lora_dropout=self.dropout, target_modules=names, bias="none"
        )
        config._register_custom_module({nn.Linear: ThinLinear})
        with warnings.catch_warnings():
            # peft would tie by training the embedding's adapter as two; `TiedHead` ties it by using the one twice
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            _CheckedLoraModel(model, config, ADAPTER)
        adapted = [name for name, _ in adapted_layers(model)]
        if sorted(adapted) != sorted(names):
            raise RuntimeError(f"peft adapted {sorted(adapted)} where {sorted(names)} was asked for")
        embedding = model.get_input_embeddings()
        if head is not None and isinstance(embedding, LoraEmbedding):
            _replace(model, head, TiedHead(cast(nn.Linear, model.get_submodule(head)), embedding))
        self._backbone = backbone

    def save(self, folder: Path) -> str:
        """Write the adapter's tensors, and what they belong to: base weights, rank, scale, modules."""
        tensors = {n: p.detach().cpu().contiguous() for n, p in self._adapter().items()}
        with _written_whole(folder / ADAPTER_FOLDER) as partial:
            save_file(tensors, partial / "adapter.safetensors", metadata={"format": "pt"})
            text = json.dumps(self._identity(), indent=2) + "\n"
            (partial / "adapter.json").write_text(text, encoding="utf-8")
        return f"{ADAPTER_FOLDER}/"

    def load(self, folder: Path) -> None:
        """Take up the tensors that `save` wrote.

        Raises:
            InputError: no adapter in the folder; one of other base weights, rank, scale or modules.
        """
        where, weights = folder / ADAPTER_FOLDER, folder / ADAPTER_FOLDER / "adapter.safetensors"
        if not weights.is_file() or not (where / "adapter.json").is_file():
            raise InputError(
                f"{where} holds no adapter (adapter.safetensors and adapter.json): give the folder of a finished run"
            )
        saved = json.loads((where / "adapter.json").read_text(encoding="utf-8"))
        for key, mine in self._identity().items():
            if saved.get(key) != mine:
                raise InputError(
                    f"the adapter in {where} was trained with {key}={saved.get(key)}, this one has {key}={mine}: "
                    "give the model and the peft settings that it was trained with"
                )
        _copy_into(self.backbone.model, load_file(weights), set(self._adapter()), where)

    def merge(self) -> None:
        """Add every update to its weight and take the adapters out.

        Raises:
            ValueError: an update that is not finite.
        """
        model = self.backbone.model
        for name, module in list(model.named_modules()):
            if isinstance(module, TiedHead):
                _replace(model, name, module.linear)
        for name, layer in adapted_layers(model):
            layer.merge(safe_merge=True)
            _replace(model, name, layer.get_base_layer())

    def record(self) -> dict[str, Any]:
        """Method, targets, counts, and per module name how many were adapted of how many the model has."""
        adapted: dict[str, int] = {}
        for name, _ in adapted_layers(self.backbone.model):
            leaf = name.rpartition(".")[2]
            adapted[leaf] = adapted.get(leaf, 0) + 1
        coverage = {leaf: {"adapted": adapted.get(leaf, 0), "present": n} for leaf, n in sorted(self._present.items())}
        settings = {"method": self.name, "r": self.r, "alpha": self.alpha, "dropout": self.dropout}
        return settings | {"targets": sorted(adapted), "coverage": coverage} | self.parameters()

    @staticmethod
    def _range_faults(r: int, alpha: float, dropout: float) -> list[str]:
        wrong = [] if r > 0 else [f"peft.r={r} must be greater than 0"]
        wrong += [] if alpha > 0 else [f"peft.alpha={alpha} must be greater than 0"]
        return wrong + ([] if 0 <= dropout < 1 else [f"peft.dropout={dropout} must lie in [0, 1)"])

    def _adapter(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.backbone.model.named_parameters() if p.requires_grad}

    def _identity(self) -> dict[str, Any]:
        modules = sorted(name for name, _ in adapted_layers(self.backbone.model))
        return {
            "method": self.name,
            "r": self.r,
            "alpha": self.alpha,
            "base_hash": self.backbone.hash,
            "modules": modules,
        }


class TiedHead(nn.Module):
    """The output layer of a model whose adapted embeddings are tied to it: h (W + ΔW)ᵀ with their A and B.

    W_VD is the shared matrix and ΔW_VD = s (B_DR A_RV)ᵀ, so the product needs two thin ones: h Wᵀ + s (h B) A.
    """

    def __init__(self, linear: nn.Linear, embedding: LoraEmbedding) -> None:
        super().__init__()
        self.linear = linear
        self._embedding = [embedding]  # in a list: it belongs to the model, and must not be registered a second time

    @property
    def weight(self) -> nn.Parameter:
        """The shared base matrix, V x D, without the update (models ask for its dtype)."""
        return cast(nn.Parameter, self.linear.weight)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Logits, (..., D) -> (..., V)."""
        logits = self.linear(hidden_BLD)
        adapter = self._embedding[0]
        if adapter.disable_adapters or adapter.merged:
            return logits
        thin = F.linear(hidden_BLD, adapter.lora_embedding_B[ADAPTER].T)
        return logits + adapter.scaling[ADAPTER] * F.linear(thin, adapter.lora_embedding_A[ADAPTER].T)


def adapted_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Every layer of a model that carries an adapter, by full name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


class _CheckedLoraModel(LoraModel):
    """peft's LoRA without its refusal of Mamba's out_proj and conv1d by name.

    peft refuses them because fused kernels read their weights raw. `refuse_dead` has checked before, module by module,
    that the seam makes each one live.
    """

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Nothing left to refuse."""


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _copy_into(model: nn.Module, weights: dict[str, Tensor], expected: set[str], folder: Path) -> None:
    """Copy tensors into a model's parameters by name: every one must have its place, every expected one its value."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wrong = sorted(set(weights) - set(parameters)) + sorted(expected - set(weights))
    wrong += [n for n in weights if n in parameters and weights[n].shape != parameters[n].shape]
    if wrong:
        raise InputError(
            f"the weights in {folder} are not those of this model: {listed(wrong)}. Give the run of this model"
        )
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


@contextlib.contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes its name only when all of it is written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():  # from an attempt that was cut off before its record was final
        shutil.rmtree(folder)
    partial.rename(folder)
