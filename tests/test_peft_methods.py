"""Every method on every family: alive, merged without a change, saved and loaded, in plain peft where that can."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from lyapft import recurrence
from lyapft.backbone import Backbone
from lyapft.config import CONF_DIR, load_choice
from lyapft.errors import InputError
from lyapft.peft import (
    AdaLora,
    BitFit,
    FullFineTuning,
    Ia3,
    Liveness,
    Lora,
    SelectiveDimensionTuning,
    StateTuning,
    Strategy,
    Vera,
    adapted_layers,
    faults,
)
from tests.peft_models import DIMS, FOUR, HYBRIDS, TOKENS, Tokenizer, attached, backbone, logits, randomize, train
from tests.tolerances import TOL, within_scale

ADAPTERS: dict[str, Callable[..., Strategy]] = {
    "lora": Lora,
    "lora_all": lambda **more: Lora("lora_all", **({"targets": "all"} | more)),
    "rslora": lambda **more: Lora("rslora", rank_stabilized=True, **more),
    "dora": lambda **more: Lora("dora", dora=True, **more),
    "pissa": lambda **more: Lora("pissa", init="pissa", **more),
    "lora_plus": lambda **more: Lora("lora_plus", lr_ratio=16.0, **more),
    "adalora": lambda **more: AdaLora(steps=8, **more),
    "ia3": Ia3,
    "vera": lambda **more: Vera(r=16, **more),
}
OF_A_RECURRENCE: dict[str, Callable[[], Strategy]] = {
    "initial_state": lambda: StateTuning("initial_state", "initial_state"),
    "state_offset": lambda: StateTuning("state_offset", "state_offset"),
    "sdt": lambda: SelectiveDimensionTuning(warmup_steps=2),
}
METHODS = ADAPTERS | {"none": FullFineTuning, "bitfit": BitFit} | OF_A_RECURRENCE
RECURRENT = [kind for kind in DIMS if kind not in ("llama", "gpt_neox")]
APPLICABLE = [
    (kind, method)
    for kind in (*FOUR, "jamba", "bamba")
    for method in METHODS
    if not (method in OF_A_RECURRENCE and kind not in RECURRENT) and (kind, method) != ("llama", "bitfit")
]


def prepared(kind: str, method: str, **more: object) -> Strategy:
    """A method on a new model, ready to train."""
    strategy = attached(kind, METHODS[method](**more))
    model = strategy.backbone.model
    strategy.prepare(lambda batch: model(**batch).loss.backward(), [{"input_ids": TOKENS, "labels": TOKENS}] * 2)
    return strategy


def test_every_method_is_one_choice_and_has_a_test() -> None:
    assert {path.stem for path in (CONF_DIR / "peft").glob("*.yaml")} == set(METHODS)
    for method, make in METHODS.items():
        node = OmegaConf.create({"trainer": {"steps": 8}, "peft": load_choice("peft", method)})
        assert faults(node.peft) == []
        chosen, tested = instantiate(node.peft), make()
        assert type(chosen) is type(tested)
        assert chosen.name == method
        if isinstance(chosen, Lora):
            assert isinstance(tested, Lora)
            assert chosen.settings() == tested.settings()
            assert chosen.lr_ratio == tested.lr_ratio


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_attach_to_a_model_without_weights(method: str, kind: str) -> None:
    """As a cell does before it loads any: what does not fit the model is found there."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **DIMS[kind]))
    base = Backbone(model, Tokenizer(), kind, kind, "", None, None)  # type: ignore[arg-type]
    strategy = METHODS[method]()
    strategy.attach(base, recurrence.install(model, "torch"))
    assert (
        strategy.parameters()["parameters_total"] == attached(kind, METHODS[method]()).parameters()["parameters_total"]
    )


