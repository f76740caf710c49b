"""Rules about numbers: what breaks them, what they remember."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyapft import watch
from lyapft.errors import InputError


def test_below_and_above_are_limits_themselves_allowed():
    rule = watch.Rule("edge", "margin", below=0.1, above=0.9)
    assert [rule.look({"margin": value}) is not None for value in (0.1, 0.05, 0.9, 0.91)] == [False, True, False, True]
    assert str(rule.look({"margin": 0.05})) == "edge: margin is 0.05, below 0.1"
    assert str(rule.look({"margin": 2.0})) == "edge: margin is 2, above 0.9"


@given(values=st.lists(st.floats(0.5, 2.0), min_size=watch.LEAST, max_size=200), sigma=st.floats(0.5, 8.0))
def test_a_spike_is_judged_by_the_last_window_without_itself(values, sigma):
    rule = watch.Rule("spike", "x", sigma=sigma, window=32)
    for value in values:
        rule.look({"x": value})
    last = values[-32:]
    limit = statistics.fmean(last) + sigma * statistics.stdev(last)
    event = rule.look({"x": limit + 0.01})
    assert event is not None
    assert event.limit == pytest.approx(limit)
    again = watch.Rule("spike", "x", sigma=sigma, window=32)
    for value in values:
        again.look({"x": value})
    assert again.look({"x": limit - 0.01}) is None


def test_few_values_judge_no_spike_and_a_missing_or_infinite_one_nothing():
    rule = watch.Rule("spike", "x", sigma=1.0)
    assert [rule.look({"x": 10.0**i}) for i in range(watch.LEAST)] == [None] * watch.LEAST
    assert rule.look({"y": 1.0}) is None


@pytest.mark.parametrize("metric", watch.WITHHELD)
def test_a_step_that_the_module_withholds_breaks_no_rule(metric):
    rule = watch.Rule("r", metric, above=1.0)
    assert [rule.look({metric: value}) for value in (math.inf, math.nan)] == [None, None]


def test_any_other_number_that_is_none_breaks_its_rule_and_enters_no_window():
    rule = watch.Rule("low", "x", below=1.0, fall=2.0)
    assert "is not a number; its limit is 1" in str(rule.look({"x": math.nan}))
    assert rule.look({"x": -math.inf}).limit == 1.0
    assert rule.look({"x": math.inf}) is None
    assert rule.look({"x": 3.0}) is None  # the infinite one is not the largest so far


def test_a_fall_is_judged_by_the_largest_of_the_window():
    rule = watch.Rule("drop", "x", fall=4.0, window=3)
    broken = [rule.look({"x": value}) is not None for value in (8.0, 2.0, 1.9, 1.9, 1.0, 0.4)]
    assert broken == [False, False, True, True, False, True]


def test_zero_is_a_limit_like_any_other():
    assert watch.Rule("r", "x", below=0.0).look({"x": -1.0}).limit == 0.0


@pytest.mark.parametrize(
    ("metric", "probe"), [("loss", None), ("margin", "lyapunov"), ("shadow_deviation/a.0", "shadow")]
)
def test_repeatable_numbers_and_who_measures_them(metric, probe):
    assert watch.measured_by(metric) == probe


@pytest.mark.parametrize("metric", ["step_s", "shadow_s", "memory_bytes", "los"])
def test_what_differs_from_run_to_run_is_no_number_for_a_guard(metric):
    with pytest.raises(InputError, match=f"{metric} is no number that is the same"):
        watch.measured_by(metric)


def test_a_restored_rule_goes_on_as_if_it_had_not_stopped():
    one, other = (watch.Rule("spike", "x", sigma=3.0, window=20) for _ in range(2))
    for i in range(40):
        one.look({"x": 1 + (i % 3)})
    other.restore(one.state())
    for value in (2.0, 9.0, 4.7, 1.0):
        assert one.look({"x": value}) == other.look({"x": value})
        assert one.broken == other.broken


@pytest.mark.parametrize("wrong", [{}, {"sigma": 0.0}, {"sigma": 3.0, "window": 4}, {"fall": 1.0}])
def test_a_rule_that_could_never_speak_is_refused(wrong):
    with pytest.raises(InputError, match="rule r"):
        watch.Rule("r", "x", **wrong)
