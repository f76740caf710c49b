"""Shadow and resource probes: right numbers, and not a bit of the training changed by watching."""

import math
import os
import subprocess
import sys
import types
from contextlib import nullcontext
from functools import partial

import pandas as pd
import psutil
import pytest
import torch
from torch.testing import assert_close
from transformers import Mamba2ForCausalLM, MambaForCausalLM

from lyapft import cell, environment, precision, recurrence, sensitivity
from lyapft.cell import summary
from lyapft.probes import ResourceProbe, ShadowProbe, StepRecorder, resources
from lyapft.records import StepSeries
from tests.test_cell import prepared, same_weights
from tests.test_precision import cfg as precision_settings
from tests.test_probes import MAMBA, MAMBA2, a_batch, a_module

CLOCKS = ("step_s", "tokens_per_s", "shadow_s")
WATCHED = ("memory", "cpu", "shadow")


def series(one: cell.Cell) -> pd.DataFrame:
    frame = pd.read_parquet(one.folder / "steps.parquet")
    return frame[[c for c in frame if c not in CLOCKS and not c.startswith(WATCHED)]]


@pytest.mark.parametrize(
    "overrides",
    [
        ("precision=bf16", "peft.dropout=0.3", "peft.targets=[in_proj]"),
        ("precision=fp16", "peft=none"),
        ("precision=bf16_true", "model=mamba2_tiny"),
        ("precision=bf16", "model=llama_tiny", "data.packing=true"),
        ("precision=bf16_true", "data.packing=true", "data.max_length=128"),
        ("precision=fp16_true", "precision.init_scale=256"),
    ],
    ids=["dropout", "fp16", "bf16_true", "packed", "packed_bf16_true", "fp16_true"],
)
def test_watching_changes_no_bit_of_the_training(tmp_path, overrides):
    silent = prepared(tmp_path / "a", *overrides, "reference=off", "probe=none")
    watched = prepared(
        tmp_path / "b", *overrides, "reference=off", "probe=all", "probe.shadow.every=1", "trainer.accumulate=1"
    )
    assert silent.id == watched.id
    first, second = cell.ensure(silent), cell.ensure(watched)
    assert (first["status"], second["status"]) == ("ok", "ok")
    assert same_weights(silent.folder, watched.folder)
    assert first["kernels"] == second["kernels"]
    columns = list(series(silent))
    pd.testing.assert_frame_equal(series(silent), series(watched)[columns], check_exact=True)
    shadow = second["shadow"]
    assert shadow["n"] == 4
    assert 0 < shadow["kl_mean"] < 0.05
    assert 0.5 < shadow["top1_min"] <= 1
    assert 0 < shadow["deviation_max"] < 0.1
    assert shadow["seconds"] > 0


@pytest.mark.parametrize("model", ["mamba_tiny", "mamba2_tiny"])
def test_packed_weights_in_half_are_as_near_to_float32_as_in_rows_of_their_own(tmp_path, model):
    """The widened pass keeps sequences apart as well: else its KL is that of other texts, hundreds of times larger."""
    settings = (f"model={model}", "precision=bf16_true", "probe=shadow", "probe.shadow.every=1", "data.max_length=128")
    kl = {
        packing: cell.ensure(prepared(tmp_path, *settings, "reference=off", f"data.packing={packing}"))["shadow"][
            "kl_mean"
        ]
        for packing in ("true", "false")
    }
    assert 0 < kl["true"] < 5 * kl["false"]


def test_full_precision_is_its_own_shadow(tmp_path):
    record = cell.ensure(
        prepared(tmp_path, "precision=fp32", "reference=off", "probe=[lyapunov,shadow]", "probe.shadow.every=2")
    )
    shadow = record["shadow"]
    assert (shadow["n"], shadow["kl_max"], shadow["top1_min"], shadow["deviation_max"]) == (2, 0, 1, 0)


