"""Experiments on models: the shared frame, prompts without padding, and each command's record and page."""

import json
import math
import statistics

import pytest

from lyapft.cell import CellFailed
from lyapft.data import pydoc
from lyapft.errors import InputError
from lyapft.experiments import certificate, closed_loop, depth, growth, record, subjects
from lyapft.experiments.frame import SHARE, Measured, interval, over_seeds
from lyapft.report.experiments import page
from tests import commands
from tests.test_config import composed

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


def test_the_command_takes_models_by_name_and_names_unknown_ones(tmp_path):
    settings = ["experiment.prompts=2", "experiment.tokens=12", "experiment.token=3", "experiment.seeds=1"]
    known, unknown = (
        commands.run("evaluate.py", "experiment=growth", *settings, f"experiment.models=[{name}]", folder=tmp_path)
        for name in ("pythia_tiny", "nothing")
    )
    assert known.returncode == 0, known.stderr
    (written,) = (tmp_path / "runs" / "experiments").glob("growth-*.json")
    assert json.loads(written.read_text())["rows"][0]["model"] == "pythia_tiny"
    assert unknown.returncode != 0
    assert "'nothing' is neither a model of conf/model/ nor the folder of a finished run" in unknown.stderr
    assert "Error in call to target" not in unknown.stderr


def test_runs_of_one_recipe_get_an_interval_over_runs():
    rows = [
        {"model": f"s{i}", "recipe": "mamba · bf16", "rate": value, "low": 0.0, "high": 1.0, "n": 4, "epsilon": e}
        | {"share": 1 - value, "share_low": 0.0, "share_high": 1.0, "note": i}
        for e, values in {0.1: [0.1, 0.3, 0.2], 0.2: [0.7]}.items()
        for i, value in enumerate(values)
    ]
    measured = [Measured("rate"), Measured("share", "share_low", "share_high", SHARE)]
    found = over_seeds([*rows, rows[0] | {"recipe": None}], measured, ["epsilon"])
    assert [row["over"] for row in found] == ["prompts"] * 5 + ["runs"]
    joined, expected = found[-1], interval([0.1, 0.3, 0.2])
    assert (joined["rate"], joined["low"], joined["high"], joined["n"]) == expected
    assert joined["model"] == "mamba · bf16 (3 runs)"
    assert (joined["epsilon"], joined["note"]) == (0.1, None)
    assert joined["share_high"] == 1.0
    assert joined["share_low"] == pytest.approx(1 - expected.high)


@pytest.mark.parametrize("name", ["theorem", "stall", "growth", "depth", "closed_loop", "certificate"])
def test_settings_of_every_experiment_are_typed(name):
    assert composed(f"experiment={name}", name="evaluate").experiment
    for wrong in ("experiment.promts=3", "experiment.tokens=many"):
        with pytest.raises(Exception, match=r"promts|many"):
            composed(f"experiment={name}", wrong, name="evaluate")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("experiment.models=[]", "experiment.models is empty"),
        ("experiment.prompts=0", "experiment.prompts=0 must be above 0"),
        ("experiment.token=200", "experiment.token=200 must be one of the 96 tokens"),
        ("experiment.prompts=100000", "ask for fewer prompts"),
    ],
)
def test_wrong_settings_are_one_clean_sentence(tmp_path, wrong, message):
    with pytest.raises(CellFailed, match=message) as caught:
        record.run(composed("experiment=growth", "experiment.models=[mamba_tiny]", wrong, name="evaluate"), tmp_path)
    assert "Error in call" not in str(caught.value)


def test_the_certificate_has_a_figure_and_enters_the_cards_of_its_runs():
    found = certificate.run(["mamba_tiny"], prompts=2, tokens=16, entries=8, precision="bf16", seed=0)
    assert page_of("certificate", found).count("<figcaption>") == 1
