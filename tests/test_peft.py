"""Strategies: what trains is what was asked for, is alive, keeps ties, and survives merging, saving and loading."""

import copy
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, sampled_from
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lyapft import peft, recurrence
from lyapft.backbone import Backbone
from lyapft.backbone.source import plain_dims
from lyapft.config import load_choice
from lyapft.errors import InputError
from lyapft.peft import FullFineTuning, Liveness, LivenessError, Lora, Strategy
from tests.peft_models import FOUR as ARCHITECTURES
from tests.peft_models import MAMBAS, TOKENS, Tokenizer, attached, backbone, logits, train
from tests.tolerances import TOL

# ---- counts and coverage


def test_sll_on_mamba_130m_trains_the_papers_number_of_parameters() -> None:
    dims = plain_dims(load_choice("model", "mamba_130m"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**dims))
    strategy = Lora(r=8, targets="sll")
    strategy.attach(Backbone(model, Tokenizer(), "m", "mamba", "h", None, None), recurrence.install(model, "torch"))  # type: ignore[arg-type]
    counts = strategy.parameters()
    assert counts["parameters_trainable"] == 1_898_304
    assert round(100 * counts["parameters_trainable"] / counts["parameters_total"], 3) == 1.449
    assert strategy.record()["coverage"]["x_proj"] == {"adapted": 24, "present": 24}


@pytest.mark.parametrize(
    ("kind", "adapted", "left"),
    [
        (
            "mamba",
            {"in_proj": 2, "x_proj": 2, "out_proj": 2, "embeddings": 1},
            {"dt_proj": 2, "conv1d": 2},
        ),
        ("mamba2", {"in_proj": 2, "out_proj": 2, "embeddings": 1}, {"conv1d": 2}),
        (
            "gpt_neox",
            {"query_key_value": 2, "dense": 2, "dense_h_to_4h": 2, "dense_4h_to_h": 2},
            {"embed_in": 1, "lm_head": 1},
        ),
        (
            "llama",
            dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 2),
            {"embed_tokens": 1, "lm_head": 1},
        ),
    ],
)
def test_automatic_targets_cover_every_layer_that_has_them(
    kind: str, adapted: dict[str, int], left: dict[str, int]
) -> None:
    record = attached(kind, Lora()).record()
    expected = {name: {"adapted": n, "present": n} for name, n in adapted.items()}
    expected |= {name: {"adapted": 0, "present": n} for name, n in left.items()}
    if "embeddings" in adapted:  # the output layer is tied to them, and acts with their adapter
        expected["lm_head"] = {"adapted": 1, "present": 1}
    assert record["coverage"] == expected
    assert record["targets"] == sorted(adapted)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_full_fine_tuning_trains_every_parameter_once(kind: str) -> None:
    strategy = attached(kind, FullFineTuning())
    parameters = strategy.trainable_parameters()
    assert len({id(p) for p in parameters}) == len(parameters) == len(list(strategy.backbone.model.parameters()))
    counts = strategy.parameters()
    assert counts["parameters_trainable"] == counts["parameters_total"] == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_lora_trains_adapters_alone_and_changes_nothing_at_first(kind: str) -> None:
    base, seam = backbone(kind)
    before, weights = logits(base.model), {n: p.clone() for n, p in base.model.named_parameters()}
    strategy = Lora()
    strategy.attach(base, seam)
    assert_close(logits(base.model), before, **TOL[torch.float32])
    trainable = {n for n, p in base.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    train(strategy)
    for name, p in base.model.named_parameters():
        stock = name.replace(".base_layer", "").replace("lm_head.linear", "lm_head")
        if name not in trainable:
            assert torch.equal(p, weights[stock]), name


def test_adapters_start_the_same_from_the_same_seed() -> None:
    first, second, other = (attached("mamba", Lora(), seed) for seed in (1, 1, 2))
    for a, b, c in zip(*(s.trainable_parameters() for s in (first, second, other)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) or not a.any()


# ---- targets


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["in_proj"], {"backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.in_proj"}),
        (["layers.1.mixer.x_proj"], {"backbone.layers.1.mixer.x_proj"}),
        (r".*\.0\.mixer\.(in|out)_proj", {"backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.out_proj"}),
    ],
)
def test_targets_by_name_suffix_and_expression(targets: str | list[str], modules: set[str]) -> None:
    strategy = attached("mamba", Lora(targets=targets, min_coverage=0.5))
    assert {name for name, _ in peft.adapted_layers(strategy.backbone.model)} == modules


