"""The reference steps against what transformers' models really do to their caches for one token.

Each row builds a tiny random model, prefills a few tokens, feeds one more, and compares the state that the model's own
update left with `lyapft.lyapunov.steps` on the inputs that this update got.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from lyapft.lyapunov import steps
from tests.tolerances import TOL

CLOSE = TOL[torch.float32]
Pair = tuple[Tensor, Tensor]  # (reference in float64, what the model left)


def selective_scan(call: dict[str, Any], after: Any) -> list[Pair]:
    dt, bias = call["dt"].double(), call["dt_bias"].double()
    B = call["B"].double()
    delta = F.softplus(dt + bias)
    expected = steps.selective_scan(
        call["state"].double(), delta, call["A"].double(), B, call["hidden_states"].double()
    )
    return [(expected, call["after"])]


def ssd(call: dict[str, Any], after: Any) -> list[Pair]:
    delta = F.softplus(call["dt"].double() + call["dt_bias"].double())[..., 0]  # the same along the head dim
    heads = call["hidden_states"].shape[1]
    B = call["B"].double().repeat_interleave(heads // call["B"].shape[1], dim=1)
    expected = steps.ssd(call["state"].double(), delta, call["A"].double()[:, 0, 0], B, call["hidden_states"].double())
    return [(expected, call["after"])]


def delta_rule(call: dict[str, Any], after: Any) -> list[Pair]:
    heads = call["value"].shape[2]
    k = call["key"][:, 0].double().repeat_interleave(heads // call["key"].shape[2], dim=1)
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    log_alpha = call["g"][:, 0].double()
    log_alpha = log_alpha if log_alpha.dim() == 3 else log_alpha[..., None].expand_as(k)
    beta, v = call["beta"][:, 0].double(), call["value"][:, 0].double()
    return [(steps.delta_rule(call["initial_state"].double(), log_alpha, beta, k, v), after[1])]


def rwkv4(call: dict[str, Any], after: Any) -> list[Pair]:
    assert call["key"].shape[1] == 1
    numerator, denominator, top = (t.double() for t in call["state"])
    k, v = call["key"][:, 0].double(), call["value"][:, 0].double()
    stored = (steps.unscaled(numerator, top), steps.unscaled(denominator, top))
    expected = steps.rwkv4(*stored, call["time_decay"].double(), k, v)
    numerator, denominator, top = (t.double() for t in after[1])
    found = steps.unscaled(numerator, top), steps.unscaled(denominator, top)
    return list(zip(expected, found, strict=True))


def mlstm(call: dict[str, Any], after: Any) -> list[Pair]:
    C, n, m = (call[name].double() for name in ("cstate", "nstate", "mstate"))
    gates = (call[name][..., 0].double() for name in ("fgate", "igate"))
    stored = (steps.unscaled(C, m[..., None]), steps.unscaled(n, m))
    expected = steps.mlstm(*stored, *gates, call["key"].double(), call["value"].double())
    C, n, m = (t.double() for t in after[1])
    return list(zip(expected, (steps.unscaled(C, m[..., None]), steps.unscaled(n, m)), strict=True))


def short_convolution(call: dict[str, Any], after: Any) -> list[Pair]:
    expected = steps.short_convolution(call["conv_state"].double(), call["hidden_states"][..., 0].double())
    return [(expected, call["after"])]


SIZES = {"vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
MAMBA2 = {"mamba_d_state": 4, "mamba_d_head": 4, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
# model type -> (function that updates the state, how it is read, config)
FAMILIES: dict[str, tuple[str, Callable[[dict[str, Any], Any], list[Pair]], dict[str, Any]]] = {
    "mamba": ("mamba_selective_state_update", selective_scan, {"state_size": 4}),
    "falcon_mamba": ("mamba_selective_state_update", selective_scan, {"state_size": 4}),
    "jamba": (
        "mamba_selective_state_update",
        selective_scan,
        ATTENTION
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2}
        | {"mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False},
    ),
    "zamba": (
        "mamba_selective_state_update",
        selective_scan,
        ATTENTION
        | {"num_hidden_layers": 6, "num_key_value_heads": 2, "attention_head_dim": 8, "n_mamba_heads": 2}
        | {"mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False}
        | {"attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "mamba2": (
        "mamba2_selective_state_update",
        ssd,
        {"state_size": 4, "head_dim": 4, "num_heads": 4, "n_groups": 1, "chunk_size": 8},
    ),
    "bamba": ("mamba2_selective_state_update", ssd, ATTENTION | MAMBA2 | {"attn_layer_indices": [1]}),
    "falcon_h1": ("mamba2_selective_state_update", ssd, ATTENTION | MAMBA2 | {"mamba_d_ssm": 16}),
    "granitemoehybrid": (
        "mamba2_selective_state_update",
        ssd,
        ATTENTION
        | MAMBA2
        | {"shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]}
        | {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "nemotron_h": (
        "mamba2_selective_state_update",
        ssd,
        ATTENTION
        | {"layers_block_type": ["mamba", "attention"], "head_dim": 4, "ssm_state_size": 4, "mamba_num_heads": 4}
        | {"mamba_head_dim": 4, "n_groups": 1, "chunk_size": 8},
    ),
    "zamba2": (
        "mamba2_selective_state_update",
        ssd,
        ATTENTION
        | {"num_key_value_heads": 2, "mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 4}
        | {"layers_block_type": ["mamba", "hybrid"], "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 2},
    ),
    "qwen3_next": ("torch_recurrent_gated_delta_rule", delta_rule, ATTENTION | DELTA | MIXED | MOE | {"head_dim": 4}),
    "qwen3_5_text": ("torch_recurrent_gated_delta_rule", delta_rule, ATTENTION | DELTA | MIXED | {"head_dim": 16}),
    "olmo_hybrid": ("torch_recurrent_gated_delta_rule", delta_rule, ATTENTION | DELTA | MIXED),
    "kimi_linear": (
        "recurrent_kimi_delta_attention",
        delta_rule,
        ATTENTION
        | MIXED
        | {"num_key_value_heads": 2, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "qk_nope_head_dim": 4}
        | {"linear_head_dim": 4, "linear_num_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"moe_intermediate_size": 8, "mlp_layer_types": ["dense", "dense"]},
    ),
    "rwkv": ("rwkv_linear_attention_cpu", rwkv4, {"attention_hidden_size": 8, "context_length": 32}),
    "xlstm": (
        "mlstm_recurrent_step_native",
        mlstm,
        {"hidden_size": 128, "num_heads": 2, "num_blocks": 2, "eos_token_id": 2},
    ),
    "lfm2": ("causal_conv1d_update", short_convolution, ATTENTION | {"layer_types": ["conv", "full_attention"]}),
}


def built(model_type: str, options: dict[str, Any]) -> torch.nn.Module:
    config = AutoConfig.for_model(model_type, **SIZES | options)
    return AutoModelForCausalLM.from_config(config).eval()


def copied(value: Any) -> Any:
    """Tensors as they are now: caches are written in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [copied(part) for part in value] if isinstance(value, tuple | list) else value


