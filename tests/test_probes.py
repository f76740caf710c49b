"""Probes against numbers captured without the seam, and the proof that they see the path that runs."""

import types

import pytest
import torch
from omegaconf import OmegaConf
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from lyapft import lyapunov, recurrence
from lyapft.config import TrainerConfig
from lyapft.peft import Liveness, LivenessError
from lyapft.probes import AdapterLiveness, LyapunovProbe, StepRecorder
from lyapft.records import StepSeries
from tests.tolerances import TOL

MAMBA = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
MAMBA2 = Mamba2Config(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=4, n_groups=1, chunk_size=8
)


def a_batch(rows: int = 3, length: int = 9):
    mask = torch.arange(length) < torch.tensor([[length], [length - 4], [2]])[:rows]
    return {"input_ids": torch.randint(1, 50, (rows, length)), "attention_mask": mask.long()}


def a_module(accumulate: int = 1):
    settings = OmegaConf.structured(TrainerConfig(steps=4, accumulate=accumulate))
    cpu = torch.device("cpu")
    return types.SimpleNamespace(observed={}, settings=settings, device=cpu, skipped_steps=0, parts=1, copies=1)


def step_sizes_of_stock(model, batch, monkeypatch):
    """(Δ, A) per layer, read off transformers' own functions by wrapping them in their module."""
    import transformers.models.mamba.modeling_mamba as mamba
    import transformers.models.mamba2.modeling_mamba2 as mamba2

    kept = []

    def keep(name, module, bias_name, limit):
        stock = getattr(module, name)

        def wrapped(x, dt, A, *args, **kwargs):
            bias = kwargs[bias_name]
            rows = dt.transpose(1, 2) if name == "mamba_selective_scan" else dt
            kept.append((torch.nn.functional.softplus(rows + bias).clamp(*kwargs.get(limit, (0.0, torch.inf))), A))
            return stock(x, dt, A, *args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    keep("mamba_selective_scan", mamba, "delta_bias", "none")
    keep("mamba2_chunk_scan", mamba2, "dt_bias", "dt_limit")
    with torch.no_grad():
        model(**batch)
    return kept


@pytest.mark.parametrize(
    "build", [lambda: MambaForCausalLM(MAMBA), lambda: Mamba2ForCausalLM(MAMBA2)], ids=["mamba", "mamba2"]
)
def test_numbers_equal_those_from_the_stock_model(build, monkeypatch):
    model, batch, module = build(), a_batch(), a_module()
    expected = [
        lyapunov.stability(delta, A, batch["attention_mask"])
        for delta, A in step_sizes_of_stock(model, batch, monkeypatch)
    ]
    seam, probe = recurrence.install(model), LyapunovProbe()
    probe.bind(seam)
    trainer = types.SimpleNamespace(global_step=0, max_steps=99)
    probe.on_train_batch_start(trainer, module, batch, 0)
    model.train()(**batch)
    probe.on_train_batch_end(trainer, module, None, batch, 0)
    assert len(expected) == 2
    for layer, one in zip(seam.layers, expected, strict=True):
        rel = 10 * TOL[torch.float32]["rtol"]  # two layers of another scan's rounding lie before the second Δ
        assert module.observed[f"lambda_max/{layer.name}"] == pytest.approx(one.lambda_max, rel=rel)
        assert module.observed[f"norm_bound/{layer.name}"] == pytest.approx(one.norm_bound, rel=rel)
        assert module.observed[f"margin/{layer.name}"] == -module.observed[f"lambda_max/{layer.name}"]
    assert module.observed["lambda_max"] == max(module.observed[f"lambda_max/{layer.name}"] for layer in seam.layers)
    assert module.observed["margin"] == -module.observed["lambda_max"]


def test_micro_batches_report_their_worst_and_every_skips_steps():
    model, module = MambaForCausalLM(MAMBA), a_module(accumulate=2)
    seam, probe = recurrence.install(model), LyapunovProbe(every=2, per_layer=False)
    probe.bind(seam)
    singles = []
    for index in range(2):
        batch = a_batch()
        for target in (a_module(), module):
            trainer = types.SimpleNamespace(global_step=0, max_steps=99)
            first = index if target is module else 0
            probe_here = probe if target is module else LyapunovProbe(per_layer=False)
            probe_here.bind(seam)
            probe_here.on_train_batch_start(trainer, target, batch, first)
            model(**batch)
            probe_here.on_train_batch_end(trainer, target, None, batch, first)
            if target is not module:
                singles.append(target.observed["lambda_max"])
    assert module.observed["lambda_max"] == max(singles)
    assert set(module.observed) == {*lyapunov.FIELDS, "margin"}
    module.observed.clear()
    trainer = types.SimpleNamespace(global_step=1, max_steps=99)
    probe.on_train_batch_start(trainer, module, batch, 0)
    model(**batch)
    probe.on_train_batch_end(trainer, module, None, batch, 0)
    assert module.observed == {}


def test_the_table_of_the_last_step_has_every_exponent_sequence_and_position():
    model, batch, module, probe = MambaForCausalLM(MAMBA), a_batch(), a_module(), LyapunovProbe()
    seam = recurrence.install(model)
    probe.bind(seam)
    probe.on_train_batch_start(types.SimpleNamespace(global_step=98, max_steps=99), module, batch, 0)
    model(**batch)
    probe.on_train_batch_end(None, module, None, batch, 0)
    table = probe.table().set_index(["layer", "kind"])["value"]
    assert not table.isna().any()
    for layer in seam.layers:
        found = {
            kind: table.loc[layer.name, kind].to_numpy() for kind in ("spectrum", "sequence", "position", "product")
        }
        tokens = batch["attention_mask"].sum(1).numpy()
        assert found["sequence"].max() == pytest.approx(module.observed[f"lambda_max/{layer.name}"])
        assert found["spectrum"].max() <= found["sequence"].mean() + 1e-6
        assert found["product"][-1] == pytest.approx((found["sequence"] * tokens).max(), rel=1e-5)
        assert found["product"][0] == pytest.approx(probe.profiles[layer.name].log_norm_BL[:, 0].max().item())
        assert len(found["position"]) == len(found["product"]) == batch["attention_mask"].shape[1]


def test_gradient_checkpointing_is_counted_once():
    model, batch = MambaForCausalLM(MAMBA).train(), a_batch()
    model.activation_checkpointing_enable()
    seam, calls = recurrence.install(model), []
    seam.tap = lambda layer, delta, A: calls.append(layer.name)
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert calls == [layer.name for layer in seam.layers]


def test_a_model_without_recurrence_is_left_alone():
    probe, module = LyapunovProbe(), a_module()
    probe.bind(recurrence.install(torch.nn.Linear(2, 2)))
    trainer = types.SimpleNamespace(global_step=0, max_steps=99)
    probe.on_train_batch_start(trainer, module, {}, 0)
    probe.on_train_batch_end(trainer, module, None, {}, 0)
    assert module.observed == {}


def test_liveness_counts_only_steps_that_were_taken():
    seen = []
    liveness = types.SimpleNamespace(observe_gradients=lambda: seen.append("look"), verdict=seen.append)
    callback, module = AdapterLiveness(liveness), a_module()
    module.skipped_steps = 2
    callback.on_before_optimizer_step(None, module, None)
    callback.on_train_batch_end(types.SimpleNamespace(global_step=5, max_steps=99), module, None, None, 0)
    assert seen == ["look", 3]


@pytest.mark.parametrize("proven", [True, False])
def test_a_missing_proof_of_life_is_said(proven, caplog):
    liveness = types.SimpleNamespace(proven=proven, stalled=[], verdict_at_end=lambda step: None)
    AdapterLiveness(liveness).on_train_end(types.SimpleNamespace(global_step=1, max_steps=99), a_module())
    assert ("too few updates" in caplog.text) is not proven


def test_a_training_whose_updates_were_withheld_has_no_proof_and_stops():
    layer = torch.nn.Linear(2, 2)
    liveness = Liveness(layer, steps=3)
    liveness.observe_gradients()
    module = a_module()
    module.skipped_steps = 6
    with pytest.raises(LivenessError, match="no update was taken"):
        AdapterLiveness(liveness).on_train_end(types.SimpleNamespace(global_step=6, max_steps=99), module)
    liveness.verdict_at_end(1)  # a short training with overflows at its start is unproven, no failure


def test_the_recorder_writes_one_row_a_step_and_feeds_the_loggers(tmp_path):
    logged = []
    logger = types.SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics["loss"])))
    series = StepSeries(tmp_path / "steps.parquet")
    recorder, module = StepRecorder(series, flush_every_s=0.0), a_module(accumulate=2)
    for index, step in enumerate((0, 1, 1, 2)):  # global_step moves on every second micro-batch
        module.observed = {"loss": float(index), "tokens": 10}
        trainer = types.SimpleNamespace(global_step=step, loggers=[logger])
        recorder.on_train_batch_start(trainer, module, None, index)
        recorder.on_train_batch_end(trainer, module, None, None, index)
    assert [row["step"] for row in series.rows] == [1, 2]
    assert logged == [(1, 1.0), (2, 3.0)]
    assert series.path.exists()
    assert all(row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_s"]) for row in series.rows)


def test_training_is_bitwise_the_same_with_and_without_the_probe():
    weights = []
    for probed in (False, True):
        torch.manual_seed(0)
        model, module, probe = MambaForCausalLM(MAMBA).train(), a_module(), LyapunovProbe()
        model.activation_checkpointing_enable()
        seam = recurrence.install(model)
        if probed:
            probe.bind(seam)
        optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-2), a_batch()
        for step in range(3):
            trainer = types.SimpleNamespace(global_step=step, max_steps=99)
            probe.on_train_batch_start(trainer, module, batch, step)
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.on_train_batch_end(trainer, module, None, batch, step)
        assert ("lambda_max" in module.observed) is probed
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(one.equal(other) for one, other in zip(*weights, strict=True))
