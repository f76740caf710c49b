"""Where the reference itself guesses: told on the page, in the details and beside every score."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from lyapft.tasks.evaluation import _score
from lyapft.verdict import Settings, judge
from lyapft.verdict.chance import _above, at_chance
from lyapft.verdict.evidence import gather
from tests.test_verdict import study

N = 200


def scored(values: dict[int, float], chance: float | None = 0.25, seeds: int = 3) -> list[dict[str, Any]]:
    """The reference of one model and bf16 beside it, with a score for each number of shots."""
    made = study({("bf16", "none"): [0.0] * seeds}, base=[0.5] * seeds)
    for record in made:
        record["scores"] = [
            {"task": "t", "shots": shots, "metric": "acc", "value": value, "n": N}
            | ({} if chance is None else {"chance": chance})
            for shots, value in values.items()
        ]
    return made


def test_a_score_that_guessing_gives_is_told_everywhere() -> None:
    found = judge(scored({0: 0.24, 5: 0.9}))
    (one,) = found.at_chance
    assert (dict(one.guessed), one.of) == ({("t", 0): (0.24, 0.25)}, 2)
    (section,) = (section for section in found.sections if section.title == "At chance")
    assert "1 of 2 scores" in section.lines[0]
    assert "t 0-shot 0.240 against 0.250" in section.lines[0]
    (told,) = (line for part in found.page for line in part.lines if "above chance" in line)
    assert "mamba_tiny (1 of 2 scores)" in told
    assert found.tables["scores"]["chance"].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("values", "chance"), [({0: 0.9, 5: 0.9}, 0.25), ({0: 0.2, 5: 0.2}, None), ({0: 0.2, 5: 1.0}, 1.0)]
)
def test_nothing_is_said_above_chance_nor_where_no_record_knows_it(
    values: dict[int, float], chance: float | None
) -> None:
    found = judge(scored(values, chance))
    assert found.at_chance == ()
    assert not [section for section in found.sections if section.title == "At chance"]
    assert "above chance" not in str(found.page)


def test_seeds_are_means_and_not_more_items() -> None:
    """0.29 of 200 items is within guessing, however many seeds answered the same items."""
    for seeds in (1, 3, 30):
        assert len(at_chance(gather(scored({0: 0.29}, seeds=seeds)), Settings())) == 1


@given(st.integers(30, 2000), st.sampled_from([0.5, 0.25, 0.2]), st.floats(0, 1))
def test_the_test_is_that_of_the_binomial(items: int, chance: float, share: float) -> None:
    """Against the exact tail, but for counts whose tail lies near the level, where the approximation may differ."""
    right = round(share * items)
    tail = binom.sf(right - 1, items, chance)
    if not 0.02 < tail < 0.1:
        assert _above(right / items, chance, items, 0.05) == (tail <= 0.05)


def test_few_and_many_choices_are_averaged() -> None:
    """ARC has questions of three and five choices among those of four."""
    items = [
        {"task": "arc", "shots": 0, "choice": 0, "gold": 0, "tokens": 9, "logprobs": list(-np.arange(1.0, n + 1))}
        for n in (3, 4, 5, 4)
    ]
    assert _score(items, "acc", "choice", None, None).chance == pytest.approx((1 / 3 + 1 / 4 + 1 / 5 + 1 / 4) / 4)