@pytest.mark.parametrize("build", [lambda: MambaForCausalLM(MAMBA), lambda: Mamba2ForCausalLM(MAMBA2)])
def test_weights_in_half_are_compared_with_the_same_weights_widened(build):
    torch.manual_seed(0)
    model, batch = build(), a_batch()
    strategy = precision.build(precision_settings("bf16_true"), "cpu")
    strategy.cast(model)
    seam, module = recurrence.install(model), a_module()
    module.model, module.token_arguments = model, lambda given: {"attention_mask": given["attention_mask"]}
    probe = ShadowProbe(every=1)
    probe.bind(seam, strategy.autocast, nullcontext)
    with strategy:
        probe.on_train_batch_start(None, module, batch, 0)
        probe.on_before_optimizer_step(types.SimpleNamespace(global_step=0), module, None)
        assert seam.kernels == {}  # what the shadow ran is not the training's
        stored = {name: value.clone() for name, value in model.state_dict().items()}
        other = build()
        other.load_state_dict({name: value.float() for name, value in stored.items()})
        with torch.no_grad():
            half = model(**batch).logits.float().log_softmax(-1)
            full = other(**batch).logits.log_softmax(-1)
    real = batch["attention_mask"].bool()
    kl = (full.exp() * (full - half)).sum(-1)[real].mean()
    assert module.observed["shadow_kl"] > 0
    assert_close(module.observed["shadow_kl"], float(kl), rtol=0.05, atol=1e-9)
    assert {p.dtype for p in model.parameters()} >= {torch.bfloat16}


def test_an_overflow_of_the_shadow_is_counted_and_a_shadow_is_no_part_of_a_step(tmp_path):
    kl, nothing = [1e-3, math.nan, 3e-3], [math.nan] * 3
    taken = {"shadow_kl": kl, "shadow_top1": [1.0, 0.5, 0.75], "shadow_deviation": [0.1, math.nan, 0.2]}
    taken |= {"shadow_deviation/a": [0.1, 0.1, 0.05], "shadow_deviation/b": [0.1, math.nan, 0.2]}
    measured = pd.DataFrame(taken | {"shadow_s": [2.0, 2.0, 2.0], "step_s": [1.0, 1.0, 2.0]})
    between = pd.DataFrame(dict.fromkeys((*taken, "shadow_s"), nothing) | {"step_s": [1.0, 1.0, 2.0]})
    found = summary.shadow(pd.concat([measured, between]))["shadow"]
    assert (found["n"], found["nonfinite"]) == (3, 1)
    assert (found["kl_mean"], found["kl_max"]) == (pytest.approx(2e-3), 3e-3)
    assert found["deviation_max_by_block"]["a"] == 0.1
    assert math.isnan(found["deviation_max_by_block"]["b"])  # a record has null there
    assert found["share_of_training"] == pytest.approx(6 / 14)
    recorder, module = StepRecorder(StepSeries(tmp_path / "s.parquet"), flush_every_s=99.0), a_module()
    trainer = types.SimpleNamespace(global_step=1, loggers=[])
    recorder.on_train_batch_start(trainer, module, None, 0)
    module.observed = {"tokens": 10, "shadow_s": 100.0}
    recorder.on_train_batch_end(trainer, module, None, None, 0)
    assert -100 < recorder.series.rows[0]["step_s"] < -90


def test_the_seam_is_as_it_was_after_a_shadow_that_failed(monkeypatch):
    model, module = MambaForCausalLM(MAMBA), a_module()
    seam = recurrence.install(model)
    seam.tap, seam.sequence = (lambda *_: None), torch.zeros(1)
    tap, sequence = seam.tap, seam.sequence
    module.model, module.token_arguments = model, lambda given: {}
    monkeypatch.setattr(sensitivity, "shadow", lambda *_, **__: 1 / 0)
    probe = ShadowProbe(every=1)
    probe.bind(seam, nullcontext, nullcontext)
    probe.on_train_batch_start(None, module, a_batch(), 0)
    with pytest.raises(ZeroDivisionError):
        probe.on_before_optimizer_step(types.SimpleNamespace(global_step=0), module, None)
    assert seam.tap is tap
    assert seam.sequence is sequence


