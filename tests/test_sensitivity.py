"""Sensitivity of tiny models of every architecture: one interface, against finite differences and exact cases."""

from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from lyapft import recurrence, sensitivity
from lyapft.errors import InputError

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"intermediate_size": 32, "num_attention_heads": 2}
MODELS = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 8},
    "jamba": ATTENTION
    | {"num_key_value_heads": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2}
    | {"num_experts": 1, "num_experts_per_tok": 1, "use_mamba_kernels": False},
    "llama": ATTENTION | {"num_key_value_heads": 1},
    "gpt_neox": ATTENTION,
}
every_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | MODELS[name]))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation: the blocks must do something
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.train()


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 31, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


@every_model
def test_a_perturbation_is_causal_and_proportional(name):
    model, (ids, mask) = built(name), a_batch()
    small, large = (
        sensitivity.perturbation_growth(model, ids, mask, token=3, epsilon=epsilon) for epsilon in (1e-3, 2e-3)
    )
    assert small.logits_BL.shape == (2, 9)
    assert small.hidden_NBL.shape == (2, 2, 9)
    assert small.hidden_NBL[:, :, :3].abs().max() < 1e-6
    assert (small.hidden_NBL[:, :, 3] > 0).all()
    assert (small.logits_BL[:, 4] > 0).all()  # later tokens hear of it
    assert_close(large.hidden_NBL[:, :, 3] / small.hidden_NBL[:, :, 3], torch.full((2, 2), 2.0), rtol=0.05, atol=0)
    assert sensitivity.growth_rate(small.logits_BL, mask, token=3).isfinite().all()


@every_model
def test_the_model_and_the_random_state_are_left_as_they_were(name):
    model, (ids, mask) = built(name), a_batch()
    before = torch.get_rng_state()
    sensitivity.perturbation_growth(model, ids, mask, token=3, epsilon=1e-3)
    sensitivity.closed_loop(model, ids, token=3, epsilon=1e-3, new_tokens=2)
    sensitivity.depth_exponents(model, ids, mask, directions=1)
    assert torch.get_rng_state().equal(before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every_model
def test_shadow_of_float32_is_nothing_and_of_bf16_is_little(name):
    model, (ids, mask) = built(name), a_batch()
    same = sensitivity.shadow(model, ids, mask, nullcontext)
    assert (same.kl, same.top1_agreement) == (0.0, 1.0)
    assert same.deviation_N.tolist() == [0.0, 0.0]
    half = sensitivity.shadow(model, ids, mask, lambda: torch.autocast("cpu", torch.bfloat16))
    assert 0 < half.kl < 0.5
    assert ((half.deviation_N > 0) & (half.deviation_N < 0.2)).all()
    assert half.top1_agreement <= 1


@every_model
def test_directions_grow_block_by_block_as_finite_differences_say(name):
    model, (ids, mask) = built(name), a_batch()
    depth = sensitivity.depth_exponents(model, ids, mask, directions=2, seed=4)
    assert depth.blocks_NBK.shape == (2, 2, 2)
    assert {child.rsplit(".", 1)[0] for child in depth.sublayers} == {n for n, _ in sensitivity.residual_blocks(model)}
    assert all(growth.shape == (2, 2) and growth.isfinite().all() for growth in depth.sublayers.values())
    blocks = dict(sensitivity.residual_blocks(model))
    first, last = (list(blocks.values())[index] for index in (0, -1))
    direction = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(4))[0] * mask[..., None]
    direction = torch.nn.functional.normalize(direction.flatten(1), dim=1).view(direction.shape)
    ends = []
    for sign in (1, -1):
        move = lambda module, args, sign=sign: (args[0] + sign * 5e-3 * direction, *args[1:])  # noqa: E731
        handles = [
            first.register_forward_pre_hook(move),
            last.register_forward_hook(lambda module, args, out: ends.append(sensitivity._first(out))),
        ]
        with torch.no_grad(), sensitivity._removed(handles):
            model.eval()(input_ids=ids, attention_mask=mask, use_cache=False)
    by_difference = torch.linalg.vector_norm(((ends[0] - ends[1]) * mask[..., None]).flatten(1), dim=1) / 1e-2
    assert_close(depth.blocks_NBK[:, :, 0].sum(0).exp().float(), by_difference, rtol=2e-2, atol=0)


@every_model
def test_the_closed_loop_agrees_with_itself_and_not_with_another_prompt(name):
    model, (ids, _) = built(name), a_batch()
    same = sensitivity.closed_loop(model, ids, token=3, epsilon=0.0, new_tokens=6)
    assert same.first_difference_B.tolist() == [6, 6]
    assert same.agreement_B.tolist() == [1.0, 1.0]
    other = sensitivity.closed_loop(model, ids, token=8, epsilon=1e3, new_tokens=6)
    assert other.agreement_B.min() < 1
    assert (other.first_difference_B <= 6 * other.agreement_B).all()


def test_kernels_without_forward_mode_are_named():
    model, (ids, mask) = built("mamba"), a_batch()
    recurrence.install(model, kernel="torch")
    with pytest.raises(InputError, match=r"layers\.0 cannot be differentiated in forward mode.*kernel\.name=stock"):
        sensitivity.depth_exponents(model, ids, mask, directions=1)


def test_a_model_without_blocks_is_refused():
    model = built("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="no list of 7 blocks"):
        sensitivity.residual_blocks(model)
