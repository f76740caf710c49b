"""Intervals, tests and decisions over seeds against SciPy, statsmodels, enumeration and simulated studies."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lyapft.divergence import (
    ALPHA,
    BCA_COVERAGE,
    Comparison,
    Estimate,
    adjusted,
    bca_interval,
    compare,
    compare_each,
    estimate,
    holm,
    icl_gains,
    p_different,
    p_equivalent,
    p_outside,
    power_equivalent,
    power_outside,
    rank_test,
    ratio_of_means,
    seeds_to_decide,
    t_interval,
)

statsmodels_weights = pytest.importorskip("statsmodels.stats.weightstats", reason="an oracle of this file")
from statsmodels.stats.multitest import multipletests  # noqa: E402
from statsmodels.stats.power import TTestPower  # noqa: E402

CLOSE = {"rel": 1e-9, "abs": 1e-12}
samples = st.lists(st.floats(-5, 5), min_size=2, max_size=12).filter(lambda v: np.std(v) > 1e-3)
EIGHT = [0.3, -0.1, 0.4, 0.2, 0.0, 0.5, -0.2, 0.1]


# --- estimates -------------------------------------------------------------------------------------------------------


@given(samples)
def test_the_t_interval_is_that_of_scipy(values: list[float]) -> None:
    low, high = t_interval(values)
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (float(low), float(high)) == pytest.approx((theirs.low, theirs.high), **CLOSE)


def test_an_interval_by_hand() -> None:
    # 1, 2, 3: mean 2, s = 1, s/√3 = 0.57735, t_2(0.975) = 4.30265
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert (found.n, found.few, estimate(range(8)).few) == (3, True, False)


def test_an_interval_is_cut_where_the_mean_cannot_lie() -> None:
    assert estimate([0.1, 1.0], least=0.0).low == 0.0
    assert estimate([0.9, 0.1], most=1.0).high == 1.0
    assert math.isnan(estimate([0.5], least=0.0, most=1.0).low)  # one seed still has none


def test_one_seed_has_no_interval_and_none_has_no_mean() -> None:
    one, none = estimate([0.5]), estimate([])
    assert (one.mean, one.n) == (0.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(none.mean)
    assert none.n == 0
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        estimate([0.5, math.nan])


def test_the_bootstrap_is_scipys_over_seeds_and_survives_equal_values() -> None:
    theirs = stats.bootstrap((EIGHT,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(0))
    low, high = bca_interval(EIGHT)
    # the last bit may differ: a power is rounded otherwise in a table than alone
    assert (float(low), float(high)) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-14, abs=1e-16)
    low, high = bca_interval([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    assert (low[0], high[0]) == (1.0, 1.0)
    assert 1.0 <= low[1] < 2.0 < high[1] <= 3.0
    assert np.isnan(bca_interval([[1.0], [2.0]])).all()


def test_a_row_of_a_table_has_the_bootstrap_interval_that_it_has_alone() -> None:
    rng = np.random.default_rng(5)
    for n in (2, 3, 8, 41):
        rows = rng.binomial(50, 0.4, (5, n)) / 3.0
        low, high = bca_interval([*rows, [1.0] * n])
        alone = [bca_interval(row) for row in (*rows, [1.0] * n)]
        assert list(zip(low, high, strict=True)) == [(float(a), float(b)) for a, b in alone]


def test_t_covers_95_percent_and_bca_what_is_published_for_it() -> None:
    rng = np.random.default_rng(1)
    for n, published in BCA_COVERAGE.items():
        values = rng.standard_normal((2000, n))
        covered = [float(np.mean((low <= 0) & (high >= 0))) for low, high in (t_interval(values), _bca(values[:1000]))]
        assert 0.93 <= covered[0] <= 0.97
        error = 4 * math.sqrt(published * (1 - published) / 1000)
        assert abs(covered[1] - published) < error, (n, covered)


def _bca(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return bca_interval(values, resamples=999)


def test_a_ratio_interval_holds_the_ratios_that_a_paired_t_test_does_not_reject() -> None:
    rng = np.random.default_rng(3)
    top, bottom = rng.normal(1.0, 0.2, 10), rng.normal(1.5, 0.2, 10)
    found = ratio_of_means(top, bottom)
    assert found.mean == pytest.approx(top.mean() / bottom.mean())
    for bound in (found.low, found.high):
        assert stats.ttest_rel(top, bound * bottom).pvalue == pytest.approx(0.05, abs=1e-9)
    assert found.low < found.mean < found.high
    assert math.isnan(ratio_of_means(top, rng.normal(0.0, 0.2, 10)).mean)  # the bottom may be 0
    assert ratio_of_means([3.0], [2.0]).mean == 1.5


def test_a_ratio_needs_a_bottom_whose_interval_leaves_out_zero_with_the_least_spread_that_is_believed() -> None:
    n, top = 4, [0.3, 0.3, 0.3, 0.3]
    half = stats.t.ppf(0.975, n - 1) * 0.05 / math.sqrt(n)  # of a bottom that is alike on every seed
    assert math.isnan(ratio_of_means(top, [0.99 * half] * n, (0.0, 0.05)).mean)
    found = ratio_of_means(top, [1.01 * half] * n, (0.0, 0.05))
    assert found.mean == pytest.approx(0.3 / (1.01 * half))
    for bound in (found.low, found.high):  # the paired t test, whose spread is that of ρ · bottom alone
        t = (0.3 - bound * 1.01 * half) / (abs(bound) * 0.05 / math.sqrt(n))
        assert abs(t) == pytest.approx(stats.t.ppf(0.975, n - 1))
    wide = [0.5, 0.9, 0.2, 0.7]
    assert ratio_of_means(wide, [x + 1.0 for x in wide], (0.1, 0.1)) == ratio_of_means(wide, [x + 1.0 for x in wide])


# --- tests -----------------------------------------------------------------------------------------------------------


@given(samples, st.floats(0.1, 3.0))
def test_p_values_are_those_of_scipy_and_statsmodels(values: list[float], margin: float) -> None:
    described = statsmodels_weights.DescrStatsW(values)
    assert float(p_different(values)) == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, **CLOSE)
    assert float(p_equivalent(values, margin)) == pytest.approx(described.ttost_mean(-margin, margin)[0], **CLOSE)
    above = stats.ttest_1samp(values, margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, -margin, alternative="less").pvalue
    assert float(p_outside(values, margin)) == pytest.approx(min(1.0, 2 * min(above, below)), **CLOSE)


def test_equal_differences_prove_nothing_unless_the_worth_of_an_answer_is_known() -> None:
    assert math.isnan(p_equivalent([0.0] * 4, 1.0))
    assert compare([0.0] * 4).outcome() == "undecided"
    assert compare([0.0] * 4, resolution=0.5).outcome() == "equivalent"
    assert compare([0.0, 0.0], resolution=0.5).outcome() == "undecided"  # two seeds: t = 1 / (0.5/√2) = 2.8 < 6.3
    assert compare([0.3]).outcome() == "undecided"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist(), **CLOSE)


def test_a_test_that_was_not_possible_counts_in_the_family_and_stays_nan() -> None:
    found = holm([0.01, math.nan, 0.02])
    assert found[::2] == pytest.approx([0.03, 0.04])
    assert math.isnan(found[1])


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=8))
def test_the_rank_test_is_an_enumeration_of_signs(values: list[int]) -> None:
    kept = [v for v in values if v]
    found = rank_test(values)
    ranks = stats.rankdata(np.abs(kept)) if kept else np.array([])
    sums = [float(np.dot(signs, ranks)) for signs in itertools.product((-1, 1), repeat=len(kept))]
    own = float(np.dot(np.sign(kept), ranks)) if kept else 0.0
    share = np.mean([abs(total) >= abs(own) - 1e-9 for total in sums])
    assert found.p == pytest.approx(share)
    assert found.n == len(kept)
    assert found.smallest_p <= found.p + 1e-12


def test_the_rank_test_is_scipys_without_ties_and_says_its_smallest_p() -> None:
    values = [0.1, -0.25, 0.3, 0.45, 0.5]
    assert rank_test(values).p == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)
    assert rank_test([0.1, 0.2, 0.3, 0.4, 0.5]).p == rank_test(values).smallest_p == 2 / 2**5
    assert rank_test([0.0, 0.0]).smallest_p == 1.0


@given(st.lists(st.lists(st.integers(-4, 4), min_size=1, max_size=5), max_size=6), st.data())
def test_comparisons_of_a_table_are_those_of_each_alone(rows: list[list[int]], drawn: st.DataObject) -> None:
    grains = [drawn.draw(st.sampled_from([0.0, 0.5, 2.0])) for _ in rows]
    alone = [compare(row, 1.5, grain) for row, grain in zip(rows, grains, strict=True)]
    assert repr(compare_each(rows, 1.5, grains)) == repr(alone)  # equal, NaN and all


# --- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (EIGHT, "equivalent"),
        ([3.1, 2.7, 3.4, 2.9, 3.3], "better"),
        ([-3.1, -2.7, -3.4, -2.9, -3.3], "worse"),
        ([2.0, -2.0, 1.5, -1.0], "undecided"),
        ([0.9, 1.1, 1.0, 0.95], "undecided"),
    ],
)
def test_outcomes(values: list[float], expected: str) -> None:
    assert compare(values).outcome() == expected


def test_a_table_is_judged_together() -> None:
    alone = [compare(EIGHT, margin) for margin in (0.4, 0.5, 5.0)]
    together = adjusted(alone)
    assert [c.p_equivalent for c in together] == holm([c.p_equivalent for c in alone])
    assert [c.family for c in together] == [3, 3, 3]
    assert alone[0].outcome() == "equivalent"
    assert together[0].p_equivalent >= alone[0].p_equivalent


@pytest.mark.parametrize(("mean", "sd"), [(1.6, 1.0), (-1.5, 0.5), (2.0, 3.0)])
def test_seeds_to_show_a_difference_are_those_of_statsmodels(mean: float, sd: float) -> None:
    effect = (abs(mean) - 1.0) / sd
    n = TTestPower().solve_power(effect, alpha=ALPHA / 2, power=0.8, alternative="larger")
    assert seeds_to_decide(mean, sd) == math.ceil(n)
    assert power_outside(20, mean, sd, 1.0) == pytest.approx(
        TTestPower().power(effect, 20, ALPHA / 2, alternative="larger"), abs=1e-6
    )


@pytest.mark.parametrize(("n", "mean", "sd"), [(8, 0.0, 0.8), (12, 0.3, 1.0), (20, -0.2, 1.5)])
def test_the_power_of_equivalence_is_that_of_simulated_studies(n: int, mean: float, sd: float) -> None:
    values = np.random.default_rng(5).normal(mean, sd, (20_000, n))
    assert power_equivalent(n, mean, sd, 1.0) == pytest.approx(np.mean(p_equivalent(values, 1.0) <= ALPHA), abs=0.015)


def test_seeds_needed_are_the_fewest_and_none_where_none_would_do() -> None:
    n = seeds_to_decide(0.2, 1.0)
    assert n is not None
    assert power_equivalent(n, 0.2, 1.0, 1.0) >= 0.8 > power_equivalent(n - 1, 0.2, 1.0, 1.0)
    assert seeds_to_decide(0.2, 1.0, alpha=0.01) > n
    assert seeds_to_decide(1.0, 1.0) is None  # on the margin itself
    assert seeds_to_decide(0.0, 0.0) is None
    assert seeds_to_decide(math.nan, 1.0) is None


# --- whole studies, simulated ----------------------------------------------------------------------------------------


def null_studies(studies: int, recipes: int, seeds: int, items: int = 200, flip: float = 0.1) -> np.ndarray:
    """Signed divergences in points, studies × recipes × seeds, of recipes that gain and lose answers alike."""
    rng = np.random.default_rng(7)
    gained = rng.binomial(items, flip / 2, (studies, recipes, seeds))
    lost = rng.binomial(items, flip / 2, (studies, recipes, seeds))
    return 100 * (gained - lost) / items


@pytest.mark.parametrize(("recipes", "seeds"), [(1, 8), (5, 5), (5, 8)])
def test_false_positives_stay_below_six_percent_over_2000_null_studies(recipes: int, seeds: int) -> None:
    studies = null_studies(2000, recipes, seeds)
    p = p_different(studies, resolution=100 / 200)
    found = np.mean([min(holm(row)) <= ALPHA for row in p])
    assert found <= 0.06
    # A test of the absolute difference, which is never negative, finds one in most of these studies.
    assert np.mean(np.min(p_different(np.abs(studies)), axis=1) * recipes <= ALPHA) > 0.5


def test_nothing_at_the_margin_is_called_equivalent_or_outside_more_than_one_time_in_twenty() -> None:
    values = np.random.default_rng(9).normal(1.0, 0.7, (20_000, 8))
    assert np.mean(p_equivalent(values, 1.0) <= ALPHA) <= 0.06
    assert np.mean(p_outside(values, 1.0) <= ALPHA) <= 0.06


# --- in-context learning ---------------------------------------------------------------------------------------------


def test_icl_gains_by_hand() -> None:
    scores = [
        {"task": task, "shots": shots, "metric": metric, "value": value}
        for task, metric, values in (
            ("a", "acc", {0: 0.2, 1: 0.3, 5: 0.4}),
            ("a", "acc_norm", {0: 0.9, 1: 0.9, 5: 0.9}),
            ("b", "acc", {0: 0.0, 1: 0.5}),
            ("c", "acc", {0: 0.5}),
            ("d", "acc", {1: 0.5}),
            ("e", "acc", {0: 0.5, 3: 0.4}),
        )
        for shots, value in values.items()
    ]
    assert icl_gains(scores) == pytest.approx({"a": (0.5 + 1.0) / 2, "e": -0.2})


def test_a_comparison_is_plain_numbers() -> None:
    found = compare(EIGHT)
    assert isinstance(found, Comparison)
    assert isinstance(found.estimate, Estimate)
    assert all(isinstance(getattr(found, name), float) for name in ("sd", "p_different", "p_equivalent", "p_outside"))
    assert found.seeds_needed() is not None
