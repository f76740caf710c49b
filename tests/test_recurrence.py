"""The seam against stock transformers: same logits, gradients and decoding, on one instance, and no trace after
removal."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lyapft import recurrence, scan
from lyapft.peft import Lora
from tests.peft_models import TOKENS, backbone, randomize
from tests.tolerances import TOL

NUMBA = not scan.available()["cpu"]
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}
HYBRID = {
    **TINY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
HEADS_2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
CONFIGS = {
    "mamba": {**TINY, "state_size": 5},
    "mamba2": {**TINY, "state_size": 6, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "falcon_mamba": {**TINY, "state_size": 5},
    "jamba": {**HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
    "bamba": {**HYBRID, **HEADS_2, "attn_layer_indices": [1]},
    "falcon_h1": {**HYBRID, **HEADS_2, "mamba_d_ssm": 64, "head_dim": 8},
    "zamba": {
        **HYBRID, "mamba_dt_rank": 4, "mamba_d_state": 5, "num_hidden_layers": 3,
        "layer_types": ["mamba", "hybrid", "hybrid"],
    },
    "zamba2": {
        **HYBRID, "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 16, "n_mamba_heads": 4, "mamba_headdim": 16,
        "num_mem_blocks": 1, "hybrid_layer_ids": [1], "layers_block_type": ["mamba", "hybrid"],
    },
    "granitemoehybrid": {
        **HYBRID, **HEADS_2, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "nemotron_h": {
        **HYBRID, "hybrid_override_pattern": "M*", "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "head_dim": 8,
    },
}  # fmt: skip
FAMILY = dict.fromkeys(["mamba", "falcon_mamba", "jamba", "zamba"], "selective_scan") | dict.fromkeys(
    ["mamba2", "bamba", "falcon_h1", "zamba2", "granitemoehybrid", "nemotron_h"], "ssd"
)
both = pytest.mark.parametrize("kind", ["mamba", "mamba2"])


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])).train()


def pair(kind: str, kernel: str = "auto", require: str | None = None) -> tuple[nn.Module, nn.Module, recurrence.Seam]:
    """A stock model, its twin with the same weights and a seam, and the seam."""
    stock, routed = build(kind), build(kind)
    routed.load_state_dict(stock.state_dict())
    return stock, routed, recurrence.install(routed, kernel, require)


def batch(padding: str | None = None, length: int = 21) -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (3, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :5] = 0
    if padding == "right":
        mask[1, -7:] = 0
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(mask == 0, -100),
        **({"attention_mask": mask} if padding else {}),
    }


def logits_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(actual[0], expected[0], **TOL[torch.float32])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        tolerance = TOL[torch.float32]["rtol"] * scale + 1e-7
        torch.testing.assert_close(actual[1][name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_every_family_of_the_table_equals_stock():
    assert set(recurrence.FAMILIES) == set(FAMILY.values())


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_all_gradients_equal_stock(kind, padding):
    stock, routed, seam = pair(kind)
    assert {layer.family for layer in seam.layers} == {FAMILY[kind]}
    assert_same(logits_and_gradients(routed, batch(padding)), logits_and_gradients(stock, batch(padding)))


@both
@pytest.mark.parametrize("kernel", ["torch", "reference", "stock"])
def test_every_kernel_equals_stock_and_is_recorded(kind, kernel):
    stock, routed, seam = pair(kind, kernel)
    assert_same(logits_and_gradients(routed, batch("left")), logits_and_gradients(stock, batch("left")))
    assert seam.kernels[FAMILY[kind]].startswith(kernel)


@both
def test_a_float64_model_runs_torch_in_float64_and_says_so(kind):
    stock, routed, seam = pair(kind)
    stock.double(), routed.double()
    assert_same(logits_and_gradients(routed, batch("left")), logits_and_gradients(stock, batch("left")))
    assert seam.kernels[FAMILY[kind]] == "torch"
    assert "float64" in seam.fallbacks[FAMILY[kind]]


@pytest.mark.skipif(not NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
def test_the_gradients_of_a_projections_halves_are_joined_in_its_own_layout(kind):
    """Two kernels write them by rows; joined as transformers cuts them they would be turned around twice."""
    _, routed, seam = pair(kind)
    joined = []

    def look(_module, _inputs, output):
        output.register_hook(lambda gradient: joined.append(gradient.is_contiguous()))

    for layer in seam.layers:
        layer.module.in_proj.register_forward_hook(look)
    routed(**batch()).loss.backward()
    assert joined == [True] * len(seam.layers)


def told_by(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and logits of greedy decoding with a cache."""
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    told = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return told.sequences, torch.stack(told.logits, 1)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_prefill_and_decoding_equal_stock(kind, rows, padding):
    stock, routed, _ = pair(kind)
    inputs = {name: t[:rows, :9] for name, t in batch(padding).items() if name != "labels"}
    told = [told_by(model.eval(), inputs) for model in (stock, routed)]
    assert torch.equal(told[0][0], told[1][0])
    torch.testing.assert_close(told[1][1], told[0][1], **TOL[torch.float32])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_reference_is_float64_in_every_operation(kind):
    stock, routed, seam = pair(kind, "reference", require="reference")
    inputs = {"input_ids": batch()["input_ids"][:1, :9], "attention_mask": torch.ones(1, 9)}
    told = [told_by(model.eval(), inputs) for model in (stock, routed)]
    torch.testing.assert_close(told[1][1], told[0][1], **TOL[torch.float32])
    whole, token = (FAMILY[kind], "causal_conv1d"), ", one token"
    assert seam.kernels == dict.fromkeys([*whole, *(name + token for name in whole)], "reference-float64")