def test_coverage_shows_layers_that_a_target_misses() -> None:
    coverage = attached("mamba", Lora(targets=["layers.1.mixer.x_proj"], min_coverage=0.5)).record()["coverage"]
    assert coverage["x_proj"] == {"adapted": 1, "present": 2}
    assert coverage["in_proj"] == {"adapted": 0, "present": 2}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "mamba",
            {"targets": ["in_proj", "q_proj", "k_proj"]},
            r"'q_proj', 'k_proj' matched no .*it has: conv1d, dt_proj",
        ),
        ("llama", {"targets": "in_proj"}, r"'in_proj' matched no .*full module name, such as 'model\.embed_tokens'"),
        ("llama", {"targets": "(in_proj"}, r"neither auto, sll, all, usual, memory_buffer nor a regular expression"),
        ("llama", {"targets": "sll"}, r"sll is not defined for llama models"),
        ("mamba", {"targets": []}, r"is empty"),
        (
            "mamba",
            {"targets": ["dt_proj"], "dropout": 0.1},
            r"layers\.0\.mixer\.dt_proj is read(?s:.*)layers\.1\.mixer\.dt",
        ),
        ("mamba2", {"targets": ["conv1d"], "dropout": 0.1}, r"conv1d is read as a matrix, which has no input to drop"),
        ("mamba", {"targets": ["layers.1.mixer.x_proj"]}, r"x_proj on 1 of 2 layers, less than peft\.min_coverage=1:"),
        ("llama", {"targets": "memory_buffer"}, r"memory_buffer is not defined for llama models"),
        ("mamba", {"targets": ["lm_head"]}, r"lm_head shares its matrix with backbone\.embeddings"),
        ("mamba", {"dropout": 0.1}, r"backbone\.embeddings is read as a matrix.*peft\.dropout=0"),
    ],
)
def test_targets_that_could_not_work_stop_the_run_by_name(kind: str, settings: dict, message: str) -> None:
    base, seam = backbone(kind)
    with pytest.raises(InputError, match=message):
        Lora(**settings).attach(base, seam)


@pytest.mark.parametrize("kind", MAMBAS)
def test_pefts_own_refusal_stays_in_place_for_everyone_else(kind: str) -> None:
    attached(kind, Lora())
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(backbone(kind)[0].model, LoraConfig(target_modules=["out_proj"]))


def test_settings_out_of_range_are_all_reported_before_a_model_exists() -> None:
    cfg = load_choice("peft", "lora")
    cfg.r, cfg.alpha, cfg.dropout = 0, -1.0, 1.0
    assert sorted(peft.faults(cfg)) == [
        "peft.alpha=-1.0 must be greater than 0",
        "peft.dropout=1.0 must lie in [0, 1)",
        "peft.r=0 must be greater than 0",
    ]
    with pytest.raises(InputError, match=r"peft\.r=0"):
        Lora(r=0)
    assert peft.faults(load_choice("peft", "lora")) == peft.faults(load_choice("peft", "none")) == []