@pytest.mark.parametrize(("kind", "method"), APPLICABLE)
def test_methods_start_at_the_base_live_and_merge(kind: str, method: str) -> None:
    before = logits(backbone(kind)[0].model)
    strategy = prepared(kind, method)
    model = strategy.backbone.model
    assert_close(logits(model), before, **TOL[torch.float32])
    liveness = Liveness(model, steps=3)
    starts = [p.detach().clone() for p in strategy.trainable_parameters()]

    def watch(step: int) -> None:
        liveness.verdict(step)
        liveness.observe_gradients()

    train(strategy, 6, watch)
    liveness.verdict(6)
    assert liveness.proven
    assert not any(torch.equal(a, b) for a, b in zip(starts, strategy.trainable_parameters(), strict=True))
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-6
    if method in ("initial_state", "state_offset"):
        with pytest.raises(InputError, match=r"cannot be merged: .*no weight"):
            strategy.merge()
        return
    strategy.merge()
    assert_close(logits(model), trained, **within_scale(trained))
    stock = backbone(kind)[0].model
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    assert type(model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("kind", [*FOUR, *HYBRIDS])
def test_all_linear_layers_and_convolutions_merge_under_every_adapter(kind: str, method: str) -> None:
    layers = {n.rpartition(".")[2] for n, m in backbone(kind)[0].model.named_modules() if hasattr(m, "weight")}
    targets = ["conv1d"] if "conv1d" in layers else "all"
    for chosen in ("all", targets):
        strategy = attached(kind, ADAPTERS[method](targets=chosen))
        randomize(strategy)
        model = strategy.backbone.model.double()  # random adapters on random layers: float32 would need a wide bound
        trained = logits(model)
        assert (trained - logits(backbone(kind)[0].model)).abs().max() > 1e-6
        strategy.merge()
        assert not adapted_layers(model)
        assert_close(logits(model), trained, **TOL[torch.float64])


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((k, m) for k, m in APPLICABLE if m not in ("initial_state", "state_offset")),
        *((kind, "lora_all") for kind in HYBRIDS),
    ],
)
def test_a_merged_model_loads_in_plain_transformers(kind: str, method: str, tmp_path: Path) -> None:
    strategy = prepared(kind, method)
    train(strategy, 3)
    trained = logits(strategy.backbone.model)
    strategy.merge()
    strategy.backbone.model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(stock), trained, **within_scale(trained))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_all_that_is_saved_and_loads_to_the_bit(method: str, kind: str, tmp_path: Path) -> None:
    strategy = prepared(kind, method)
    train(strategy, 3)
    where = tmp_path / strategy.save(tmp_path)
    again = attached(kind, METHODS[method]())
    again.load(tmp_path)
    assert torch.equal(logits(again.backbone.model), logits(strategy.backbone.model))
    if method == "none":
        return
    saved = load_file(where / "adapter_model.safetensors")
    counted = sum(t.numel() for n, t in saved.items() if not n.endswith(".index"))  # which entries SDT trains
    assert counted == strategy.parameters()["parameters_trainable"]
    other = attached(kind, METHODS[method](), seed=5)
    with pytest.raises(InputError, match=f"base_hash=hash-of-{kind}-0"):
        other.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*(PRNG|adapter keys|is_gradient_checkpointing|tie_word_embeddings)")
@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", "auto"),
        ("gpt_neox", "all"),
        ("mamba", ["in_proj", "x_proj"]),
        ("mamba", ["in_proj", "embeddings"]),
        ("mamba2", ["in_proj"]),
    ],
)
def test_saved_adapters_load_in_plain_peft(kind: str, targets: list[str] | str, method: str, tmp_path: Path) -> None:
    strategy = attached(kind, ADAPTERS[method](targets=targets))
    train(strategy, 6)
    folder = tmp_path / strategy.save(tmp_path)
    record = strategy.record()["plain_peft"]
    tied = "embeddings" in targets
    if tied and method not in ("lora", "lora_all", "rslora", "lora_plus"):
        assert record != "loads it"
        assert not (folder / "adapter_config.json").exists()
        return
    assert record == "loads it"
    plain = PeftModel.from_pretrained(backbone(kind)[0].model, folder)
    assert_close(logits(plain), logits(strategy.backbone.model), **TOL[torch.float32])
    expected = strategy.parameters()["parameters_trainable"]
    assert sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values()) == expected


