"""Which kernel runs a recurrence, on this machine and on others; what is read raw; fallbacks and wrong choices."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lyapft import recurrence
from lyapft.errors import InputError
from tests.test_recurrence import FAMILY, NUMBA, TINY, batch, both, build, pair, told_by


@pytest.mark.skipif(not NUMBA, reason="numba is not installed")
@both
def test_auto_is_the_compiled_kernel_on_a_cpu(kind):
    _, routed, seam = pair(kind)
    routed(**batch())
    assert seam.kernels == {FAMILY[kind]: "cpu-numba", "causal_conv1d": "cpu-numba"}


def test_a_kernel_that_has_no_form_for_one_token_is_refused_where_it_is_required():
    _, routed, _ = pair("mamba", "cpu", require="cpu")
    with pytest.raises(InputError, match=r"kernel\.require=cpu, but causal_conv1d, one token would run kernel 'torch'"):
        told_by(routed.eval(), {"input_ids": batch()["input_ids"]})


def test_a_fallback_is_recorded_and_can_be_forbidden():
    model = build("mamba").double()
    seam = recurrence.install(model)
    model(batch()["input_ids"])
    assert seam.kernels["selective_scan"] == "torch"
    assert "float32 and the model is float64" in seam.fallbacks["selective_scan"]
    seam.remove()
    recurrence.install(model, require="cpu")
    with pytest.raises(InputError, match=r"kernel\.require=cpu.*float64"):
        model(batch()["input_ids"])


def test_kernels_of_another_machine_are_refused_with_what_to_do():
    with pytest.raises(InputError, match="kernel=mamba_ssm cannot run selective_scan here: its kernels need CUDA"):
        recurrence.install(build("mamba"), "mamba_ssm")
    with pytest.raises(InputError, match="kernel=cpu cannot run ssd on cuda"):
        recurrence.install(build("mamba2"), "cpu", device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="mamba-ssm may be there")
def test_on_cuda_auto_prefers_mamba_ssm_and_says_why_not(monkeypatch):
    monkeypatch.setattr(recurrence.mamba_ssm, "missing", lambda operation, device: None)
    assert recurrence.resolve("auto", None, "cuda") == "mamba_ssm"
    monkeypatch.setattr(recurrence.mamba_ssm, "missing", lambda operation, device: "not installed here")
    seam = recurrence.install(build("mamba"), device="cuda")
    assert "not installed here" in seam.fallbacks["selective_scan"]
    with pytest.raises(InputError, match=r"kernel\.require=mamba_ssm.*not installed here"):
        recurrence.install(build("mamba"), require="mamba_ssm", device="cuda")


def test_what_is_read_raw_is_asked_of_where_the_model_will_run(monkeypatch):
    monkeypatch.setattr(recurrence.mamba_ssm, "missing", lambda operation, device: None)
    seam = recurrence.install(build("mamba"), device="cuda")
    assert seam.reads_raw(seam.layers[0]) == {"conv1d", "dt_proj", "x_proj", "out_proj"}


@pytest.mark.parametrize(
    ("kind", "kernel", "fused", "names"),
    [
        ("mamba", "cpu", True, {"conv1d", "dt_proj"}),
        ("mamba2", "cpu", True, {"conv1d"}),
        ("mamba", "stock", True, {"conv1d", "dt_proj", "x_proj", "out_proj"}),
        ("mamba2", "stock", True, {"conv1d", "out_proj"}),
        ("mamba", "stock", False, {"conv1d", "dt_proj"}),
        ("zamba", "cpu", True, {"conv1d"}),
    ],
)
def test_what_is_read_raw_depends_on_the_kernel(kind, kernel, fused, names):
    seam = recurrence.install(build(kind), kernel, fused=fused)
    assert seam.reads_raw(seam.layers[0]) == names


def test_a_model_without_recurrence_has_no_layers():
    dims = {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **dims))
    seam = recurrence.install(model)
    assert seam.layers == []
    assert seam.unknown == []
    seam.remove()


def test_a_recurrence_without_an_adapter_is_named():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("rwkv", vocab_size=60, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    )
    seam = recurrence.install(model)
    assert seam.layers == []
    assert len(seam.unknown) == 2


def test_wrong_choices_are_input_errors():
    with pytest.raises(InputError, match=r"kernel='fast' is unknown"):
        recurrence.install(build("mamba"), "fast")
    with pytest.raises(InputError, match=r"kernel\.require='fast' is unknown"):
        recurrence.install(build("mamba"), require="fast")
    with pytest.raises(InputError, match=r"kernel\.require=stock.*would run kernel 'torch'"):
        recurrence.install(build("mamba"), "torch", require="stock")
    model = build("mamba")
    recurrence.install(model, "torch", require="torch")
    with pytest.raises(InputError, match="already has a forward"):
        recurrence.install(model)
