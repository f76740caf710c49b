"""Read checkpoints in the layout of state-spaces/mamba: their config.json and names, as transformers' Mamba, Mamba-2.

The layout: config.json with d_model, n_layer, vocab_size (unpadded), ssm_cfg {layer: Mamba1 | Mamba2, …}, and one
weight file whose names differ from transformers' only in `backbone.embedding`. No tokenizer comes with it.
Source: github.com/state-spaces/mamba: models/config_mamba.py, models/mixer_seq_simple.py, modules/mamba_simple.py and
modules/mamba2.py.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Mamba2Config, MambaConfig, PreTrainedConfig

from lyapft.errors import InputError

TOKENIZER = "EleutherAI/gpt-neox-20b"  # all published state-spaces checkpoints were trained with it
ARCHITECTURES = {"Mamba1": "mamba", "Mamba2": "mamba2"}

# ssm_cfg key -> transformers config field; the defaults are those of the mixer classes in state-spaces/mamba
COMMON = {"d_conv": "conv_kernel", "expand": "expand", "bias": "use_bias", "conv_bias": "use_conv_bias"}
COMMON |= {"dt_min": "time_step_min", "dt_max": "time_step_max", "dt_init_floor": "time_step_floor"}
FIELDS = {
    "mamba": COMMON
    | {
        "d_state": "state_size",
        "dt_rank": "time_step_rank",
        "dt_init": "time_step_init_scheme",
        "dt_scale": "time_step_scale",
    },
    "mamba2": COMMON
    | {
        "d_state": "state_size",
        "headdim": "head_dim",
        "ngroups": "n_groups",
        "chunk_size": "chunk_size",
        "dt_limit": "time_step_limit",
    },
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {"d_state": 16, "d_conv": 4, "expand": 2},
    "mamba2": {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "chunk_size": 256},
}
# how it was computed or initialised, not what it computes
IRRELEVANT = {"layer", "use_fast_path", "use_mem_eff_path", "conv_init", "A_init_range", "sequence_parallel"}
# variants that transformers' classes cannot express, with the value that they can
ONLY = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "d_ssm": None}


def is_layout(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is state-spaces' own rather than transformers'."""
    return "d_model" in config and "n_layer" in config and "model_type" not in config


def architecture(config: Mapping[str, Any]) -> str | None:
    """transformers' name of the architecture; None for a mixer that neither knows."""
    return ARCHITECTURES.get((config.get("ssm_cfg") or {}).get("layer", "Mamba1"))


def faults(config: Mapping[str, Any], file: Path) -> list[str]:
    """What a config asks for that transformers' Mamba classes cannot compute."""
    ssm = config.get("ssm_cfg") or {}
    kind = architecture(config)
    if kind is None:
        return [
            f"{file}: ssm_cfg.layer {ssm.get('layer')!r} is not known: use a checkpoint with Mamba1 or Mamba2 layers"
        ]
    asked = {key: ssm[key] for key, only in ONLY.items() if key in ssm and ssm[key] != only}
    asked |= {f"ssm_cfg.{key}": ssm[key] for key in set(ssm) - set(FIELDS[kind]) - IRRELEVANT - set(ONLY)}
    asked |= {key: config[key] for key in ("d_intermediate", "attn_layer_idx", "bidirectional") if config.get(key)}
    if not config.get("rms_norm", True):
        asked["rms_norm"] = False
    found = [
        f"{file}: {key}={value!r} cannot be converted: transformers' {kind} has no such variant"
        for key, value in asked.items()
    ]
    for key in ("d_model", "n_layer", "vocab_size"):
        value = config.get(key)
        if not isinstance(value, int) or value <= 0:
            found.append(f"{file}: {key} must be a positive whole number, given: {value!r}")
    return found


def to_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config that computes what a state-spaces config does."""
    kind = architecture(config)
    if kind is None:
        raise InputError(
            f"ssm_cfg.layer {config.get('ssm_cfg')!r} is not known: use a checkpoint with Mamba1 or Mamba2 layers"
        )
    ssm = DEFAULTS[kind] | dict(config.get("ssm_cfg") or {})
    fields: dict[str, Any] = {FIELDS[kind][key]: value for key, value in ssm.items() if key in FIELDS[kind]}
    multiple = int(config.get("pad_vocab_size_multiple", 8))
    fields |= {
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "vocab_size": math.ceil(config["vocab_size"] / multiple) * multiple,
        "layer_norm_epsilon": config.get("norm_epsilon", 1e-5),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "bos_token_id": 0,  # <|endoftext|> of TOKENIZER
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if kind == "mamba":
        return MambaConfig(**fields)
    fields["num_heads"] = fields["hidden_size"] * fields["expand"] // fields["head_dim"]
    return Mamba2Config(**fields)


def to_state_dict(weights: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """state-spaces' weight names as transformers'; a tied output matrix is left to the tie."""
    renamed = {name.replace("backbone.embedding.", "backbone.embeddings.", 1): value for name, value in weights.items()}
    if tied:
        renamed.pop("lm_head.weight", None)
    return renamed
