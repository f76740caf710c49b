"""Which modules an adapter goes on: named sets, lists and expressions, and the refusal of those that would be dead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lyapft.errors import InputError

if TYPE_CHECKING:
    from lyapft.recurrence import Seam

# The paper's sparse set (SLL): the linear layers around the recurrence, and the embeddings (Halloran et al. 2025).
SLL = {
    "mamba": ["x_proj", "embeddings", "in_proj", "out_proj"],
    "falcon_mamba": ["x_proj", "embeddings", "in_proj", "out_proj"],
    "mamba2": ["in_proj", "out_proj", "embeddings"],
}
LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
USUAL = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "smollm3"), LLAMA_LIKE)
USUAL |= {
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}

# Modules of a mixer whose weight its forward reads as a matrix, by recurrence family: calling them is bypassed.
READ_RAW = {"selective_scan": {"dt_proj", "conv1d"}, "ssd": {"conv1d"}}
ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, Conv1D)


def resolve_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Full names of the modules that targets mean, in the model's order.

    Raises:
        InputError: an unknown set, an invalid expression, or a name that matched nothing that can be adapted.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, ADAPTABLE)}
    if isinstance(targets, str) and targets not in ("auto", "sll", "usual"):
        return _matching_expression(targets, modules)
    wanted = _named_set(model, targets) if isinstance(targets, str) else list(targets)
    if not wanted:
        raise InputError("peft.targets is empty: name at least one module, or use peft=none for full fine-tuning")
    matched = {target: [n for n in modules if n == target or n.endswith(f".{target}")] for target in wanted}
    nothing = [target for target, names in matched.items() if not names]
    if nothing:
        raise InputError(
            f"peft.targets: {', '.join(map(repr, nothing))} matched no linear, embedding or convolution layer of the "
            f"{model.config.model_type} model; it has: {', '.join(sorted(leaf_counts(model)))}"
        )
    chosen = {name for names in matched.values() for name in names}
    return [name for name in modules if name in chosen]


def _named_set(model: PreTrainedModel, which: str) -> list[str]:
    kind = str(model.config.model_type)
    if which == "auto":
        which = "sll" if kind in SLL else "usual"
    known = SLL if which == "sll" else USUAL
    if kind not in known:
        raise InputError(
            f"peft.targets={which} is not defined for {kind} models (only for {', '.join(known)}): name modules, "
            f"peft.targets=[…]; this model has: {', '.join(sorted(leaf_counts(model)))}"
        )
    return known[kind]


def _matching_expression(expression: str, modules: Iterable[str]) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise InputError(
            f"peft.targets={expression!r} is neither auto, sll, usual nor a regular expression: {error}"
        ) from error
    names = [name for name in modules if pattern.fullmatch(name)]
    if not names:
        example = next(iter(modules), "none")
        raise InputError(
            f"peft.targets={expression!r} matched no linear, embedding or convolution layer; it must match "
            f"a full module name, such as {example!r}"
        )
    return names


def refuse_dead(model: PreTrainedModel, names: list[str], seam: Seam, dropout: float) -> None:
    """Refuse modules whose adapter would never act, and dropout where an adapter acts on the weight.

    Raises:
        InputError: naming every such module and why.
    """
    mixers = {layer.name: layer.family for layer in seam.layers}
    head, kinds = tied_head(model), set(SLL)
    wrong = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if name == head:
            source = name_of(model, model.get_input_embeddings())
            wrong.append(f"{name} shares its matrix with {source}: target {source}, whose adapter acts on both")
        elif leaf in READ_RAW.get(mixers.get(parent, ""), set()):
            wrong.append(f"{name} would be dead: the model reads its weight without calling it")
        elif leaf in ("out_proj", "conv1d") and str(model.config.model_type) in kinds and parent not in mixers:
            wrong.append(
                f"{name} may be dead: no recurrence seam is installed on {parent}, so fused kernels may bypass it"
            )
        elif dropout > 0 and isinstance(model.get_submodule(name), nn.Embedding):
            wrong.append(f"{name} is read as a matrix, which has no input to drop: use peft.dropout=0 or leave it out")
    if wrong:
        raise InputError("peft.targets:\n" + "\n".join(wrong))


def tied_head(model: PreTrainedModel) -> str | None:
    """Name of the output layer if it shares its matrix with the input embeddings."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        return None
    return name_of(model, head)


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """Full name of a module of the model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def leaf_counts(model: nn.Module) -> dict[str, int]:
    """How many layers the model has that could be adapted, by the last part of their names."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, ADAPTABLE):
            leaf = name.rpartition(".")[2]
            counts[leaf] = counts.get(leaf, 0) + 1
    return counts