@pytest.mark.parametrize(("kind", "format"), [("mamba", torch.float64), ("mamba2", torch.float32)])
def test_decoding_by_the_reference_is_the_whole_sequence(kind, format):
    """To float64, but for Mamba-2's norm, which transformers computes in float32."""
    model, ids = build(kind).double().eval(), batch()["input_ids"]
    recurrence.install(model, "reference")
    tokens, logits = told_by(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with torch.no_grad():
        whole = model(tokens[:, :-1]).logits[:, -logits.shape[1] :]
    torch.testing.assert_close(logits, whole, **TOL[format])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own look at a graph break
@both
def test_a_block_compiles(kind):
    stock, routed, seam = pair(kind)
    compiled = [torch.compile(block, backend="aot_eager") for block in routed.backbone.layers]
    routed.backbone.layers, blocks = nn.ModuleList(compiled), routed.backbone.layers
    calls: list[str] = []
    seam.tap = lambda layer, delta, A: calls.append(layer.name)
    logits, gradients = logits_and_gradients(routed, batch("left"))
    renamed = {name.replace("._orig_mod", ""): gradient for name, gradient in gradients.items()}
    assert_same((logits, renamed), logits_and_gradients(stock, batch("left")))
    assert calls == [layer.name for layer in seam.layers]
    seam.remove()
    for block, other in zip(blocks, stock.backbone.layers, strict=True):
        assert block.mixer.__dict__.keys() == other.mixer.__dict__.keys()


@pytest.mark.skipif(not NUMBA, reason="numba is not installed")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo asks for it
@both
def test_adapters_live_in_a_compiled_block(kind):
    base, seam = backbone(kind)
    seam.remove()
    seam = recurrence.install(base.model, "cpu")
    strategy = Lora(targets="all")
    strategy.attach(base, seam)
    randomize(strategy)
    model = base.model.train()
    expected = logits_and_gradients(model, {"input_ids": TOKENS, "labels": TOKENS})
    compiled = [torch.compile(block, backend="aot_eager") for block in model.backbone.layers]
    model.backbone.layers = nn.ModuleList(compiled)
    logits, gradients = logits_and_gradients(model, {"input_ids": TOKENS, "labels": TOKENS})
    gradients = {name.replace("._orig_mod", ""): gradient for name, gradient in gradients.items()}
    assert all(gradient.any() for name, gradient in gradients.items() if "lora_" in name)
    assert_same((logits, gradients), expected)


@both
def test_the_other_instance_is_untouched_and_removal_leaves_no_trace(kind):
    stock, routed, seam = pair(kind)
    before = {name: dict(module.__dict__) for name, module in stock.named_modules()}
    assert all("forward" in layer.module.__dict__ for layer in seam.layers)
    logits_and_gradients(routed, batch())
    routed.zero_grad()
    seam.remove()
    seam.remove()
    for name, module in routed.named_modules():
        assert module.__dict__.keys() == before[name].keys()
    expected, actual = logits_and_gradients(stock, batch()), logits_and_gradients(routed, batch())
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(actual[1][name], expected[1][name]) for name in expected[1])


