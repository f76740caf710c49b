"""Experiments on models: the shared frame, prompts without padding, and each command's record and page."""

import json
import math
import statistics
import subprocess
import sys

import pytest

from lyapft.data import pydoc
from lyapft.errors import InputError
from lyapft.experiments import closed_loop, depth, growth, subjects
from lyapft.experiments.frame import interval
from lyapft.report.experiments import page

MODELS = ["mamba_tiny", "llama_tiny"]


def page_of(name, found):
    content = {"name": name, "rows": found.rows, "series": found.series, "experiment": {}}
    return page.render(content | {"created": "now", "wall_s": 1.0})


def test_an_interval_is_students():
    values = [0.1, 0.4, 0.2, 0.9]
    found = interval([*values, math.nan])
    half = 3.182446 * statistics.stdev(values) / 2
    assert found.n == 4
    assert found.low == pytest.approx(0.4 - half, rel=1e-6)
    assert found.high == pytest.approx(0.4 + half, rel=1e-6)
    assert math.isnan(interval([1.0]).low)


def test_prompts_have_one_length_and_too_few_are_refused():
    with subjects.load("mamba_tiny") as subject:
        assert subject.recurrent
        assert subjects.prompts(subject, pydoc.texts(), 3, 20).shape == (3, 20)
        with pytest.raises(InputError, match="ask for fewer"):
            subjects.prompts(subject, ["a short text"], 1, 20)


def test_growth_compares_models_on_one_axis():
    found = growth.run(MODELS, prompts=2, tokens=12, token=3, epsilon=1e-3, seeds=2)
    assert [row["recurrent"] for row in found.rows] == [True, False]
    for row, curve in zip(found.rows, found.series["curves"], strict=True):
        assert row["n"] == 2
        assert row["low"] < row["rate"] < row["high"]
        assert len(curve["mean"]) == len(curve["x"]) == 9
        assert all(
            low <= mean <= high for low, mean, high in zip(*(curve[k] for k in ("low", "mean", "high")), strict=True)
        )
    assert page_of("growth", found).count("<figcaption>") == 1


def test_depth_sums_the_exponents_of_the_blocks():
    found = depth.run(MODELS, prompts=2, tokens=8, directions=2, seeds=1)
    for row, curve in zip(found.rows, found.series["curves"], strict=True):
        blocks = len(curve["mean"]) - 1
        assert curve["mean"][-1] / blocks == pytest.approx(row["exponent"], rel=1e-9)
    assert page_of("depth", found).count("<figcaption>") == 1


def test_decoding_agrees_without_a_change_and_not_after_a_large_one():
    found = closed_loop.run(["mamba_tiny"], prompts=2, tokens=8, new_tokens=6, sizes=[0.0, 100.0], seeds=1)
    still, moved = found.rows
    assert (still["agreement"], still["first_difference"]) == (1.0, 6.0)
    assert moved["agreement"] < 1.0
    assert page_of("closed_loop", found).count("<figcaption>") == 1


def test_the_command_takes_models_by_name_and_names_unknown_ones(root, tmp_path):
    settings = ["experiment.prompts=2", "experiment.tokens=12", "experiment.token=3", "experiment.seeds=1"]
    command = [sys.executable, str(root / "evaluate.py"), "experiment=growth", *settings]
    known, unknown = (
        subprocess.run([*command, f"experiment.models=[{name}]"], cwd=tmp_path, capture_output=True, text=True,
                       timeout=120, check=False)
        for name in ("pythia_tiny", "nothing")
    )  # fmt: skip
    assert known.returncode == 0, known.stderr
    (written,) = (tmp_path / "runs" / "experiments").glob("growth-*.json")
    assert json.loads(written.read_text())["rows"][0]["model"] == "pythia_tiny"
    assert unknown.returncode != 0
    assert "model=nothing is not a choice" in unknown.stderr
