"""Paired divergence against plain arithmetic on whole numbers, and flips against a brute-force count."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lyapft.divergence import (
    Divergence,
    ScoreDivergence,
    against_counterparts,
    answer_shift,
    item_flips,
    paired_divergence,
)
from tests import synthetic


def score(task: str, shots: int, value: float) -> dict[str, object]:
    return {"task": task, "shots": shots, "metric": "acc", "value": value, "n": 100, "stderr": 0.0}


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=12))
def test_divergence_is_the_difference_of_the_counts_of_right_answers(counts: list[tuple[int, int]]) -> None:
    ours = [score("t", shots, right / 200) for shots, (right, _) in enumerate(counts)]
    theirs = [score("t", shots, right / 200) for shots, (_, right) in enumerate(counts)]
    found = paired_divergence(ours, theirs)
    differences = [(a - b) / 2 for a, b in counts]  # 200 items: one answer is half a point
    assert [s.signed_points for s in found.per_score] == pytest.approx(differences, abs=1e-9)
    assert found.mean_abs_points == pytest.approx(np.abs(differences).mean(), abs=1e-9)
    assert found.mean_signed_points == pytest.approx(np.mean(differences), abs=1e-9)
    assert found.unpaired == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_swapping_the_sides_turns_the_sign_only(ours: list[float], theirs: list[float]) -> None:
    a = [score("t", i, value) for i, value in enumerate(ours)]
    b = [score("t", i, value) for i, value in enumerate(theirs)]
    there, back = paired_divergence(a, b), paired_divergence(b, a)
    assert [s.signed_points for s in there.per_score] == [-s.signed_points for s in back.per_score]
    assert there.mean_abs_points == back.mean_abs_points
    assert there.mean_abs_points >= abs(there.mean_signed_points) - 1e-9


def test_scores_are_paired_by_task_and_shots_whatever_their_order() -> None:
    ours = [score("b", 5, 0.5), score("a", 0, 0.25), score("a", 1, 1.0)]
    theirs = [score("a", 0, 0.5), score("b", 5, 0.5), score("c", 0, 0.1)]
    found = paired_divergence(ours, theirs)
    assert found.per_score == (ScoreDivergence("b", 5, 0.0), ScoreDivergence("a", 0, -25.0))
    assert found.unpaired == (("a", 1), ("c", 0))


def test_a_spike_is_more_than_the_threshold_in_either_direction() -> None:
    found = Divergence(tuple(ScoreDivergence("t", i, points) for i, points in enumerate((1.0, 1.01, -1.0, -2.5, 0.0))))
    assert [s.shots for s in found.spikes()] == [1, 3]
    assert [s.shots for s in found.spikes(2.0)] == [3]


def test_one_answer_of_a_hundred_is_no_spike_however_it_rounds() -> None:
    found = [paired_divergence([score("t", 0, (k + 1) / 100)], [score("t", 0, k / 100)]) for k in range(100)]
    assert any(d.mean_abs_points > 1.0 for d in found), "rounding does exceed the threshold"
    assert [d.spikes() for d in found] == [()] * 100


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([score("t", 0, 0.5), score("t", 0, 0.6)], [score("t", 0, 0.5)], "two scores"),
        ([score("t", 0, 50.0)], [score("t", 0, 0.5)], "not a fraction"),
        ([score("t", 0, math.nan)], [score("t", 0, 0.5)], "not a fraction"),
        ([score("t", 0, 0.5)], [score("t", 1, 0.5)], "in common"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(ours: list, theirs: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_divergence(ours, theirs)


def test_entries_say_for_every_counterpart_what_it_was() -> None:
    cell = {"id": "cell", "status": "ok", "scores": [score("t", 0, 0.5), score("t", 5, 0.75)]}
    full = {"id": "full", "status": "ok", "scores": [score("t", 0, 0.25), score("t", 5, 1.0)]}
    entries = against_counterparts(cell, {"paper": full, "precision_only": None})
    assert entries == [
        {
            "counterpart": "paper",
            "reference_id": "full",
            "status": "ok",
            "mean_abs_points": 25.0,
            "per_score": [
                {"task": "t", "shots": 0, "signed_points": 25.0, "abs_points": 25.0},
                {"task": "t", "shots": 5, "signed_points": -25.0, "abs_points": 25.0},
            ],
        },
        {
            "counterpart": "precision_only",
            "reference_id": "cell",
            "status": "self",
            "mean_abs_points": None,
            "per_score": [],
        },
    ]
    assert against_counterparts(cell, {}) == []


@pytest.mark.parametrize(
    "counterpart",
    [
        {"id": "x", "status": "failed", "scores": []},
        {"id": "x", "status": "nonfinite", "scores": [score("t", 0, 0.5)]},
        {"id": "x", "status": "ok", "scores": [score("other", 0, 0.5)]},
    ],
)
def test_a_counterpart_without_comparable_scores_is_missing_not_zero(counterpart: dict) -> None:
    cell = {"id": "cell", "status": "ok", "scores": [score("t", 0, 0.5)]}
    (entry,) = against_counterparts(cell, {"paper": counterpart})
    assert (entry["status"], entry["mean_abs_points"], entry["reference_id"]) == ("missing", None, "x")


def items(choices: list[int], subset: object = None) -> pd.DataFrame:
    rows = [
        {"task": "t", "subset": subset, "item": f"q{i}", "shots": 0, "choice": choice, "correct": choice == 0}
        for i, choice in enumerate(choices)
    ]
    return pd.DataFrame(rows)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40), st.randoms())
def test_flips_equal_a_count_by_hand(pairs: list[tuple[int, int]], random: object) -> None:
    ours, theirs = items([a for a, _ in pairs]), items([b for _, b in pairs])
    found = item_flips(ours.sample(frac=1, random_state=random.randint(0, 99)), theirs)  # type: ignore[attr-defined]
    assert (found.n, found.unpaired) == (len(pairs), 0)
    assert found.flipped == sum(a != b for a, b in pairs)
    assert found.rate == found.flipped / len(pairs)
    assert found.gained == sum(a == 0 != b for a, b in pairs)
    assert found.lost == sum(b == 0 != a for a, b in pairs)


def test_flips_agree_with_the_scores_of_the_same_items() -> None:
    cell, full = synthetic.record(precision="bf16", peft="none"), synthetic.record(precision="fp32", peft="none")
    ours, theirs = synthetic.items(cell), synthetic.items(full)
    flips = item_flips(ours, theirs)
    signed = paired_divergence(synthetic.scores(ours), synthetic.scores(theirs)).mean_signed_points
    assert 100 * (flips.gained - flips.lost) / flips.n == pytest.approx(signed)
    assert 0 < flips.flipped < flips.n


def test_answer_shift_by_hand() -> None:
    """p = (1/2, 1/2) against q = (3/4, 1/4) of unnormalised likelihoods; KL(p ‖ q) = ½ ln(4/3)."""
    ours = items([0]).assign(logprobs=[[math.log(3) - 7, -7.0]], nll_gold=[2.5])
    theirs = items([0]).assign(logprobs=[[-3.0, -3.0]], nll_gold=[3.0])
    found = answer_shift(ours, theirs)
    assert found.kl == pytest.approx(0.5 * math.log(4 / 3))
    assert (found.n, found.nll_gold, found.left_out) == (1, -0.5, 0)
    assert answer_shift(theirs, theirs).kl == 0.0


@given(st.lists(st.tuples(*[st.lists(st.floats(-9, 0), min_size=3, max_size=3)] * 2), min_size=1, max_size=9))
def test_answer_shift_is_scipys_relative_entropy(rows: list[tuple[list[float], list[float]]]) -> None:
    ours, theirs = (
        items([0] * len(rows)).assign(logprobs=[row[side] for row in rows], nll_gold=[-row[side][0] for row in rows])
        for side in (0, 1)
    )
    expected = np.mean([stats.entropy(np.exp(b), np.exp(a)) for a, b in rows])
    found = answer_shift(ours, theirs)
    assert found.kl == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert found.nll_gold == pytest.approx(np.mean([b[0] - a[0] for a, b in rows]))


def test_likelihoods_that_are_not_finite_are_left_out_and_counted() -> None:
    ours = items([0, 0]).assign(logprobs=[[-1.0, -2.0], [math.nan, -1.0]], nll_gold=[1.0, math.nan])
    found = answer_shift(ours, items([0, 0]).assign(logprobs=[[-1.0, -2.0]] * 2, nll_gold=[1.0, 1.0]))
    assert (found.n, found.left_out, found.kl) == (1, 1, 0.0)
    with pytest.raises(ValueError, match="different numbers of choices"):
        answer_shift(ours, ours.assign(logprobs=[[-1.0]] * 2))


def test_items_of_one_side_only_are_counted_and_absent_subsets_match() -> None:
    found = item_flips(items([0, 1, 2], subset=None), items([0, 2], subset=np.nan))
    assert (found.n, found.flipped, found.unpaired) == (2, 1, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (items([0]).drop(columns="choice"), items([0]), "lacks the columns"),
        (pd.concat([items([0]), items([0])]), items([0]), "appears twice"),
        (items([0], subset="law"), items([0], subset="art"), "no item in common"),
    ],
)
def test_item_tables_that_cannot_be_compared_are_refused(
    ours: pd.DataFrame, theirs: pd.DataFrame, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        item_flips(ours, theirs)
