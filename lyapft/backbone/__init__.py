"""Load or build a backbone: a causal language model and its tokenizer, in float32, named by its files' content."""

import contextlib
import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lyapft.backbone import source as files
from lyapft.backbone import state_spaces
from lyapft.backbone.source import SCRATCH, STATE_SPACES, Source
from lyapft.config import ModelConfig
from lyapft.errors import InputError

__all__ = ["Backbone", "faults", "fingerprint", "load", "max_positions", "no_progress_bars", "skeleton"]
log = logging.getLogger(__name__)


@dataclass
class Backbone:
    """A model that is ready to be fine-tuned.

    Attributes:
        architecture: transformers' model_type (mamba, mamba2, gpt_neox, llama, …).
        hash: the fingerprint of its files.
        max_positions: the longest sequence that it accepts, in tokens; None where there is no limit.
        trained_length: the length in tokens that it was pretrained on, where its config says so.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    architecture: str
    hash: str
    max_positions: int | None
    trained_length: int | None


def faults(cfg: ModelConfig) -> list[str]:
    """Everything wrong with the model choice that can be known before a weight is read; empty when all is well.

    A hub name that is not in the local cache is fetched here.
    """
    return files.inspect(cfg)[1]


def fingerprint(cfg: ModelConfig) -> str:
    """sha256 over the content of weights, config and tokenizer, never their path; for scratch over dims and tokenizer.

    Raises:
        InputError: any of `faults`.
    """
    return _source(cfg).fingerprint()


def max_positions(cfg: ModelConfig) -> int | None:
    """The longest sequence in tokens that the model accepts, read from its config alone; None where there is no limit.

    Raises:
        InputError: any of `faults`.
    """
    return files.positions(_source(cfg).config)


def load(cfg: ModelConfig) -> Backbone:
    """Load a checkpoint, or build random weights from dimensions (`model.init=scratch`), in float32 on the CPU.

    Random weights come from torch's global generator: seed it first.

    Raises:
        InputError: any of `faults`; weights that do not fit the config, or lack tensors; a tokenizer with more tokens
            than the model has embeddings, or with neither a padding nor an end token.
    """
    found = _source(cfg)
    tokenizer = _tokenizer(found, cfg)
    if found.layout == SCRATCH:
        model = _from_scratch(found, tokenizer)
    elif found.layout == STATE_SPACES:
        model = _from_state_spaces(found)
    else:
        model = _from_transformers(found, cfg)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer in {found.tokenizer_folder} has {len(tokenizer)} tokens but model={cfg.name} embeds only "
            f"{rows}: they do not belong together"
        )
    return _described(found, cfg, model, tokenizer)


def skeleton(cfg: ModelConfig) -> Backbone:
    """The model without weights (on the meta device), with its real tokenizer: for checks before anything is loaded.

    Raises:
        InputError: any of `faults`; a tokenizer or a config that cannot be used.
    """
    found = _source(cfg)
    tokenizer = _tokenizer(found, cfg)
    with torch.device("meta"):
        if found.layout == SCRATCH:
            model = _from_scratch(found, tokenizer)
        elif found.layout == STATE_SPACES:
            model = AutoModelForCausalLM.from_config(state_spaces.to_config(found.config))
        else:
            model = _from_config(found, cfg)
    model.tie_weights()
    return _described(found, cfg, model, tokenizer)


def _described(found: Source, cfg: ModelConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Backbone:
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        name=cfg.name,
        architecture=str(model.config.model_type),
        hash=found.fingerprint(),
        max_positions=files.positions(model.config.to_dict()),
        trained_length=getattr(model.config, "trained_length", None),
    )


def _source(cfg: ModelConfig) -> Source:
    found, wrong = files.inspect(cfg)
    if found is None:
        raise InputError("\n".join(wrong))
    return found


def _tokenizer(found: Source, cfg: ModelConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            found.tokenizer_folder, trust_remote_code=cfg.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a damaged tokenizer file fails in as many ways as there are tokenizer classes
        raise InputError(f"the tokenizer in {found.tokenizer_folder} cannot be read: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"the tokenizer in {found.tokenizer_folder} has neither a padding nor an end-of-text token: "
                "name one in its tokenizer_config.json (pad_token)"
            )
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so which token fills it does not matter
    tokenizer.padding_side = "right"
    return tokenizer


def _from_scratch(found: Source, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    # Some architectures never train the embedding of config.pad_token_id: it must not be the end token's.
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": padding}
    config = AutoConfig.for_model(**(ids | dict(found.config)))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _from_config(found: Source, cfg: ModelConfig) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(
            found.folder, trust_remote_code=cfg.trust_remote_code, local_files_only=True
        )
        return AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
    except Exception as error:  # each config class validates in its own way
        raise InputError(f"{found.folder}/config.json makes no model: {error}") from error


def _from_transformers(found: Source, cfg: ModelConfig) -> PreTrainedModel:
    try:
        with no_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                found.folder,
                dtype=torch.float32,
                trust_remote_code=cfg.trust_remote_code,
                local_files_only=True,
                use_safetensors=found.weights[0].suffix == ".safetensors",
                weights_only=True,  # a .bin file is a pickle: only tensors are taken from it
                output_loading_info=True,
            )
    except Exception as error:  # damaged weights or settings fail in as many ways as there are model classes
        raise InputError(f"the weights in {found.folder} cannot be loaded: {error}") from error
    _check_names(found, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))
    return model


def _from_state_spaces(found: Source) -> PreTrainedModel:
    config = state_spaces.to_config(found.config)
    weights = state_spaces.to_state_dict(_read_weights(found), tied=bool(config.tie_word_embeddings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        missing, unexpected = model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    except RuntimeError as error:
        raise InputError(f"the weights in {found.folder} do not fit its config.json: {error}") from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    _check_names(found, sorted(set(missing) - tied), sorted(unexpected))
    model.tie_weights()
    return model.eval()


def _read_weights(found: Source) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in found.weights:
        try:
            part = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise InputError(f"{file} cannot be read as plain tensors (nothing else is accepted): {error}") from error
        if not isinstance(part, dict) or not all(isinstance(value, Tensor) for value in part.values()):
            raise InputError(f"{file} must hold a dictionary of tensors by name")
        weights.update(part)
    return weights


def _check_names(found: Source, missing: list[str], unexpected: list[str]) -> None:
    """Refuse weights that lack tensors (they would stay random); say which were not used."""
    if missing:
        raise InputError(
            f"the weights in {found.folder} lack {len(missing)} tensors of the model, first {missing[0]}: "
            "fetch the checkpoint again, or correct its config.json"
        )
    if unexpected:
        log.warning(
            "%s holds %d tensors that the model does not use, first %s", found.folder, len(unexpected), unexpected[0]
        )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws a bar while loading; leave its setting as it was."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
