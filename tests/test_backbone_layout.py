"""Checkpoints in state-spaces' own layout: converted, they compute what independent implementations do."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mambapy.mamba import Mamba as MambapyMamba
from mambapy.mamba import MambaConfig as MambapyConfig
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lyapft import backbone
from lyapft.config import load_choice
from lyapft.errors import InputError
from tests.test_backbone import Malicious, local, tokenizer_folder

__all__ = ["tokenizer_folder"]  # a fixture


def state_spaces_folder(
    folder: Path, tokenizer_folder: Path, config: dict[str, object], weights: dict[str, Tensor]
) -> Path:
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


CONFIG = {
    "d_model": 12,
    "n_layer": 2,
    "vocab_size": 37,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
}


MAMBA1 = CONFIG | {"ssm_cfg": {}, "pad_vocab_size_multiple": 8}  # as in mamba-130m, which names no tie
MAMBA2 = CONFIG | {
    "d_intermediate": 0,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


def mamba1_weights() -> dict[str, Tensor]:
    """Random weights by state-spaces' names: d_model 12, d_inner 24, dt_rank 1, d_state 16, vocabulary padded to 40."""
    weights = {"backbone.embedding.weight": torch.randn(40, 12), "backbone.norm_f.weight": torch.rand(12) + 0.5}
    for layer in range(2):
        mixer = {
            "in_proj.weight": torch.randn(48, 12) / 3,
            "conv1d.weight": torch.randn(24, 1, 4) / 2,
            "conv1d.bias": torch.randn(24) / 4,
            "x_proj.weight": torch.randn(33, 24) / 5,
            "dt_proj.weight": torch.randn(24, 1),
            "dt_proj.bias": torch.randn(24) - 2,
            "A_log": torch.rand(24, 16),
            "D": torch.randn(24),
            "out_proj.weight": torch.randn(12, 24) / 5,
        }
        weights |= {f"backbone.layers.{layer}.mixer.{name}": value for name, value in mixer.items()}
        weights[f"backbone.layers.{layer}.norm.weight"] = torch.rand(12) + 0.5
    return weights | {"lm_head.weight": weights["backbone.embedding.weight"]}


