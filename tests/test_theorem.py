"""The theorem's check on random layers: exact in float64, and broken by formats only where it says so."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from lyapft.experiments import theorem
from tests import commands


def test_slopes_of_pure_exponentials_are_their_rates():
    t = torch.arange(40, dtype=torch.float64)[:, None, None]
    rate = torch.tensor([[-0.5, -0.01, 0.02]], dtype=torch.float64)
    assert_close(
        theorem.rates((rate * t).exp(), torch.tensor([1e-12], dtype=torch.float64)), rate, rtol=1e-9, atol=1e-12
    )
    assert theorem.rates((rate * t).exp()[:4], torch.tensor([1e-12], dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize("family", theorem.FAMILIES)
def test_a_deviation_of_the_state_is_the_slowest_channels_product(family):
    generator = torch.Generator().manual_seed(0)
    log_decay, write = theorem.random_layers(family, 20, 30, generator)
    sizes = torch.tensor([1e-3, 1e-1], dtype=torch.float64)
    found = theorem.deviations(log_decay, write, sizes, torch.float64, "state")
    expected = log_decay.cumsum(0).amax(-1).exp()[:, None].expand_as(found)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_theorem_holds_in_float64_and_formats_break_the_exponential():
    rows, series = theorem.run(layers=60, tokens=200, sizes=[1e-8, 1e-3, 1e-1], seed=0)
    assert all(len(curve["median"]) == 3 for curve in series["curves"])
    assert len(rows) == 16
    for row in rows:
        if row["format"] == "fp64":
            assert row["share_nonpositive"] == 1.0
            assert row["zeta_low"] <= row["zeta"] <= row["zeta_high"] < 0
            assert row["largest"] <= 1 + 1e-6
            assert row["broken"] == 0
        if row["format"] == "bf16":
            assert row["broken"] > 0.3  # an ε below the spacing of the format is not even stored
            assert not math.isnan(row["broken_token"])


def test_the_command_writes_its_numbers_once(tmp_path):
    overrides = ["experiment=theorem", "experiment.layers=4", "experiment.tokens=20", "experiment.sizes=[1e-3]"]
    for _ in range(2):
        done = commands.run("evaluate.py", *overrides, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "runs" / "experiments").glob("*.json")
    assert "<figcaption>" in written.with_suffix(".html").read_text(encoding="utf-8")
    content = json.loads(written.read_text())
    assert len(content["rows"]) == 16
    assert content["experiment"]["layers"] == 4
    assert "selective_scan" in done.stdout
    assert written.name in done.stdout
