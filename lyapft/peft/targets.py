"""Which layers an adapter goes on: named sets, lists and expressions; the refusal of what cannot work; coverage."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lyapft.errors import InputError
from lyapft.peft.carry import READ_RAW
from lyapft.peft.memory_buffer import memory_layer
from lyapft.peft.mixers import mixers

if TYPE_CHECKING:
    from lyapft.recurrence import Seam

NAMED = ("auto", "sll", "all", "usual", "memory_buffer")
# The paper's sparse set (SLL): the linear layers around the recurrence, and the embeddings (Halloran et al. 2025).
SLL_OF_A_MIXER = ("x_proj", "in_proj", "out_proj")
LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
USUAL = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2", "smollm3"), LLAMA_LIKE)
USUAL |= {
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
LINEAR = (nn.Linear, Conv1D)
ADAPTABLE = (*LINEAR, nn.Embedding, nn.Conv1d)


def resolve_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Full names of the layers that targets mean, in the model's order.

    `auto` is `sll` for models with selective-scan or SSD mixers and `usual` for others. `sll`: x_proj, in_proj and
    out_proj of the mixers, and the input embeddings. `all`: every linear layer, an output layer that is tied to the
    embeddings by way of these. `memory_buffer`: the layers whose rows make Δ, B and C. Matrices that are no
    layer's (Zamba's x_proj_weight, fused experts) are in no set; the coverage counts them, see `raw_counts`.

    Raises:
        InputError: a set that the model has not, an invalid expression, or a name that matched nothing to adapt.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, ADAPTABLE)}
    if isinstance(targets, str):
        chosen = _named_set(model, targets, modules) if targets in NAMED else _matching_expression(targets, modules)
    else:
        chosen = _matching_names(model, list(targets), modules)
    return [name for name in modules if name in chosen]


def _named_set(model: PreTrainedModel, which: str, modules: dict[str, nn.Module]) -> set[str]:
    mixed, kind = mixers(model), str(model.config.model_type)
    if which == "auto":
        which = "sll" if mixed else "usual"
    if which == "all":
        head, linear = tied_head(model), {name for name, m in modules.items() if isinstance(m, LINEAR)}
        return linear if head is None else linear - {head} | {_embeddings(model)}
    if which == "usual" and kind in USUAL:
        return _matching_names(model, USUAL[kind], modules)
    if which == "sll" and mixed:
        around = {f"{name}.{leaf}" for name in mixed for leaf in SLL_OF_A_MIXER}
        return around & set(modules) | {_embeddings(model)}
    if which == "memory_buffer" and mixed:
        return {f"{name}.{memory_layer(name, mixer)}" for name, mixer in mixed.items()}
    known = "models with selective-scan or SSD mixers" if which != "usual" else ", ".join(USUAL)
    raise InputError(
        f"peft.targets={which} is not defined for {kind} models (only for {known}): name modules, "
        f"peft.targets=[…]; this model has: {', '.join(sorted(leaf_counts(model)))}"
    )


def _matching_names(model: PreTrainedModel, wanted: list[str], modules: Iterable[str]) -> set[str]:
    if not wanted:
        raise InputError("peft.targets is empty: name at least one module, or use peft=none for full fine-tuning")
    matched = {target: [n for n in modules if n == target or n.endswith(f".{target}")] for target in wanted}
    nothing = [target for target, names in matched.items() if not names]
    if nothing:
        raise InputError(
            f"peft.targets: {', '.join(map(repr, nothing))} matched no linear, embedding or convolution layer of the "
            f"{model.config.model_type} model; it has: {', '.join(sorted(leaf_counts(model)))}"
        )
    return {name for names in matched.values() for name in names}


def _matching_expression(expression: str, modules: Iterable[str]) -> set[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise InputError(
            f"peft.targets={expression!r} is neither {', '.join(NAMED)} nor a regular expression: {error}"
        ) from error
    names = {name for name in modules if pattern.fullmatch(name)}
    if not names:
        example = next(iter(modules), "none")
        raise InputError(
            f"peft.targets={expression!r} matched no linear, embedding or convolution layer: it is none of the sets "
            f"{', '.join(NAMED)}, and as a regular expression it must match a full module name, such as {example!r}"
        )
    return names


def refuse_dead(model: PreTrainedModel, names: Iterable[str], seam: Seam, dropout: float) -> None:
    """Refuse an output layer that is only another name of the embeddings, and dropout where an adapter has no input.

    Raises:
        InputError: naming every such module and why.
    """
    raw = {layer.name: seam.reads_raw(layer) for layer in seam.layers}
    raw = {name: raw.get(name, frozenset(READ_RAW)) for name in mixers(model)}  # without a seam, any kernel may run
    head, wrong = tied_head(model), []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if name == head:
            source = _embeddings(model)
            wrong.append(f"{name} shares its matrix with {source}: target {source}, whose adapter acts on both")
        elif dropout > 0 and (
            leaf in raw.get(parent, ()) or isinstance(model.get_submodule(name), nn.Embedding | nn.Conv1d)
        ):
            wrong.append(f"{name} is read as a matrix, which has no input to drop: use peft.dropout=0 or leave it out")
    if wrong:
        raise InputError("peft.targets:\n" + "\n".join(wrong))


def coverage(names: Iterable[str], present: dict[str, int]) -> dict[str, dict[str, int]]:
    """Per layer name, the last part of the full one, how many are adapted of how many the model has."""
    adapted = Counter(name.rpartition(".")[2] for name in names)
    return {leaf: {"adapted": adapted[leaf], "present": count} for leaf, count in sorted(present.items())}


def refuse_gaps(names: Iterable[str], present: dict[str, int], least: float) -> None:
    """Refuse targets that miss too many of the layers of a name that they reach.

    Raises:
        InputError: naming each, with its coverage.
    """
    found = {leaf: counts for leaf, counts in coverage(names, present).items() if counts["adapted"]}
    gaps = [
        f"{leaf} on {counts['adapted']} of {counts['present']} layers"
        for leaf, counts in found.items()
        if counts["adapted"] < least * counts["present"]
    ]
    if gaps:
        raise InputError(
            f"peft.targets reach {', '.join(gaps)}, less than peft.min_coverage={least:g}: mend them, or set "
            "peft.min_coverage to the share that you mean"
        )


def shared_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of the named layers those whose matrix is that of one before them, and which (the shared blocks of a Zamba)."""
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(model.get_submodule(name).weight), name) for name in names}
    return {name: owner for name, owner in owners.items() if owner != name}


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
    return dict(Counter(n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, ADAPTABLE)))


def raw_counts(model: nn.Module) -> dict[str, int]:
    """How many projections the model has that are bare parameters, by name: no adapter here can go on them.

    Zamba's x_proj_weight and dt_proj_weight are such, and the fused experts of mixtures. The coverage shows them as
    not adapted.
    """
    found: Counter[str] = Counter()
    for owner, module in model.named_modules():
        matrices = {} if isinstance(module, ADAPTABLE) else dict(module.named_parameters(recurse=False))
        for name, parameter in matrices.items():
            if parameter.dim() > 1 and (name == "weight" or ("proj" in name and not name.endswith("bias"))):
                found[owner.rpartition(".")[2] if name == "weight" else name] += 1
    return dict(found)


def _embeddings(model: PreTrainedModel) -> str:
    return name_of(model, model.get_input_embeddings())
