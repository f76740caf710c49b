"""Weights stored in half: what stays in float32, real fits of the shipped models, the update against float64."""

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lyapft import backbone, cell, config, evaluation, recurrence
from lyapft.backbone import Backbone
from lyapft.errors import InputError
from lyapft.module import FineTuner
from lyapft.peft import FullFineTuning, Liveness, Lora, Strategy
from lyapft.precision import Precision, TrueHalfPlugin, build
from lyapft.precision.storage import pinned_as, store_in
from lyapft.probes import AdapterLiveness
from tests.test_cell import prepared, weights
from tests.test_config import composed
from tests.test_precision import cfg, fit
from tests.tolerances import TOL

MODELS = ("mamba_tiny", "mamba2_tiny", "llama_tiny", "pythia_tiny")
STRATEGIES = {"bf16_true": torch.bfloat16, "fp16_true": torch.float16, "bf16_true_unpinned": torch.bfloat16}
DYNAMICS = {
    "mamba": {"A_log", "D", "dt_proj.bias"},
    "falcon_mamba": {"A_log", "D", "dt_proj.bias"},
    "mamba2": {"A_log", "D", "dt_bias"},
    "bamba": {"A_log", "D", "dt_bias"},
    "zamba": {"A_log", "D", "dt_proj_bias"},
    "qwen3_next": {"A_log", "dt_bias"},
    "llama": set(),
    "gpt_neox": set(),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and loggers


def loaded(model: str, strategy: Strategy, precision: Precision) -> tuple[Backbone, recurrence.Seam]:
    """A shipped model as a cell makes it ready."""
    torch.manual_seed(0)
    base = backbone.load(config.load_choice("model", model))
    seam = recurrence.install(base.model)
    strategy.attach(base, seam)
    precision.cast(base.model)
    return base, seam


def trained(model: str, name: str, strategy: Strategy, steps: int = 3, **changes: Any) -> tuple[Backbone, FineTuner]:
    """A few steps by Lightning, as a cell takes them, liveness proof included."""
    with build(cfg(name, emulate="always", init_scale=256.0, **changes), "cpu") as precision:
        base, _ = loaded(model, strategy, precision)
        settings = OmegaConf.structured(config.TrainerConfig(steps=steps, warmup=0.0))
        ids = torch.randint(3, 500, (steps, 4, 16), generator=torch.Generator().manual_seed(1))
        batches = [{"input_ids": t, "labels": t, "attention_mask": torch.ones_like(t)} for t in ids]
        module = FineTuner(base.model, settings, 1e-2)
        L.Trainer(
            accelerator="cpu", max_steps=steps, plugins=[precision.plugin], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[AdapterLiveness(Liveness(base.model, steps=steps))],
        ).fit(module, DataLoader(batches, batch_size=None))  # fmt: skip
    return base, module


def half_and_float32(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    named = dict(model.named_parameters())
    wide = {name: p for name, p in named.items() if p.dtype == torch.float32}
    return {name: p for name, p in named.items() if name not in wide}, wide


# ---- what stays in float32


@pytest.mark.parametrize("kind", DYNAMICS)
def test_the_dynamics_of_every_family_stay_in_float32_and_nothing_else(kind: str) -> None:
    dims = {} if kind == "zamba" else {"num_hidden_layers": 4}  # its shared blocks need all of their layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **dims))
    pinned = {name: pinned_as(name) for name, _ in model.named_parameters() if pinned_as(name)}
    assert set(pinned.values()) == DYNAMICS[kind]
    mixers = [name for name, _ in model.named_parameters() if name.endswith(".A_log")]
    assert len(pinned) == len(DYNAMICS[kind]) * len(mixers)


def test_adapters_of_a_pinned_module_are_half_and_adapted_states_are_not() -> None:
    assert pinned_as("mixer.dt_proj.base_layer.bias") == "dt_proj.bias"
    assert pinned_as("mixer.initial_state.default") == "initial_state"
    for name in ("mixer.dt_proj.lora_A.default.weight", "mixer.dt_proj.weight", "lm_head.bias", "mixer.in_D.weight"):
        assert pinned_as(name) is None


def test_buffers_and_tied_weights_stay_as_they_are() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=20,
                             num_attention_heads=2, tie_word_embeddings=True)
    )  # fmt: skip
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert store_in(model, torch.bfloat16, pin=True) == {}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_weight_that_the_format_cannot_hold_is_named() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = 1e5
    with pytest.raises(InputError, match="weight holds weights beyond 65504: use precision=bf16_true"):
        store_in(layer, torch.float16, pin=True)