def test_dropout_works_where_adapters_have_an_input() -> None:
    strategy = attached("llama", Lora(dropout=0.5))
    model = strategy.backbone.model
    train(strategy)
    model.train()
    torch.manual_seed(0)
    first, second = (model(input_ids=TOKENS).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(logits(model), logits(model))


# ---- merge, save, load


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_merged_weights_give_the_logits_of_the_adapted_model_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    strategy = attached(kind, Lora())
    model = strategy.backbone.model
    before = logits(model)
    train(strategy)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 1e-2
    tied, shape = bool(model.config.tie_word_embeddings), {n: p.shape for n, p in model.named_parameters()}
    strategy.merge()
    assert not peft.adapted_layers(model)
    assert_close(logits(model), adapted, **TOL[torch.float32])
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert len(shape) > len(dict(model.named_parameters()))

    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {n: p.shape for n, p in stock.named_parameters()} == {
        n: p.shape for n, p in backbone(kind)[0].model.named_parameters()
    }
    assert_close(logits(stock), adapted, **TOL[torch.float32])


@settings(max_examples=10)
@given(seed=integers(0, 2**20), r=integers(1, 5), alpha=floats(0.5, 32.0), kind=sampled_from(MAMBAS))
def test_the_tied_output_matrix_is_the_adapted_embedding_matrix(seed: int, r: int, alpha: float, kind: str) -> None:
    strategy = attached(kind, Lora(r=r, alpha=alpha, targets=["embeddings"]), seed)
    model = strategy.backbone.model
    with torch.no_grad():
        for p in strategy.trainable_parameters():
            p.normal_()
    base, factors = model.get_input_embeddings().base_layer.weight, strategy.trainable_parameters()
    (a_RV,), (b_DR,) = ([p for p in factors if p.shape[side] == r] for side in (0, 1))
    shared_VD = base.double() + alpha / r * (b_DR.double() @ a_RV.double()).T
    hidden = torch.randn(3, 16)
    assert_close(model.get_input_embeddings()(TOKENS).double(), shared_VD[TOKENS], rtol=1e-4, atol=1e-4)
    assert_close(model.get_output_embeddings()(hidden).double(), hidden.double() @ shared_VD.T, rtol=1e-4, atol=1e-3)


def test_the_tied_adapter_gets_the_gradient_of_both_its_uses() -> None:
    strategy = attached("mamba", Lora(targets=["embeddings"]))
    model = strategy.backbone.model
    train(strategy)
    model.train().zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    lora = model.get_input_embeddings()
    a_RV, b_DR = lora.lora_embedding_A["default"], lora.lora_embedding_B["default"]
    # the same loss as a function of one shared matrix, W + s (B A)ᵀ, in an ordinary tied model
    plain = copy.deepcopy(strategy)
    plain.merge()
    tied = plain.backbone.model
    tied.requires_grad_(True).zero_grad()
    tied(input_ids=TOKENS, labels=TOKENS).loss.backward()
    shared_VD = tied.get_input_embeddings().weight.grad
    assert_close(a_RV.grad, 2.0 * (shared_VD @ b_DR.detach()).T, rtol=1e-4, atol=1e-6)
    assert_close(b_DR.grad, 2.0 * (a_RV.detach() @ shared_VD).T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("make", [Lora, FullFineTuning])
def test_what_was_trained_is_saved_and_loaded_to_the_bit(kind: str, make: type[Strategy], tmp_path: Path) -> None:
    strategy = attached(kind, make())
    train(strategy)
    where = strategy.save(tmp_path)
    files = sorted(f.name for f in (tmp_path / where).iterdir())
    again = attached(kind, make())
    assert not torch.equal(logits(again.backbone.model), logits(strategy.backbone.model))
    again.load(tmp_path)
    assert torch.equal(logits(again.backbone.model), logits(strategy.backbone.model))
    if make is Lora:
        assert where == "adapter/"
        plain = ["adapter_config.json"] if kind not in MAMBAS else []  # peft refuses out_proj of a Mamba
        assert files == ["adapter.json", *plain, "adapter_model.safetensors"]
        saved = load_file(tmp_path / where / "adapter_model.safetensors")
        assert sum(t.numel() for t in saved.values()) == strategy.parameters()["parameters_trainable"]
    else:
        assert where == "weights/"
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / where)
        assert_close(logits(stock), logits(strategy.backbone.model), **TOL[torch.float32])
    assert sorted(p.name for p in tmp_path.iterdir()) == [where.rstrip("/")]


def test_saving_again_replaces_what_an_interrupted_attempt_left(tmp_path: Path) -> None:
    strategy = attached("mamba", Lora())
    strategy.save(tmp_path)
    (tmp_path / "adapter" / "stale").write_text("x")
    train(strategy)
    strategy.save(tmp_path)
    assert not (tmp_path / "adapter" / "stale").exists()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, p in strategy.backbone.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(saved[strategy.stored_name(name)], p)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: attached("mamba", Lora(), seed=9),
            "base_hash=hash-of-mamba-0, this one has base_hash=hash-of-mamba-9",
        ),
        (lambda: attached("mamba", Lora(r=4)), "r=8, this one has r=4"),
        (lambda: attached("mamba", Lora(targets=["in_proj"])), "modules="),
    ],
)
def test_an_adapter_of_another_base_or_setting_is_refused(other, message: str, tmp_path: Path) -> None:
    attached("mamba", Lora()).save(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        other().load(tmp_path)


@pytest.mark.parametrize("make", [Lora, FullFineTuning])
def test_a_folder_without_what_was_trained_is_refused(make: type[Strategy], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        attached("llama", make()).load(tmp_path)


def test_weights_of_another_shape_or_with_a_gap_are_refused(tmp_path: Path) -> None:
    strategy = attached("llama", FullFineTuning())
    strategy.save(tmp_path)
    file = tmp_path / "weights" / "model.safetensors"
    whole = load_file(file)
    save_file(whole | {"model.norm.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds no weights of this model"):
        attached("llama", FullFineTuning()).load(tmp_path)
    del whole["model.norm.weight"]
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"not those of this model: model\.norm\.weight"):
        attached("llama", FullFineTuning()).load(tmp_path)


# ---- liveness


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("make", [Lora, FullFineTuning])
def test_every_trainable_tensor_is_alive_and_moves(kind: str, make: type[Strategy]) -> None:
    strategy = attached(kind, make())
    liveness = Liveness(strategy.backbone.model, steps=3)
    before = [p.detach().clone() for p in strategy.trainable_parameters()]

    def watch(step: int) -> None:
        liveness.verdict(step)
        liveness.observe_gradients()

    train(strategy, steps=3, watch=watch)
    liveness.verdict(3)
    assert liveness.proven
    assert not any(torch.equal(a, b) for a, b in zip(before, strategy.trainable_parameters(), strict=True))


@pytest.mark.parametrize("kind", MAMBAS)
def test_watching_does_not_change_training(kind: str) -> None:
    def run(watched: bool) -> tuple[list[float], list[Tensor]]:
        strategy = attached(kind, Lora())
        liveness = Liveness(strategy.backbone.model)
        losses = train(strategy, 4, (lambda _: liveness.observe_gradients()) if watched else None)
        return losses, strategy.trainable_parameters()

    (losses, weights), (watched_losses, watched_weights) = run(False), run(True)
    assert losses == watched_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, watched_weights, strict=True))


