"""Weights that carry their adapter: whoever reads them gets the adapted ones, gradients included, on every path."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis.strategies import booleans, integers, sampled_from
from torch import Tensor, nn
from torch.testing import assert_close

from lyapft.errors import InputError
from lyapft.peft import Lora, adapted_layers, effective_weight
from lyapft.peft.carry import READ_RAW
from lyapft.peft.mixers import mixers
from lyapft.peft.views import MatrixView, SplitRows
from tests.peft_models import DIMS, HYBRIDS, MAMBAS, TOKENS, attached, backbone, logits, randomize, train
from tests.tolerances import TOL

EVERYTHING = {
    "mamba": ["in_proj", "x_proj", "dt_proj", "conv1d", "out_proj"],
    "mamba2": ["in_proj", "conv1d", "out_proj"],
}


def random_lora(kind: str, **settings: object) -> Lora:
    """LoRA on every layer of the mixers, its factors away from their initial values."""
    strategy = Lora(**({"targets": EVERYTHING[kind], "r": 3} | settings))  # type: ignore[arg-type]
    attached(kind, strategy)
    randomize(strategy)
    return strategy


def called(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What calling an adapted linear layer gives, without its bias."""
    bias = layer.get_base_layer().bias
    return layer(inputs) if bias is None else layer(inputs) - bias


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", MAMBAS)
def test_a_weight_that_is_read_is_the_one_that_is_called(kind: str, dora: bool) -> None:
    for name, layer in adapted_layers(random_lora(kind, dora=dora).backbone.model.double()):
        base = layer.get_base_layer()
        if isinstance(base, MatrixView):
            continue
        inputs = torch.randn(5, base.in_features, dtype=torch.float64)
        assert_close(F.linear(inputs, effective_weight(layer)), called(layer, inputs), **TOL[torch.float64])
        if name.rpartition(".")[2] in READ_RAW:
            assert torch.equal(layer.weight, effective_weight(layer)), name
            assert not torch.allclose(layer.weight, base.weight), name


@pytest.mark.parametrize("kind", MAMBAS)
def test_reading_a_weight_gives_the_adapter_the_gradient_of_a_call(kind: str) -> None:
    strategy = random_lora(kind)
    for _, layer in adapted_layers(strategy.backbone.model):
        if isinstance(layer.get_base_layer(), MatrixView):
            continue
        inputs = torch.randn(5, layer.get_base_layer().in_features)
        factors = [p for p in layer.parameters() if p.requires_grad]
        by_call = torch.autograd.grad(called(layer, inputs).square().sum(), factors)
        by_reading = torch.autograd.grad(F.linear(inputs, effective_weight(layer)).square().sum(), factors)
        for a, b in zip(by_call, by_reading, strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MAMBAS)
def test_the_delta_of_a_depthwise_convolution_is_its_low_rank_matrix(kind: str) -> None:
    """peft's own adapter of a grouped convolution mixes channels and cannot be merged: a view has it as (C, K)."""
    strategy = random_lora(kind, alpha=6.0)
    conv = mixers(strategy.backbone.model).popitem()[1].conv1d
    base = conv.get_base_layer()
    a_RK, b_CR = conv.lora_A["default"].weight, conv.lora_B["default"].weight
    expected = base.weight.double() + 6.0 / 3 * (b_CR.double() @ a_RK.double())
    assert conv.weight.shape == (b_CR.shape[0], 1, a_RK.shape[1])
    assert_close(conv.weight.squeeze(1).double(), expected, rtol=1e-6, atol=1e-6)
    inputs = torch.randn(2, b_CR.shape[0], 9)
    by_definition = F.conv1d(inputs, conv.weight, conv.bias, padding=a_RK.shape[1] - 1, groups=b_CR.shape[0])
    assert_close(conv(inputs), by_definition, **TOL[torch.float32])


@pytest.mark.parametrize("kind", MAMBAS)
def test_adapters_act_with_the_seam_and_without_it(kind: str) -> None:
    base, seam = backbone(kind)
    strategy = Lora(targets=EVERYTHING[kind])
    strategy.attach(base, seam)
    randomize(strategy)
    through_the_seam = logits(base.model)
    seam.remove()
    assert_close(logits(base.model), through_the_seam, **TOL[torch.float32])
    gradients(strategy)
    assert all(p.grad is not None and p.grad.any() for p in strategy.trainable_parameters())
    strategy.merge()
    assert_close(logits(base.model), through_the_seam, **TOL[torch.float32])