# ---- training


@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("model", MODELS)
def test_every_shipped_model_trains_in_the_stored_format(model: str, name: str, peft: str) -> None:
    torch.manual_seed(0)
    strategy: Strategy = FullFineTuning() if peft == "none" else Lora()
    base, module = trained(model, name, strategy)
    half, wide = half_and_float32(base.model)
    assert {p.dtype for p in half.values()} == {STRATEGIES[name]}
    expected = set() if name.endswith("unpinned") else DYNAMICS[base.architecture]
    assert {pinned_as(n) for n in wide} == expected
    assert module.skipped_steps == 0
    before = loaded(model, FullFineTuning(), build(cfg(name), "cpu"))[0].model
    start = dict(before.named_parameters())
    if peft == "none":
        moved = [n for n, p in base.model.named_parameters() if not torch.equal(p, start[n])]
        assert len(moved) >= 0.8 * len(start)  # a norm's weight of 1 may need more than three steps of 1e-2 in bf16
        assert set(wide) <= set(moved)
    else:
        assert all(p.detach().any() for n, p in half.items() if ".lora_B." in n or "_embedding_B" in n)
        assert all(torch.equal(p, start[n.replace(".base_layer", "")]) for n, p in half.items() if not p.requires_grad)


def test_training_is_bitwise_repeatable_and_pinning_changes_it() -> None:
    runs = [trained("mamba2_tiny", n, FullFineTuning())[0] for n in ("bf16_true", "bf16_true", "bf16_true_unpinned")]
    first, again, unpinned = (dict(base.model.named_parameters()) for base in runs)
    assert all(torch.equal(first[n], again[n]) for n in first)
    for n in first:
        if n.endswith(".A_log"):
            assert (first[n].dtype, unpinned[n].dtype) == (torch.float32, torch.bfloat16)
            assert not torch.equal(first[n], unpinned[n].float())


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_float32_with_the_same_weights(model: str, name: str) -> None:
    ids = torch.randint(3, 500, (3, 24))
    with build(cfg(name, emulate="always"), "cpu") as precision:
        base, seam = loaded(model, FullFineTuning(), precision)
        oracle = copy.deepcopy(base.model).float()
        seam.tap = lambda layer, delta, A: taken.append(delta)
        taken: list[Tensor] = []
        with torch.no_grad(), precision.autocast():
            logits = base.model(input_ids=ids).logits
    with torch.no_grad():
        want = oracle(input_ids=ids).logits
    error = (logits.float() - want).norm() / want.norm()
    assert 0 < error <= TOL[STRATEGIES[name]]["rtol"]
    assert len(taken) == len(seam.layers)
    for delta in taken:
        assert delta.dtype == torch.float32
        assert not torch.equal(delta, delta.to(STRATEGIES[name]).float()), "Δ was rounded on its way to the probe"


# ---- the update


def test_fp16_weights_take_a_float32_step_that_is_rounded_once() -> None:
    module = fit("fp16_true", emulate="always", init_scale=1024.0)
    assert {s["dtype"] for s in module.seen} == {torch.float16}
    assert {g.dtype for g in module.gradients} == {torch.float32}
    weight, gradient = torch.randn(5, 3).half(), 1e-5 * torch.randn(5, 3)  # squares that float16 cannot hold
    layer = nn.Linear(3, 5, bias=False, dtype=torch.float16)
    exact = nn.Parameter(weight.double())
    ours, reference = torch.optim.AdamW([layer.weight], lr=1e-2), torch.optim.AdamW([exact], lr=1e-2)
    plain = nn.Parameter(weight.clone())
    stock = torch.optim.AdamW([plain], lr=1e-2)
    TrueHalfPlugin(torch.float16, "cpu", init_scale=1.0, growth_interval=9, emulated=False).connect(layer, [ours], [])
    for parameter, optimizer in ((layer.weight, ours), (exact, reference), (plain, stock)):
        with torch.no_grad():
            parameter.copy_(weight)
        parameter.grad = gradient.to(parameter.grad_dtype)
        optimizer.step()
    torch.testing.assert_close(layer.weight, exact.detach().half(), rtol=2**-10, atol=0)  # one unit in the last place
    assert not torch.isfinite(plain).all(), "torch's own AdamW can do it now: drop the float32 moments"