@pytest.mark.parametrize("method", ADAPTERS)
def test_layers_that_share_a_matrix_share_its_adapter(method: str) -> None:
    strategy = attached("zamba", ADAPTERS[method](targets="all"))
    model = strategy.backbone.model
    one, other = (model.model.layers[i].shared_transf.feed_forward for i in (1, 3))
    assert one is not other
    assert one.down_proj is other.down_proj
    coverage = strategy.record()["coverage"]
    assert coverage["down_proj"] == {"adapted": 2, "present": 2}
    for bare in ("x_proj_weight", "dt_proj_weight"):  # parameters, no layers: seen, and seen to be left out
        assert coverage[bare] == {"adapted": 0, "present": 4}
    assert strategy.record()["plain_peft"] != "loads it"
    strategy.merge()
    assert one.down_proj is not other.down_proj
    assert one.down_proj.weight is other.down_proj.weight


# ---- one method each


def test_learning_rates_of_lora_plus_reach_the_optimizer() -> None:
    strategy = attached("mamba", Lora("lora_plus", lr_ratio=16.0, lr_ratio_embedding=0.5, targets="sll"))
    model = strategy.backbone.model
    rates = {id(p): g["lr"] for g in strategy.parameter_groups(model, 1e-3, 0.1) for p in g["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected = 5e-4 if "embedding" in name else 16e-3 if "lora_B" in name else 1e-3
            assert rates.pop(id(p)) == pytest.approx(expected), name
    assert not rates


def test_plain_strategies_decay_matrices_only() -> None:
    strategy = attached("gpt_neox", FullFineTuning())
    groups = strategy.parameter_groups(strategy.backbone.model, 1e-3, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    assert sum(len(g["params"]) for g in groups) == len(strategy.trainable_parameters())


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    (_, layer), *_ = adapted_layers(attached("llama", ADAPTERS["rslora"](r=4, alpha=6.0)).backbone.model)
    assert layer.scaling["default"] == pytest.approx(6.0 / 2.0)


def test_pissa_starts_at_the_leading_singular_vectors() -> None:
    base = dict(backbone("mamba")[0].model.named_modules())
    for name, layer in adapted_layers(attached("mamba", ADAPTERS["pissa"](r=3, targets=["in_proj"])).backbone.model):
        product = 16 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        u, s, v = torch.linalg.svd(base[name].weight)
        assert_close(product, u[:, :3] @ torch.diag(s[:3]) @ v[:3], rtol=1e-4, atol=1e-5)


def test_adalora_prunes_to_its_budget_and_adds_its_penalty() -> None:
    strategy = attached("llama", AdaLora(steps=8, init_r=6, target_r=2))
    factors = [p for n, p in strategy.backbone.model.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    by_hand = []
    for p in factors:
        rows = p if p.shape[0] == 6 else p.T
        by_hand.append((rows @ rows.T - torch.eye(6)).square().sum().sqrt())
    penalty = strategy.penalty()
    assert penalty is not None
    assert_close(penalty, 0.5 * sum(by_hand) / len(by_hand), **TOL[torch.float32])
    train(strategy, 8)
    ranks = strategy.record()["ranks"]
    assert len(ranks) == 14
    assert sum(ranks.values()) == 14 * 2
    assert len(set(ranks.values())) > 1


def test_adalora_without_a_step_to_prune_in_is_refused() -> None:
    with pytest.raises(InputError, match="no step to move its budget in: 1 steps of warm-up and 1 at the end of 2"):
        AdaLora(steps=2)


def test_ia3_takes_pefts_targets_and_scales_the_inputs_of_feed_forward_layers() -> None:
    model = attached("llama", Ia3()).backbone.model
    shapes = {n.rpartition(".")[2]: tuple(m.ia3_l["default"].shape) for n, m in adapted_layers(model)}
    assert shapes == {"k_proj": (16, 1), "v_proj": (16, 1), "down_proj": (1, 24)}
    mamba = dict(adapted_layers(attached("mamba", Ia3(targets=["dt_proj", "embeddings"])).backbone.model))
    assert tuple(mamba["backbone.embeddings"].ia3_l["default"].shape) == (1, 16)


def test_the_bias_of_dt_proj_is_scaled_where_it_is_read() -> None:
    strategy = attached("mamba", Ia3(targets=["dt_proj", "conv1d"]))
    randomize(strategy)
    mixer = strategy.backbone.model.backbone.layers[0].mixer
    for layer in (mixer.dt_proj, mixer.conv1d):
        factors = layer.ia3_l["default"].flatten()
        assert torch.equal(layer.bias, layer.get_base_layer().bias * factors)
        assert_close(
            layer.weight,
            layer.get_base_layer().weight.view(layer.weight.shape) * factors.view(-1, *[1] * (layer.weight.dim() - 1)),
        )


def test_vera_shares_its_frozen_factors_and_draws_them_from_its_own_seed() -> None:
    first, second = (attached("mamba", Vera(r=5, projection_seed=s)) for s in (0, 1))
    layers = [m for _, m in adapted_layers(first.backbone.model)]
    assert all(m.vera_A is layers[0].vera_A for m in layers)
    other = adapted_layers(second.backbone.model)[0][1]
    assert not torch.equal(other.vera_A["default"], layers[0].vera_A["default"])
    names = {n for n, p in first.backbone.model.named_parameters() if p.requires_grad}
    assert all("vera_lambda" in n for n in names)


def test_bitfit_trains_every_bias_and_says_which() -> None:
    for kind, expected in (("mamba", {"conv1d.bias", "dt_proj.bias"}), ("mamba2", {"conv1d.bias", "dt_bias"})):
        record = attached(kind, BitFit()).record()
        assert {n.partition(".mixer.")[2] for n in record["tensors"]} == expected
        assert len(record["tensors"]) == 4


@pytest.mark.parametrize("method", [*OF_A_RECURRENCE, "bitfit"])
def test_methods_that_a_transformer_cannot_have_are_refused_by_name(method: str) -> None:
    with pytest.raises(InputError, match=f"peft={method} .*llama model has no(ne)?.*Use peft=lora|has no bias"):
        attached("llama", METHODS[method]())


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_copied_model_keeps_its_own_adapters(method: str, kind: str) -> None:
    strategy = prepared(kind, method)
    train(strategy, 2)
    model = strategy.backbone.model
    expected = logits(model)
    twin = copy.deepcopy(model)
    if method not in ("initial_state", "state_offset"):
        strategy.merge()
        assert torch.equal(logits(twin), expected)  # merging one leaves the other
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(twin), expected)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera"])
def test_an_adapted_model_can_be_written_whole_and_read(method: str) -> None:
    strategy = attached("mamba", ADAPTERS[method](targets="all"))
    randomize(strategy)
    model = strategy.backbone.model
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), logits(model))


@pytest.mark.parametrize("method", ["initial_state", "state_offset"])
def test_states_of_several_heads_are_refused(method: str) -> None:
    base, seam = backbone("zamba")
    with pytest.raises(InputError, match=r"one for each of several heads \(Zamba\): use another"):
        METHODS[method]().attach(base, seam)


def test_dropout_is_refused_where_the_kernel_of_the_device_to_come_reads_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence.mamba_ssm, "missing", lambda operation, device: None)
    for device, refused in (("cpu", False), ("cuda", True)):
        base, seam = backbone("mamba")
        seam.remove()
        seam = recurrence.install(base.model, device=device)
        strategy = Lora(targets=["out_proj"], dropout=0.1)
        if refused:
            with pytest.raises(InputError, match="dropout"):
                strategy.attach(base, seam)
        else:
            strategy.attach(base, seam)
