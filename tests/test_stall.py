"""The state that stops: its closed form against the loop, the remedies, and what the neutral zone says of it."""

import pytest
import torch

from lyapft.experiments import stall
from lyapft.report.experiments import figures, page


@pytest.fixture(scope="module")
def found():
    return stall.run(step=1e-3, starts=[0.0, 2.0], tokens=10000, draws=64, sweep=[1e-3, 1e-1], seed=0)


def row(found, start, name, method):
    return next(r for r in found.rows if (r["start"], r["format"], r["method"]) == (start, name, stall.METHODS[method]))


def test_the_states_of_the_theory_stop_where_it_says(found):
    assert row(found, 0.0, "bf16", "state")["settled"] == 0.25
    assert row(found, 0.0, "bf16", "decay")["settled"] == 0.5
    assert row(found, 2.0, "bf16", "state")["settled"] == 2.0
    assert row(found, 0.0, "fp16", "state")["settled"] == pytest.approx(0.756, abs=5e-4)


@pytest.mark.parametrize("start", [0.0, 2.0])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("step", [2e-4, 1e-3, 7e-3])
def test_the_stop_is_known_in_closed_form(start, name, step):
    states = stall.trajectory("state", name, step, start, round(12 / step), 1, torch.Generator())
    one = stall.spacing(
        states[-1], name
    )  # torch's cast from float64 to fp16 passes float32, so a near tie may round down
    assert abs(stall.predicted_stop(step, start, name) - float(states[-1])) <= float(one)


@pytest.mark.parametrize("method", ["float32", "stochastic", "kahan"])
def test_remedies_come_nearer_than_the_stall(found, method):
    for start in (0.0, 2.0):
        for name in stall.FORMATS:
            stalled, healed = row(found, start, name, "state"), row(found, start, name, method)
            assert abs(healed["error"]) < 0.1 * abs(stalled["error"])


def test_stochastic_rounding_keeps_the_mean_and_the_grid():
    x = torch.full((200_000,), 1.001, dtype=torch.float64)
    rounded = stall.stochastic(x, "bf16", torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    deviation = 0.0078125 * (0.128 * 0.872 / len(x)) ** 0.5
    assert abs(float(rounded.mean()) - 1.001) < 4 * deviation


def test_the_page_shows_both_figures(found):
    content = {"name": "stall", "rows": found.rows, "series": found.series, "experiment": {"seed": 0}}
    assert len(figures(content)) == 2
    assert page.render(content | {"created": "now", "wall_s": 1.0}).count("<figcaption>") == 2