class Product(nn.Module):
    """y = (B A) x beside a tensor that nothing uses, named as peft names a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})
        self.unused = nn.Parameter(torch.ones(2))
        nn.init.zeros_(self.lora_B["default"].weight)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Product()


def product_step(model: Wrapped, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
    optimizer.zero_grad()
    target = torch.arange(3.0)
    out = model.layer.lora_B["default"](model.layer.lora_A["default"](torch.ones(3)))
    ((out - target).square().sum() * scale).backward()


def test_a_dead_tensor_is_named_after_its_chances_and_a_zero_partner_is_no_chance() -> None:
    model = Wrapped()
    optimizer, liveness = torch.optim.SGD(model.parameters(), lr=0.1), Liveness(model, steps=3)
    for step in range(1, 3):
        product_step(model, optimizer)
        liveness.observe_gradients()
        optimizer.step()
        liveness.verdict(step)
    product_step(model, optimizer)
    liveness.observe_gradients()
    optimizer.step()
    with pytest.raises(
        LivenessError, match=r"^1 trainable tensors had no finite, non-zero gradient in 3 steps: layer\.unused\."
    ):
        liveness.verdict(3)


def test_the_first_factor_is_not_blamed_while_the_second_stays_zero() -> None:
    model = Wrapped()
    model.layer.unused.requires_grad_(False)
    optimizer, liveness = torch.optim.SGD(model.parameters(), lr=0.1), Liveness(model, steps=2)
    for _ in range(5):  # steps that a loss scaler skips: no update, so B stays zero and A has no gradient
        product_step(model, optimizer, scale=float("inf"))
        liveness.observe_gradients()
        liveness.verdict(0)
    for step in range(1, 4):
        product_step(model, optimizer)
        liveness.observe_gradients()
        optimizer.step()
        liveness.verdict(step)
    assert liveness.proven


def test_a_tensor_with_a_gradient_that_the_optimizer_does_not_hold_is_named() -> None:
    model = Wrapped()
    model.layer.unused.requires_grad_(False)
    with torch.no_grad():
        model.layer.lora_B["default"].weight.fill_(0.5)
    optimizer = torch.optim.SGD(model.layer.lora_A.parameters(), lr=0.1)
    liveness = Liveness(model, steps=1)
    product_step(model, optimizer)
    liveness.observe_gradients()
    optimizer.step()
    with pytest.raises(LivenessError, match=r"did not change in 1 steps.*layer\.lora_B\.default\.weight"):
        liveness.verdict(1)


def test_an_adapter_that_the_model_passes_by_is_named() -> None:
    """An adapter whose weight does not carry it, put where the model reads the weight without a call."""
    base, seam = backbone("mamba")
    strategy = Lora(targets=["in_proj"])
    strategy.attach(base, seam)
    mixer = base.model.backbone.layers[0].mixer
    mixer.dt_proj = copy.deepcopy(base.model.backbone.layers[0].mixer.in_proj)
    mixer.dt_proj.base_layer = nn.Linear(mixer.time_step_rank, mixer.intermediate_size)
    liveness = Liveness(base.model, steps=2)
    train(strategy, 2, lambda _: liveness.observe_gradients())
    with pytest.raises(LivenessError, match=r"layers\.0\.mixer\.dt_proj\.lora_B"):
        liveness.verdict(2)


def test_a_copied_model_keeps_its_own_tie() -> None:
    strategy = attached("mamba", Lora())
    train(strategy)
    model: PreTrainedModel = strategy.backbone.model
    expected = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(twin), expected)