@both
def test_the_tap_sees_the_step_sizes_that_ran_and_changes_no_bit(kind):
    _, routed, seam = pair(kind)
    seen: list[tuple[recurrence.Layer, Tensor, Tensor]] = []
    silent = logits_and_gradients(routed, batch("left"))
    seam.tap = lambda *given: seen.append(given)
    tapped = logits_and_gradients(routed, batch("left"))
    assert torch.equal(silent[0], tapped[0])
    assert all(torch.equal(silent[1][name], tapped[1][name]) for name in silent[1])
    assert [layer.name for layer, _, _ in seen] == [layer.name for layer in seam.layers]
    for layer, delta, A in seen:
        mixer = layer.module
        assert torch.equal(A, -torch.exp(mixer.A_log.detach()))
        assert delta.shape == (3, 21, A.shape[0])
        assert delta.dtype == torch.float32
        assert not delta.requires_grad
        assert (delta >= 0).all()
    stock_seam = recurrence.install(copy.deepcopy(build(kind)), "stock")
    told: list[Tensor] = []
    stock_seam.tap = lambda layer, delta, A: told.append(delta)
    stock_seam.layers[0].module(torch.zeros(1, 4, 32))
    bias = mixer.dt_bias if kind == "mamba2" else mixer.dt_proj.bias
    assert told[0].shape == (1, 4, bias.shape[0])


def test_step_sizes_are_clamped_as_the_scan_clamps_them():
    model = build("mamba2")
    for block in model.backbone.layers:
        block.mixer.time_step_limit = (0.01, 0.02)
    seam = recurrence.install(model)
    seen: list[Tensor] = []
    seam.tap = lambda layer, delta, A: seen.append(delta)
    model(**batch())
    assert min(float(delta.min()) for delta in seen) >= 0.01 - 1e-8
    assert max(float(delta.max()) for delta in seen) <= 0.02 + 1e-8


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning"
)  # renamed in transformers 5; both names work
@both
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_and_taps_once(kind, reentrant):
    stock, routed, seam = pair(kind)
    routed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[str] = []
    seam.tap = lambda layer, delta, A: calls.append(layer.name)
    assert_same(logits_and_gradients(routed, batch()), logits_and_gradients(stock, batch()))
    assert calls == [layer.name for layer in seam.layers]


@both
def test_copies_and_state_dicts_carry_no_seam_of_another_model(kind):
    stock, routed, seam = pair(kind)
    assert routed.state_dict().keys() == stock.state_dict().keys()
    calls: list[str] = []
    seam.tap = lambda layer, delta, A: calls.append(layer.name)
    twin = copy.deepcopy(routed)
    file = io.BytesIO()
    seam.tap = None
    torch.save(routed, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        expected = logits_and_gradients(routed, batch())[0]
        assert torch.equal(logits_and_gradients(other, batch())[0], expected)
        own = {id(module) for module in other.modules()}
        forwards = [m.__dict__["forward"] for m in other.modules() if "forward" in m.__dict__]
        assert len(forwards) == 2
        assert all(id(forward.layer.module) in own for forward in forwards)
        assert all(id(layer.module) in own for layer in forwards[0].seam.layers)
        with torch.no_grad():
            next(other.parameters()).add_(1.0)
        assert not torch.equal(logits_and_gradients(other, batch())[0], expected)
    assert calls == []


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_recurrence_stays_in_float32(kind, dtype):
    stock, routed, seam = pair(kind)
    seen: list[Tensor] = []
    seam.tap = lambda layer, delta, A: seen.extend((delta, A))
    with torch.autocast("cpu", dtype=dtype):
        routed_logits, gradients = logits_and_gradients(routed, batch())
        stock_logits, _ = logits_and_gradients(stock, batch())
    exact, _ = logits_and_gradients(stock, batch())
    assert all(t.dtype == torch.float32 for t in seen)
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert all(g.dtype == torch.float32 for g in gradients.values())
    assert (routed_logits.float() - exact).abs().mean() <= 1.2 * (stock_logits.float() - exact).abs().mean()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # asked by peft
def test_an_adapter_on_every_projection_called_as_a_module_gets_a_gradient():
    peft = pytest.importorskip("peft")
    model = build("mamba")
    recurrence.install(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["in_proj", "x_proj"], r=2, init_lora_weights=False)
    )
    adapted(**batch()).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(gradients) == 8
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