def watched(function: Callable, calls: list[tuple[dict[str, Any], Any]]) -> Callable:
    """The function, which also keeps what it got, what it returned, and the state that it overwrote as `after`."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        live = dict(zip(names, args, strict=False)) | kwargs
        call = {name: copied(value) for name, value in live.items()}
        result = function(*args, **kwargs)
        call["after"] = copied(live.get("state", live.get("conv_state")))
        calls.append((call, copied(result)))
        return result

    return wrapper


def one_more_token(model: torch.nn.Module, calls: list[Any], batch: int) -> None:
    """Prefill, forget what was called for it, and feed one token on the cache."""
    ids = torch.randint(3, 31, (batch, 6))
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        cache = {name: out[name] for name in ("past_key_values", "cache_params", "state") if out.get(name) is not None}
        calls.clear()
        model(input_ids=ids[:, :1], use_cache=True, **cache)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_reference_step_is_the_models_own(model_type, monkeypatch):
    name, read, options = FAMILIES[model_type]
    folder = model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    calls: list[tuple[dict[str, Any], Any]] = []
    stock = getattr(module, name)
    monkeypatch.setattr(module, name, watched(getattr(stock, "__wrapped__", stock), calls))
    # transformers' rwkv broadcasts a batch against itself when it decodes: two rows become two tokens
    one_more_token(built(model_type, options), calls, batch=1 if model_type == "rwkv" else 2)
    assert calls, f"{name} was not called"
    for call, after in calls:
        for expected, found in read(call, after):
            assert expected.abs().max() > 0
            assert_close(found.double(), expected, **CLOSE)


def test_the_reference_step_of_rg_lru_is_the_models_own():
    options = ATTENTION | {"num_hidden_layers": 3, "lru_width": 8, "attention_window_size": 8, "head_dim": 4}
    model = built("recurrent_gemma", options)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    layer = next(module for module in model.modules() if type(module).__name__ == "RecurrentGemmaRglru")

    def keep(module: torch.nn.Module, args: tuple[Tensor, Tensor]) -> None:
        if module.recurrent_states is not None:
            kept.append((module.recurrent_states.double(), *args))

    layer.register_forward_pre_hook(keep)
    ids = torch.randint(3, 31, (2, 6))
    with torch.no_grad():
        model(input_ids=ids, use_cache=True)
        kept.clear()
        model(input_ids=ids[:, :1], use_cache=True, position_ids=torch.full((2, 1), 6))
    ((before, x, positions),) = kept
    x = x[:, 0].double().unflatten(-1, (layer.num_attention_heads, -1))

    def gate(weight: Tensor, bias: Tensor) -> Tensor:
        return (torch.einsum("bhi,hij->bhj", x, weight.double()) + bias.double()).sigmoid().flatten(1)

    recurrence = gate(layer.recurrent_gate_weight, layer.recurrent_gate_bias)
    inputs = gate(layer.input_gate_weight, layer.input_gate_bias) * x.flatten(1)
    expected = steps.rg_lru(before, recurrence, layer.recurrent_param.double(), inputs, positions[:, 0] == 0)
    assert_close(layer.recurrent_states.double(), expected, **CLOSE)


def test_prefill_clamps_the_step_sizes_of_mamba2_and_decoding_does_not():
    config = Mamba2Config(**SIZES, state_size=4, head_dim=4, num_heads=4, n_groups=1, chunk_size=8)
    ids = torch.randint(3, 31, (1, 6))
    states = {}
    for limit in ((0.0, float("inf")), (0.0, 1e-3)):
        torch.manual_seed(0)
        config.time_step_limit = limit
        model = Mamba2ForCausalLM(config).eval()
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).cache_params
            prefill = cache.layers[0].recurrent_states[0].clone()
            cache = model(input_ids=ids[:, :1], use_cache=True).cache_params
            for token in ids[:, 1:].split(1, dim=1):
                cache = model(input_ids=token, use_cache=True, cache_params=cache).cache_params
            states[limit] = prefill, cache.layers[0].recurrent_states[0]
    assert_close(*states[(0.0, float("inf"))], **CLOSE)
    prefill, decoded = states[(0.0, 1e-3)]
    assert (decoded - prefill).abs().max() > 0.1 * decoded.abs().max()
