"""Bytes and operations of a cell, counted on a model without weights.

Letters: V vocabulary. Every rule is a line that can be checked by hand; what a step really holds is measured where it
can be (`calibration`), and this says which part of it is what.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lyapft import backbone, peft, recurrence
from lyapft.backbone import Backbone
from lyapft.backbone.source import plain_dims
from lyapft.config import ModelConfig
from lyapft.errors import InputError
from lyapft.precision.strategy import MIXED, TRUE_HALF

FULL, HALF = 4, 2  # bytes of a number
LOGIT_BYTES = 3 * FULL  # at the loss's backward: log-softmax, its gradient and that of the loss, in float32
SCAN_OPERATIONS = 9  # per token, channel and state: Gu & Dao 2024, appendix on the complexity of the selective scan


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment of a training step, by what they hold."""

    parameters: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int = 0  # on a CPU: code and libraries of the process that trains

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def training(self) -> int:
        """What a record calls `peak_bytes`: all but the process."""
        return self.total - self.process


@dataclass(frozen=True)
class Sizes:
    """What is counted on the skeleton of a cell's model.

    Attributes:
        base, adapters: parameters of the model without and of its adapters, shared ones once.
        trainable: parameters that train.
        weights: of linear layers, the output layer among them: each is multiplied once per token.
        vocabulary: rows of the output layer.
        kept: bytes per token that autograd keeps of the blocks.
        scan: operations per token of the recurrences, forward.
        attention: operations per token and token before it, forward.
        recurrent: layers with a recurrence.
    """

    base: int
    adapters: int
    trainable: int
    weights: int
    vocabulary: int
    kept: int
    scan: int
    attention: int
    recurrent: int = 0

    def training_operations(self, length: int) -> float:
        """Floating-point operations per token of a training step on rows of `length` tokens.

        Two per weight and token forward, two for the gradients of what flows, two for those of the weights that train
        (Kaplan et al. 2020, §2.1; a frozen weight needs no gradient of its own).
        """
        flow = 2 * (2 * (self.weights + self.adapters) + self.scan + self.attention * length / 2)
        return flow + 2 * min(self.trainable, self.weights) + self.scan

    def scoring_operations(self, length: int) -> float:
        """The same of a forward pass."""
        return 2 * (self.weights + self.adapters) + self.scan + self.attention * length / 2

    def memory(self, precision: str, tokens: int, activations: int | None = None, process: int = 0) -> Memory:
        """Bytes of a step with `tokens` in flight.

        Args:
            precision: name of the number format.
            activations: bytes that were measured; None counts `kept` and, under autocast, the weights' half copies.
        """
        stored = HALF if precision in TRUE_HALF else FULL
        learnt = HALF if precision.startswith("bf16_true") else FULL  # fp16 keeps gradients and moments in float32
        if activations is None:
            activations = self.kept * tokens + (HALF * self.weights if precision in MIXED else 0)
        return Memory(
            parameters=stored * self.base,
            adapters=stored * self.adapters,
            gradients=learnt * self.trainable,
            optimizer=2 * learnt * self.trainable,
            activations=activations,
            logits=LOGIT_BYTES * self.vocabulary * tokens,
            process=process,
        )


def count(cfg: DictConfig) -> Sizes:
    """Sizes of a cell; loads no weights and asks no hub.

    Raises:
        InputError: the architecture of the model is not known here.
    """
    model = architecture(cfg.model)
    base = {id(p): p.numel() for p in model.parameters()}
    weights = [m for m in model.modules() if isinstance(m, nn.Linear)]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    scan, attention = _recurrent_operations(model), _attention_operations(model)
    multiplied = sum(m.weight.numel() for m in weights)
    operand = HALF if cfg.precision.name in MIXED | TRUE_HALF else FULL
    trains = cfg.trainer.steps > 0
    kept = sum(_kept(model, operand)) if trains else 0
    layers = sum(recurrence.forward.family_of(module) is not None for module in model.modules())
    _attach(cfg, model)
    total = {id(p): p for p in model.parameters()}
    return Sizes(
        base=sum(base.values()),
        adapters=sum(p.numel() for key, p in total.items() if key not in base),
        trainable=sum(p.numel() for p in total.values() if p.requires_grad) if trains else 0,
        weights=multiplied,
        vocabulary=vocabulary,
        kept=kept,
        scan=scan,
        attention=attention,
        recurrent=layers,
    )


def architecture(cfg: ModelConfig) -> PreTrainedModel:
    """The model of a config without its weights: from a folder here, or from `model.dims`."""
    if cfg.path is not None and Path(cfg.path).expanduser().is_dir():
        return backbone.skeleton(cfg).model
    dims = plain_dims(cfg)
    if not dims:
        raise InputError(f"model={cfg.name}: its sizes are not known here; give model.path=FOLDER")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**dims))
    model.tie_weights()
    return cast(PreTrainedModel, model)


def _attach(cfg: DictConfig, model: PreTrainedModel) -> None:
    bare = Backbone(model, cast(PreTrainedTokenizerBase, None), cfg.model.name, model.config.model_type, "", None, None)
    seam = recurrence.install(model, "torch", device="cpu")
    if found := peft.faults(cfg.peft):
        raise InputError("\n".join(found))
    instantiate(cfg.peft).attach(bare, seam)


def _kept(model: PreTrainedModel, operand: int) -> Iterator[int]:
    """Bytes per token: inputs and outputs of linear layers and convolutions, what norms and recurrences read."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield operand * (module.in_features + module.out_features)
        elif isinstance(module, nn.Conv1d):
            yield operand * module.out_channels
        elif "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            yield FULL * module.weight.numel()
        elif recurrence.forward.family_of(module) is not None:
            yield 2 * FULL * _channels(module)


def _channels(mixer: nn.Module) -> int:
    return cast(int, mixer.intermediate_size)


def _recurrent_operations(model: PreTrainedModel) -> int:
    mixers = [m for m in model.modules() if recurrence.forward.family_of(m) is not None]
    return sum(SCAN_OPERATIONS * _channels(m) * cast(int, m.ssm_state_size) for m in mixers)


def _attention_operations(model: PreTrainedModel) -> int:
    """Two products of queries, keys and values: 4 per channel, token and token before it."""
    if any(recurrence.forward.family_of(m) is not None for m in model.modules()):
        return 0
    return 4 * int(model.config.num_hidden_layers) * int(model.config.hidden_size)
