"""The CUDA path against the plain one: mamba-ssm's own code on a CPU, called by the seam.

One child process imports mamba-ssm with the stand-ins of `mamba_ssm_on_cpu` and measures everything; the tests here
read what it found. Skipped where mamba-ssm or triton is absent, which in continuous integration is a failure.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.tolerances import TOL

RTOL = TOL[torch.float32]["rtol"]
ABSENT = [name for name in ("mamba_ssm", "triton", "einops") if importlib.util.find_spec(name) is None]
KINDS = ("mamba", "falcon_mamba", "mamba2")
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def found(root):
    if ABSENT:
        message = f"{', '.join(ABSENT)} not installed: `make test` builds them without CUDA"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    done = subprocess.run(
        [sys.executable, "-m", "tests.mamba_ssm_measured"], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@each
@pytest.mark.parametrize("path", ["fused", "unfused"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_and_gradients_equal_the_plain_path(found, kind, path, padding):
    result = found["equality"][kind][padding][path]
    assert result["logits"] <= RTOL
    assert result["gradients"] <= RTOL


@each
def test_what_ran_is_recorded(found, kind):
    family = "ssd" if kind == "mamba2" else "selective_scan"
    fused = found["equality"][kind]["none"]["fused"]["kernels"]
    # mamba-ssm normalises dt at another place than FalconMamba does
    assert fused[family] == ("mamba_ssm" if kind == "falcon_mamba" else "mamba_ssm-fused")
    assert found["equality"][kind]["none"]["unfused"]["kernels"] == {family: "mamba_ssm", "causal_conv1d": "mamba_ssm"}
    # a fused kernel lets padding on the left into the state
    assert found["equality"][kind]["left"]["fused"]["kernels"][family] == "mamba_ssm"


@each
@pytest.mark.parametrize("path", ["fused", "unfused"])
def test_the_tap_sees_the_step_sizes_of_the_kernel(found, kind, path):
    assert found["equality"][kind]["none"][path]["delta"] <= RTOL


@each
def test_decoding_by_its_state_updates_equals_the_plain_path(found, kind):
    assert found["decoding"][kind] <= RTOL


@each
def test_packed_sequences_do_not_touch_each_other(found, kind):
    assert found["packing"][kind]["logits"] <= RTOL
    assert found["packing"][kind]["gradients"] <= RTOL


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_adapters_that_stock_leaves_dead_are_alive_through_the_seam(found, kind):
    raw = {"out_proj", "x_proj", "dt_proj"} if kind == "mamba" else {"out_proj"}
    stock, seam = found["adapters"][kind]["stock"], found["adapters"][kind]["seam"]
    assert set(stock["dead"]) == raw
    assert stock["kernels"] == seam["kernels"]  # the same fused kernel ran
    assert seam["dead"] == []
    assert seam["gradients"] <= RTOL  # those of the plain path


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_tuned_state_runs_unfused_and_right(found, kind):
    for name in ("initial_state", "state_offset"):
        result = found["state"][kind][name]
        assert result["logits"] <= RTOL
        assert result["gradients"] <= RTOL
        assert "fused" not in str(result["kernels"])
        family = "ssd" if kind == "mamba2" else "selective_scan"
        assert "a tuned state" in result["fallbacks"][f"{family}, fused"]
    if kind == "mamba":  # its CUDA scan cannot begin with a state: said and recorded
        assert "cannot begin" in found["state"][kind]["initial_state"]["fallbacks"]["selective_scan"]
        assert "kernel.require=mamba_ssm" in found["state"][kind]["required"]