# --- resources


def test_memory_and_processor_time_are_this_process():
    module = a_module()
    module.observed = {"tokens": 100}
    probe = ResourceProbe()
    trainer = types.SimpleNamespace(global_step=1)
    probe.on_train_start(trainer, module)
    held = torch.ones(8_000_000)  # 32 MB, touched
    spin = sum(i * i for i in range(300_000))
    probe.on_train_batch_end(trainer, module, None, None, 0)
    seen = module.observed
    assert abs(seen["memory_bytes"] - psutil.Process(os.getpid()).memory_info().rss) < 16 * 2**20
    assert seen["memory_peak_bytes"] >= seen["memory_bytes"] > held.nbytes > spin * 0
    assert seen["memory_bytes_per_token"] == seen["memory_peak_bytes"] / 100
    assert 1 < seen["cpu_percent"] < 100 * (os.cpu_count() or 1) * 1.5


@pytest.mark.skipif(not environment.STATUS.exists(), reason="the peak is known on Linux")
def test_the_peak_is_not_that_of_the_process_that_launched_this_one():
    code = (
        "import torch; from lyapft.probes import ResourceProbe; print(ResourceProbe().memory(torch.device('cpu'))[1])"
    )
    held = torch.ones(500_000_000, dtype=torch.int8)  # touched
    held += torch.ones((), dtype=torch.int8)
    two = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)]
    del held
    two.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True))
    first, second = (int(done.stdout) for done in two)
    assert first == pytest.approx(second, abs=100_000_000)


def test_without_linux_the_peak_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "STATUS", tmp_path / "none")
    module = a_module()
    module.observed = {"tokens": 100}
    ResourceProbe().on_train_batch_end(types.SimpleNamespace(global_step=1), module, None, None, 0)
    assert abs(module.observed["memory_bytes"] - psutil.Process().memory_info().rss) < 16 * 2**20
    assert set(module.observed) == {"tokens", "memory_bytes"}


def test_only_whole_steps_and_those_asked_for_are_measured():
    module, probe = a_module(accumulate=2), ResourceProbe(every=3)
    probe.on_train_start(types.SimpleNamespace(global_step=0), module)
    for step, batch_idx in ((1, 0), (1, 1), (2, 3)):
        probe.on_train_batch_end(types.SimpleNamespace(global_step=step), module, None, None, batch_idx)
    assert module.observed == {}


class NVMLError(Exception):
    """As NVML's own errors are: a slice of a GPU has no busy share."""


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("pynvml"), RuntimeError("no driver"), NVMLError("Not Supported")]
)
def test_on_cuda_the_allocator_and_the_driver_are_asked(monkeypatch, caplog, error):
    module, device = a_module(), torch.device("cuda")
    module.device, module.observed = device, {"tokens": 10}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 5 if where is device else None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: 7 if where is device else None)
    asked = []
    monkeypatch.setattr(torch.cuda, "utilization", lambda where: asked.append(where) or 42)
    probe, trainer = ResourceProbe(), types.SimpleNamespace(global_step=1)
    probe.on_train_batch_end(trainer, module, None, None, 0)
    assert (module.observed["memory_bytes"], module.observed["memory_peak_bytes"]) == (5, 7)
    assert module.observed["gpu_percent"] == 42
    monkeypatch.setattr(torch.cuda, "utilization", partial(_fails, asked, error))
    module.observed = {"tokens": 10}
    probe.on_train_batch_end(trainer, module, None, None, 0)
    probe.on_train_batch_end(trainer, module, None, None, 0)
    assert "gpu_percent" not in module.observed
    assert len(asked) == 2  # not asked again
    assert caplog.text.count(f"the busy share of the GPU is not measured: {error}") == 1


def _fails(asked, error, where):
    asked.append(where)
    raise error
