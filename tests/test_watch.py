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
    low = watch.Rule("low", "x", below=1.0)
    assert low.look({"x": -math.inf}) is None
    assert low.look({"x": math.nan}) is None


def test_a_restored_rule_goes_on_as_if_it_had_not_stopped():
    one, other = (watch.Rule("spike", "x", sigma=3.0, window=20) for _ in range(2))
    for i in range(40):
        one.look({"x": 1 + (i % 3)})
    other.restore(one.state())
    for value in (2.0, 9.0, 4.7, 1.0):
        assert one.look({"x": value}) == other.look({"x": value})
        assert one.broken == other.broken


@pytest.mark.parametrize("wrong", [{}, {"sigma": 0.0}, {"sigma": 3.0, "window": 4}])
def test_a_rule_that_could_never_speak_is_refused(wrong):
    with pytest.raises(InputError, match="rule r"):
        watch.Rule("r", "x", **wrong)