def gradients(strategy: Lora) -> list[Tensor]:
    model = strategy.backbone.model.train()
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return [p.grad.clone() for p in strategy.trainable_parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", MAMBAS)
def test_gradients_are_those_of_the_merged_model(kind: str) -> None:
    """dL/dA = s Bᵀ dL/dW and dL/dB = s dL/dW Aᵀ, dL/dW from an ordinary model with the merged weights."""
    strategy = random_lora(kind, alpha=6.0)
    got = {n: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for n, layer in all_layers(strategy)}
    gradients(strategy)
    merged = copy.deepcopy(strategy)
    merged.merge()
    model = merged.backbone.model.train()
    model.requires_grad_(True).zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, (a, b) in got.items():
        dense = model.get_submodule(name).weight.grad.flatten(1)
        assert_close(a.grad, 2.0 * b.detach().T @ dense, rtol=1e-3, atol=1e-6, msg=name)
        assert_close(b.grad, 2.0 * dense @ a.detach().T, rtol=1e-3, atol=1e-6, msg=name)


def all_layers(strategy: Lora) -> list[tuple[str, nn.Module]]:
    return adapted_layers(strategy.backbone.model)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", MAMBAS)
def test_adapted_models_survive_copying_checkpointing_and_state_dicts(kind: str) -> None:
    strategy = random_lora(kind)
    model = strategy.backbone.model
    expected, plain = logits(model), gradients(strategy)
    twin = copy.deepcopy(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.activation_checkpointing_enable()
    for a, b in zip(gradients(strategy), plain, strict=True):
        assert_close(a, b, **TOL[torch.float32])
    model.activation_checkpointing_disable()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(twin), expected)
    model.load_state_dict(state)
    assert torch.equal(logits(model), expected)


def test_carrying_leaves_the_names_of_the_tensors_as_peft_has_them() -> None:
    names = set(random_lora("mamba").backbone.model.state_dict())
    x_proj = {n.removeprefix("backbone.layers.0.mixer.") for n in names if ".0.mixer.x_proj." in n}
    assert x_proj == {
        "x_proj.base_layer.weight",
        "x_proj.lora_A.default.weight",
        "x_proj.lora_B.default.weight",
    }


@pytest.mark.parametrize("kind", MAMBAS)
def test_a_compiled_block_carries_its_adapters(kind: str) -> None:
    strategy = random_lora(kind)
    mixer = mixers(strategy.backbone.model).popitem()[1]

    def read(x: Tensor) -> Tensor:
        return F.conv1d(mixer.out_proj(x).transpose(1, 2), mixer.conv1d.weight[:16], None, padding=3, groups=16)

    inputs = torch.randn(2, 6, mixer.intermediate_size)
    factors = [p for m in (mixer.out_proj, mixer.conv1d) for p in m.parameters() if p.requires_grad]
    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    assert_close(compiled(inputs), read(inputs), **TOL[torch.float32])
    for a, b in zip(*(torch.autograd.grad(f(inputs).square().sum(), factors) for f in (compiled, read)), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_rounded_once(dtype: torch.dtype) -> None:
    strategy = random_lora("mamba")
    strategy.backbone.model.to(dtype)
    for _, layer in adapted_layers(strategy.backbone.model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        exact = layer.get_base_layer().weight.double() + 16 / 3 * b.double() @ a.double()
        assert (
            torch.equal(effective_weight(layer), exact.float().to(dtype))
            or (
                (effective_weight(layer).double() - exact).abs()
                <= exact.abs() * 2 ** (-8 if dtype == torch.bfloat16 else -11)
            ).all()
        )
    with torch.autocast("cpu", torch.bfloat16):  # autocast changes nothing: it is not a matmul of the forward pass
        assert effective_weight(layer).dtype == dtype


@pytest.mark.parametrize("kind", [*MAMBAS, *HYBRIDS])
def test_dt_proj_and_convolutions_are_alive_and_merge_in_every_family(kind: str) -> None:
    leaves = {leaf for m in mixers(backbone(kind)[0].model).values() for leaf, _ in m.named_children()}
    strategy = Lora(targets=sorted(leaves & {"dt_proj", "conv1d"}))
    attached(kind, strategy)
    model = strategy.backbone.model
    before = logits(model)
    train(strategy, steps=3)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in strategy.trainable_parameters())
    adapted = logits(model)
    assert (adapted - before).abs().max() > 1e-6
    strategy.merge()
    assert not adapted_layers(model)
    assert_close(logits(model), adapted, **TOL[torch.float32])
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in backbone(kind)[0].model.named_parameters()
    }


# ---- views


@given(seed=integers(0, 999), bias=booleans(), kind=sampled_from(["conv", "embedding"]))
def test_a_matrix_view_does_what_its_layer_does_and_gives_it_back(seed: int, bias: bool, kind: str) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv1d(5, 5, 3, padding=2, groups=5, bias=bias)
    layer, inputs = (conv, torch.randn(2, 5, 7)) if kind == "conv" else (nn.Embedding(9, 4), torch.arange(9))
    expected, state = layer(inputs), {n: p.clone() for n, p in layer.state_dict().items()}
    view = MatrixView(layer)
    assert view.weight.dim() == 2
    assert torch.equal(view(inputs), expected)
    with torch.no_grad():
        view.weight.mul_(2.0)
    restored = view.restored()
    assert torch.equal(restored.weight, 2 * state["weight"])
    assert restored.state_dict().keys() == state.keys()


@given(seed=integers(0, 999), bias=booleans(), first=integers(1, 5))
def test_rows_apart_are_the_layer_they_came_from(seed: int, bias: bool, first: int) -> None:
    torch.manual_seed(seed)
    linear, inputs = nn.Linear(3, 7, bias=bias), torch.randn(2, 4, 3)
    expected, weight = linear(inputs), linear.weight.clone()
    split = SplitRows(linear, {"one": first, "two": 7 - first})
    assert_close(split(inputs), expected, **TOL[torch.float32])
    assert torch.equal(split.weight, weight)
    restored = split.restored()
    assert torch.equal(restored(inputs), expected)
    with pytest.raises(ValueError, match="do not make up the 7 rows"):
        SplitRows(nn.Linear(3, 7), {"one": 3})


# ---- the memory buffer


@pytest.mark.parametrize("buffer", ["tied", "untied"])
@pytest.mark.parametrize("kind", [k for k in DIMS if k not in ("llama", "gpt_neox", "zamba")])
def test_the_memory_buffer_alone_is_adapted_and_merges(kind: str, buffer: str) -> None:
    strategy = Lora(targets="memory_buffer", memory_buffer=buffer, r=2)
    attached(kind, strategy)
    base = {n: p.clone() for n, p in backbone(kind)[0].model.named_parameters()}
    randomize(strategy, scale=0.2)
    model = strategy.backbone.model
    adapted = logits(model)
    strategy.merge()
    assert_close(logits(model), adapted, **TOL[torch.float32])
    changed = {n: p - base[n] for n, p in model.named_parameters() if not torch.equal(p, base[n])}
    assert len(changed) == len(mixers(model))
    for name, delta in changed.items():
        mixer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        states = mixer.ssm_state_size * getattr(mixer, "n_groups", 1)
        rows = (
            {"dt": mixer.time_step_rank, "B": states, "C": states}
            if "x_proj" in name
            else {"rest": 2 * mixer.intermediate_size, "B": states, "C": states, "dt": mixer.num_heads}
        )
        ranks = [int(torch.linalg.matrix_rank(block, atol=1e-4)) for block in delta.split(list(rows.values()))]
        assert dict(zip(rows, ranks, strict=True)).get("rest", 0) == 0
        total = int(torch.linalg.matrix_rank(delta, atol=1e-4))
        assert total == (2 if buffer == "tied" else sum(ranks)), (ranks, total)


def test_untied_blocks_have_a_v_each() -> None:
    counts = {}
    for buffer in ("tied", "untied"):
        strategy = attached("mamba", Lora(targets="memory_buffer", memory_buffer=buffer, r=2))
        counts[buffer] = strategy.parameters()["parameters_trainable"]
        assert strategy.record()["memory_buffer"] == buffer
        assert strategy.record()["coverage"]["x_proj"] == {"adapted": 2, "present": 2}
    inputs, rows, r, layers = 32, 1 + 4 + 4, 2, 2
    assert counts["tied"] == layers * r * (inputs + rows)
    assert counts["untied"] == layers * r * (3 * inputs + rows)


def test_a_mixer_that_has_no_layer_for_the_memory_buffer_is_named() -> None:
    with pytest.raises(InputError, match=r"layers\.0\.mamba \(ZambaMambaMixer\) makes Δ, B and C without a layer"):
        attached("zamba", Lora(targets="memory_buffer"))