def mamba2_weights() -> dict[str, Tensor]:
    """As above for Mamba-2: d_inner 24, 3 heads of 8, one group, d_state 6, vocabulary padded to 48."""
    weights = {"backbone.embedding.weight": torch.randn(48, 12), "backbone.norm_f.weight": torch.rand(12) + 0.5}
    for layer in range(2):
        mixer = {
            "in_proj.weight": torch.randn(2 * 24 + 2 * 6 + 3, 12) / 3,
            "conv1d.weight": torch.randn(36, 1, 4) / 2,
            "conv1d.bias": torch.randn(36) / 4,
            "dt_bias": torch.randn(3) - 1,
            "A_log": torch.rand(3),
            "D": torch.randn(3),
            "norm.weight": torch.rand(24) + 0.5,
            "out_proj.weight": torch.randn(12, 24) / 5,
        }
        weights |= {f"backbone.layers.{layer}.mixer.{name}": value for name, value in mixer.items()}
        weights[f"backbone.layers.{layer}.norm.weight"] = torch.rand(12) + 0.5
    return weights | {"lm_head.weight": weights["backbone.embedding.weight"]}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def mamba2_logits(w: dict[str, Tensor], tokens_L: Tensor) -> Tensor:
    """Mamba-2 (Dao & Gu 2024, §3 and §7) one token at a time in float64, from state-spaces' names."""
    w = {name: value.double() for name, value in w.items()}
    hidden = w["backbone.embedding.weight"][tokens_L]
    for layer in range(2):
        p = {n.removeprefix(f"backbone.layers.{layer}."): v for n, v in w.items() if f".layers.{layer}." in n}
        projected = rms_norm(hidden, p["norm.weight"]) @ p["mixer.in_proj.weight"].T
        z, xbc, dt = projected.split([24, 36, 3], dim=-1)
        padded = F.pad(xbc.T, (3, 0))
        xbc = F.silu(F.conv1d(padded[None], p["mixer.conv1d.weight"], p["mixer.conv1d.bias"], groups=36)[0].T)
        x, b, c = xbc.split([24, 6, 6], dim=-1)
        dt = F.softplus(dt + p["mixer.dt_bias"])
        state, outputs = torch.zeros(3, 8, 6, dtype=torch.float64), []
        for t in range(len(tokens_L)):
            heads = x[t].view(3, 8)
            decay = torch.exp(-dt[t] * p["mixer.A_log"].exp())
            state = decay[:, None, None] * state + dt[t][:, None, None] * heads[:, :, None] * b[t]
            outputs.append((state @ c[t] + p["mixer.D"][:, None] * heads).flatten())
        gated = rms_norm(torch.stack(outputs) * F.silu(z), p["mixer.norm.weight"])
        hidden = hidden + gated @ p["mixer.out_proj.weight"].T
    return rms_norm(hidden, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


def mambapy_logits(w: dict[str, Tensor], tokens_L: Tensor) -> Tensor:
    """Mamba by an independent library, between embedding and output matrix."""
    model = MambapyMamba(MambapyConfig(d_model=12, n_layers=2, d_state=16, rms_norm_eps=1e-5, pscan=False))
    prefix = "backbone.layers."
    layers = {name.removeprefix("backbone."): value for name, value in w.items() if name.startswith(prefix)}
    model.load_state_dict(layers)
    with torch.no_grad():
        hidden = model(w["backbone.embedding.weight"][tokens_L][None])[0]
        return rms_norm(hidden, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    ("name", "config", "make", "oracle"),
    [
        ("mamba_130m", MAMBA1, mamba1_weights, mambapy_logits),
        ("mamba2_130m", MAMBA2, mamba2_weights, mamba2_logits),
    ],
)
def test_a_state_spaces_checkpoint_computes_what_an_independent_implementation_does(
    name: str, config, make, oracle, tmp_path: Path, tokenizer_folder: Path
) -> None:
    torch.manual_seed(5)
    weights = make()
    cfg = load_choice("model", name)
    cfg.path = str(state_spaces_folder(tmp_path / "checkpoint", tokenizer_folder, config, weights))
    base = backbone.load(cfg)
    tokens = torch.randint(37, (11,))
    with torch.no_grad():
        logits = base.model(input_ids=tokens[None]).logits[0]
    assert logits.shape[-1] == math.ceil(37 / config["pad_vocab_size_multiple"]) * config["pad_vocab_size_multiple"]
    expected = oracle(weights, tokens)
    assert expected.abs().mean() > 0.1
    assert_close(logits.double(), expected.double(), rtol=1e-4, atol=1e-4)  # two float32 networks, not one kernel
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight


def test_a_converted_checkpoint_survives_transformers_own_saving(tmp_path: Path, tokenizer_folder: Path) -> None:
    torch.manual_seed(6)
    folder = state_spaces_folder(tmp_path / "theirs", tokenizer_folder, MAMBA1, mamba1_weights())
    base = backbone.load(local(folder))
    base.model.save_pretrained(tmp_path / "ours")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.randint(37, (2, 7))
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=tokens).logits, reloaded(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3' is not known"),
        ({"d_intermediate": 64}, "d_intermediate=64 cannot be converted"),
        ({"rms_norm": False}, "rms_norm=False cannot be converted"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim=True cannot be converted"),
        ({"ssm_cfg": {"layer": "Mamba2", "colour": 1}}, "ssm_cfg.colour=1 cannot be converted"),
        ({"n_layer": -1}, "n_layer must be a positive whole number"),
    ],
)
def test_variants_that_cannot_be_converted_are_refused(
    change: dict[str, object], message: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    folder = state_spaces_folder(tmp_path / "checkpoint", tokenizer_folder, copy.deepcopy(MAMBA2) | change, {})
    (fault,) = backbone.faults(local(folder))
    assert message in fault


def test_a_state_spaces_checkpoint_without_a_tensor_or_with_code_is_refused(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    weights = mamba1_weights()
    witness = tmp_path / "ran"
    del weights["backbone.layers.1.mixer.D"]
    folder = state_spaces_folder(tmp_path / "checkpoint", tokenizer_folder, MAMBA1, weights)
    with pytest.raises(InputError, match=r"lack 1 tensors of the model, first backbone\.layers\.1\.mixer\.D"):
        backbone.load(local(folder))
    torch.save({"a": Malicious(witness)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        backbone.load(local(folder))
    assert not witness.exists()