def test_bf16_weights_take_torchs_own_step() -> None:
    module = fit("bf16_true", emulate="always")
    assert {s["dtype"] for s in module.seen} == {torch.bfloat16}
    assert {g.dtype for g in module.gradients} == {torch.bfloat16}
    assert module.layer.weight.dtype == torch.bfloat16
    assert {s["scale"] for s in module.seen} == {None}


def test_an_fp16_overflow_skips_the_step_and_halves_the_scale() -> None:
    module = fit("fp16_true", overflow_at=2)
    assert [s["skipped"] for s in module.seen] == [False, False, True, False, False]
    assert [s["scale"] for s in module.seen] == [65536.0, 65536.0, 32768.0, 32768.0, 32768.0]
    assert torch.equal(module.seen[2]["weight"], module.seen[2]["after"])


def test_a_half_weight_that_no_update_moves_is_named_not_fatal() -> None:
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.bias.fill_(1.0)
    optimizer, liveness = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.0), Liveness(layer, steps=2)
    for step in range(1, 3):  # 1 − 0.001 rounds to 1 in bf16
        layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        liveness.observe_gradients()
        optimizer.step()
        liveness.verdict(step)
    assert liveness.stalled == ["bias"]
    assert not liveness.proven


# ---- record, files, evaluation


def test_the_record_says_what_is_stored_where() -> None:
    def record(name: str) -> dict[str, Any]:
        precision = build(cfg(name, emulate="always"), "cpu")
        loaded("mamba_tiny", FullFineTuning(), precision)
        return precision.record()

    bf16, fp16, unpinned = (record(name) for name in STRATEGIES)
    assert bf16["pinned"] == fp16["pinned"] == {"A_log": 2, "D": 2, "dt_proj.bias": 2}
    assert unpinned["pinned"] == {}
    assert bf16["ops"]["parameters"] == unpinned["ops"]["parameters"] == {"storage": "bfloat16"}
    assert bf16["ops"]["recurrence scan"]["storage"] == "float32"
    assert unpinned["ops"]["recurrence scan"] == bf16["ops"]["recurrence scan"] | {"storage": "bfloat16"}
    assert bf16["ops"]["gradients and optimizer"]["storage"] == "bfloat16"
    assert fp16["ops"]["gradients and optimizer"]["storage"] == "float32"
    assert fp16["ops"]["gradients and optimizer"]["result"] == "float16"
    assert bf16["emulated"] is fp16["emulated"] is True
    assert bf16["ops"]["matmul"]["accumulation"] == bf16["ops"]["loss"]["result"] == "float32"


@pytest.mark.parametrize("make", [FullFineTuning, Lora])
def test_what_was_trained_is_saved_in_its_format_and_loaded_to_the_bit(make: type[Strategy], tmp_path: Path) -> None:
    strategy = make()
    trained("mamba_tiny", "bf16_true", strategy)
    strategy.save(tmp_path)
    stored = {n: t for file in tmp_path.rglob("*.safetensors") for n, t in load_file(file).items()}
    trainable = {n: p for n, p in strategy.backbone.model.named_parameters() if p.requires_grad}
    assert {t.dtype for t in stored.values()} == {p.dtype for p in trainable.values()}
    again = make()
    loaded("mamba_tiny", again, build(cfg("bf16_true"), "cpu"))
    again.load(tmp_path)
    fresh = dict(again.backbone.model.named_parameters())
    assert all(torch.equal(fresh[n], p) and fresh[n].dtype == p.dtype for n, p in trainable.items())


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_finished_cell_is_scored_again_the_same(peft: str, tmp_path: Path) -> None:
    one = prepared(tmp_path, "precision=bf16_true", f"peft={peft}", "reference=off")
    record = cell.ensure(one)
    assert record["status"] == "ok"
    assert record["precision"]["pinned"]["A_log"] == 2
    assert torch.bfloat16 in {t.dtype for t in weights(one.folder).values()}
    evaluation.run(composed(f"run={one.folder}", "threads=1", "progress=false", name="evaluate"))
    (found,) = (one.folder / "evaluations").glob("*.json")
    assert json.loads(found.read_text())["scores"] == record["scores"]
