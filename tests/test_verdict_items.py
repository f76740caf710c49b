"""What bases are compared by, which are one cell whatever the seed: their items, by hand and by SciPy."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lyapft.divergence import compare, estimate, gain_by_item, over_items, power_equivalent, shot_scores
from lyapft.divergence.items import LEAST_ITEMS
from lyapft.report.cells import load_study
from lyapft.report.verdict_tables import caption
from lyapft.verdict import Verdict, judge
from lyapft.verdict.words import NO_ITEMS
from tests import synthetic
from tests.test_verdict import STEADY, counterparts, study, text

Right = dict[tuple[str, int], np.ndarray]  # by task and shots, an answer per item


def table(right: Right) -> pd.DataFrame:
    """Answers as a run's items table has them."""
    rows = [
        pd.DataFrame({"task": task, "subset": None, "item": range(len(own)), "shots": shots, "correct": own})
        for (task, shots), own in right.items()
    ]
    made = pd.concat(rows, ignore_index=True)
    return made.assign(choice=1 - made["correct"].astype(int), logprobs=[[-1.0, -2.0]] * len(made), nll_gold=1.0)


def answers(*counts: tuple[bool, int]) -> np.ndarray:
    return np.concatenate([np.full(n, right) for right, n in counts])


def flipped(gained: int, lost: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of a run and of its counterpart, which differ in as many."""
    same = n - gained - lost
    return answers((True, gained), (False, lost), (True, same)), answers((False, gained), (True, lost), (True, same))


# --- one cell beside its counterpart ---------------------------------------------------------------------------------


def test_one_score_is_tested_as_mcnemar_tests_it() -> None:
    gained, lost, n = 30, 55, 2000
    ours, theirs = flipped(gained, lost, n)
    found = over_items(table({("t", 0): ours}), table({("t", 0): theirs}))
    assert found is not None
    assert (found.estimate.mean, found.estimate.n, found.estimate.unit) == (pytest.approx(-1.25), n, "items")
    mcnemar = (gained - lost) ** 2 / (gained + lost)
    assert found.p_different == pytest.approx(stats.chi2.sf(mcnemar, 1), rel=0.03)
    half = stats.norm.ppf(0.975) * 100 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    assert found.estimate.high - found.estimate.mean == pytest.approx(half, rel=1e-2)
    theirs_ = stats.ttest_1samp(100.0 * (ours.astype(float) - theirs), 0.0)
    interval = theirs_.confidence_interval(0.95)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((interval.low, interval.high))


def test_answers_of_one_item_at_several_shots_are_one_value() -> None:
    ours, theirs = flipped(12, 20, 300)
    once = over_items(table({("t", 0): ours}), table({("t", 0): theirs}))
    thrice = over_items(*(table({("t", shots): side for shots in (0, 1, 5)}) for side in (ours, theirs)))
    assert once is not None
    assert thrice is not None
    for name in ("mean", "low", "high", "n"):  # the same answers again are no more evidence
        assert getattr(once.estimate, name) == pytest.approx(getattr(thrice.estimate, name))


def test_the_mean_is_that_of_the_scores_however_many_items_each_has() -> None:
    rng = np.random.default_rng(0)
    sizes = {("t", 0): 300, ("t", 5): 300, ("u", 0): 80}
    ours, theirs = ({key: rng.random(n) < p for key, n in sizes.items()} for p in (0.5, 0.6))
    found = over_items(table(ours), table(theirs))
    assert found is not None
    apart = [100.0 * (ours[key].mean() - theirs[key].mean()) for key in sizes]
    assert (found.estimate.mean, found.estimate.n) == (pytest.approx(np.mean(apart)), 380)
    variances = [np.var(100.0 * (ours[key].astype(float) - theirs[key]), ddof=1) / n for key, n in sizes.items()]
    assert found.sd / math.sqrt(380) == pytest.approx(math.sqrt(sum(variances)) / 3, rel=0.1)  # here all independent


@pytest.mark.parametrize("n", [100, 400, 1000])
def test_no_answer_that_changed_does_not_show_that_none_would(n: int) -> None:
    same = answers((True, n))
    found = over_items(table({("t", 0): same}), table({("t", 0): same}))
    assert found is not None
    half = stats.t.ppf(0.975, n - 1) * 100 * max(LEAST_ITEMS / n, math.sqrt(0.01 * 0.99 / n))
    assert (found.estimate.low, found.estimate.high) == pytest.approx((-half, half))
    assert 100 * (1 - 0.025 ** (1 / n)) <= half  # Clopper & Pearson: as many may be lost where none of n was
    assert found.outcome() == ("equivalent" if n > 330 else "undecided")


@pytest.mark.parametrize("n", [150, 350, 600, 1200])
def test_a_format_that_loses_as_much_as_the_margin_is_seldom_called_equivalent(n: int) -> None:
    called = 0.0
    for lost in range(n // 25):
        ours, theirs = flipped(0, lost, n)
        found = over_items(table({("t", 0): ours}), table({("t", 0): theirs}))
        assert found is not None
        called += stats.binom.pmf(lost, n, 0.01) * (found.outcome() == "equivalent")
    assert called <= 0.06  # at the worst: every flip a loss


def test_the_items_that_would_decide_are_those_of_the_power() -> None:
    same = answers((True, 80))
    found = over_items(table({("t", 0): same}), table({("t", 0): same}))
    assert found is not None
    needed = found.seeds_needed()
    assert needed is not None
    spreads = [max(200.0 / math.sqrt(n), 100.0 * math.sqrt(0.01 * 0.99)) for n in (needed - 1, needed)]
    power = [power_equivalent(n, 0.0, sd, 1.0) for n, sd in zip((needed - 1, needed), spreads, strict=True)]
    assert power[0] < 0.8 <= power[1]


def test_items_of_one_side_only_give_nothing() -> None:
    ours, theirs = flipped(3, 4, 50)
    assert over_items(table({("t", 0): ours[:40]}), table({("t", 0): theirs})) is None
    assert over_items(table({("t", 0): ours}), table({("u", 0): theirs})) is None


# --- the gain of one model -------------------------------------------------------------------------------------------


def asked(seed: int, zero: float, few: float, n: int = 400, shots: Sequence[int] = (1, 5)) -> Right:
    """Answers of a model without and with examples, of items that are easy or hard at every number of shots."""
    ease, rng = np.random.default_rng(0).random(n), np.random.default_rng(seed)
    wanted = {0: zero} | dict.fromkeys(shots, few)
    return {("t", count): ease + 0.3 * (rng.random(n) - 0.5) < p for count, p in wanted.items()}


def test_the_gain_item_by_item_has_the_mean_and_the_jackknifed_error_of_the_gain() -> None:
    right = asked(1, 0.4, 0.7)
    found = gain_by_item(table(right), "t")
    assert found is not None

    def gain(kept: np.ndarray) -> float:
        return shot_scores({key: float(own[kept].mean()) for key, own in right.items()})["t"].gain

    everyone = np.arange(400)
    left_out = np.array([gain(np.delete(everyone, item)) for item in everyone])
    jackknifed = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert found[0].mean() == pytest.approx(gain(everyone))
    assert found[0].std(ddof=1) / 20 == pytest.approx(jackknifed, rel=0.01)
    assert gain_by_item(table({key: own for key, own in right.items() if key[1]}), "t") is None  # nothing without


# --- in the verdict --------------------------------------------------------------------------------------------------


def base(model: str, precision: str, right: Right, **options: Any) -> tuple[dict[str, Any], pd.DataFrame]:
    """A pretrained model that is only scored: its record and its answers."""
    record = synthetic.record(model, precision, "none", 0, overrides=("trainer.steps=0",), **options)
    record["config"] = {"model": {"name": model, "init": "pretrained"}, "trainer": {"steps": 0}}
    record["environment"]["threads"] = 2
    record["scores"] = [
        {"task": task, "shots": shots, "metric": "acc", "value": float(own.mean()), "n": len(own)}
        for (task, shots), own in right.items()
    ]
    return record, table(right)


def bases(models: dict[str, dict[str, Right]]) -> tuple[list[dict[str, Any]], dict[str, pd.DataFrame]]:
    """Bases in several formats beside those in full precision."""
    records, items = [], {}
    for model, formats in models.items():
        made = {form: base(model, form, right) for form, right in formats.items()}
        for record, own in made.values():
            record["divergence"] = counterparts(record, made["fp32"][0], made["fp32"][0])
            records.append(record)
            items[record["id"]] = own
    return records, items


def inference(gained: int, lost: int, n: int, models: Sequence[str] = ("mamba_tiny",)) -> Any:
    ours, theirs = flipped(gained, lost, n)
    return bases({name: {"fp32": {("t", 0): theirs}, "bf16": {("t", 0): ours}} for name in models})


def page(found: Verdict) -> str:
    return "\n".join(line for section in found.page for line in (section.title, *section.lines))


def everything(found: Verdict) -> str:
    return page(found) + "\n".join(line for section in found.sections for line in section.lines)


def test_a_base_is_compared_over_its_items_and_no_seeds_are_asked_for() -> None:
    records, items = inference(20, 30, 4000)
    found = judge(records, items)
    (row,) = found.rows
    by_hand = over_items(items[records[1]["id"]], items[records[0]["id"]])
    assert by_hand is not None
    assert row.comparison.estimate == by_hand.estimate
    assert (row.n, row.outcome(found.settings)) == (1, "equivalent")
    low, high = (f"{x:+.2f}".replace("-", "−") for x in (by_hand.estimate.low, by_hand.estimate.high))
    said = text(found, "Recommendation")
    assert f"−0.25 points (95% {low} to {high}, n = 4000 items)" in said
    assert "the full-precision base" in said
    assert f"−0.25 [{low}, {high}; n = 4000 items]" in page(found)
    assert "same items [95% interval over items" in page(found)
    assert "seed, preliminary" not in everything(found)
    recipes = found.tables["recipes"]
    assert (recipes["items"][0], recipes["seeds"][0], recipes["seeds_to_decide"][0]) == (4000, 1, None)
    assert "against the full-precision base, over its items." in caption(found, "recipes")


def test_what_items_do_not_decide_asks_for_items() -> None:
    found = judge(*inference(3, 2, 200))
    (row,) = found.rows
    needed = row.comparison.seeds_needed()
    assert needed == found.tables["recipes"]["items_to_decide"][0]
    assert f"about {needed} items would show that it is equivalent" in page(found)
    assert "run at least three" not in everything(found)
    far = judge(*inference(24, 22, 200))
    assert "over 10,000 items would be needed" in everything(far)


def test_a_base_that_is_worse_over_its_items_is_a_failure() -> None:
    found = judge(*inference(2, 120, 2000))
    assert "mamba_tiny · bf16 · none is worse than the full-precision base by more than 1 point" in text(
        found, "Where it fails"
    )
    assert "To blame: the format (bf16" in page(found)


def test_without_its_answers_a_base_is_left_open_with_the_reason() -> None:
    records, items = inference(10, 6, 200)
    for at_hand in ({}, {records[0]["id"]: items[records[0]["id"]]}):
        found = judge(records, at_hand)
        assert found.rows[0].outcome(found.settings) == "undecided"
        assert f"no seed can decide it: {NO_ITEMS}" in page(found)
        assert "no interval" in text(found, "Recommendation")
        assert "run at least three" not in everything(found)
        assert "n = 0" not in everything(found)


def test_items_are_never_mixed_with_seeds() -> None:
    records, items = inference(10, 6, 200)
    tuned = study({("bf16", "lora"): STEADY})
    found = judge([*records, *tuned], items)
    units = {row.recipe.label: (row.comparison.estimate.unit, row.comparison.estimate.n) for row in found.rows}
    assert units.pop("bf16 · lora") == ("seeds", 8)
    assert set(units.values()) == {("items", 200)}
    assert "same seeds [95% interval; n = 8 seeds, unless named]" in page(found)
    assert estimate(STEADY).unit == compare(STEADY).estimate.unit == "seeds"


def test_nothing_is_called_trained_where_nothing_was() -> None:
    found = judge(*inference(10, 6, 200, ("mamba_tiny", "llama_tiny")))
    said = everything(found)
    for what in ("fine-tuning", "every weight trains", "another seed", "one common seed"):
        assert what not in said
    assert "mamba_tiny and llama_tiny (from the full-precision base, bf16 · none)" in said
    assert "a base is one cell whatever the seed, so neither can be called steadier" in page(found)
    assert "Noise was not measured: the same cell again and the same cell with another thread count." in page(found)
    trained = everything(judge(study({("bf16", "none"): STEADY})))
    assert "none: every weight trains." in trained
    assert "from full-precision fine-tuning" not in trained.split("Mamba")[0]


def shared_gain(ours: Right, theirs: Right, at_hand: bool = True) -> tuple[Any, Verdict]:
    records, items = bases({"mamba_tiny": {"fp32": ours}, "llama_tiny": {"fp32": theirs}})
    found = judge(records, items if at_hand else {})
    (gain,) = [one for one in found.gains if one.twin]
    return gain, found


def test_a_bases_gain_relative_to_its_twins_has_an_interval_over_items() -> None:
    ours, theirs = asked(1, 0.4, 0.6), asked(2, 0.35, 0.7)
    gain, found = shared_gain(ours, theirs)

    def ratio(drawn: np.ndarray) -> float:
        own, twins = (
            shot_scores({key: float(one[drawn].mean()) for key, one in side.items()})["t"].gain
            for side in (ours, theirs)
        )
        return own / twins

    rng = np.random.default_rng(3)
    drawn = [ratio(rng.integers(0, 400, 400)) for _ in range(2000)]
    assert gain.relative.mean == pytest.approx(ratio(np.arange(400)))
    assert (gain.relative.low, gain.relative.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.06)
    assert (gain.relative.unit, gain.relative.n) == ("items", 400)
    assert f"{gain.relative.mean:.0%} [{gain.relative.low:.0%}, {gain.relative.high:.0%}; n = 400 items]" in page(found)
    said = text(found, "Mamba against Transformer")
    assert f"(95% {gain.relative.low:.0%} to {gain.relative.high:.0%}, n = 400 items; " in said
    assert found.tables["learning"]["items"].tolist() == [400, 400]


def test_no_ratio_where_the_twin_may_not_gain_or_the_answers_are_not_at_hand() -> None:
    gain, found = shared_gain(asked(1, 0.4, 0.6), asked(2, 0.5, 0.51))
    assert math.isnan(gain.relative.mean)
    assert "no ratio, as the twin is not shown to gain" in page(found)
    gain, found = shared_gain(asked(1, 0.4, 0.6), asked(2, 0.35, 0.7), at_hand=False)
    assert math.isnan(gain.relative.mean)
    assert "no ratio, without the answers item by item" in page(found)
    assert NO_ITEMS in text(found, "Mamba against Transformer")
    few = asked(2, 0.35, 0.7, n=300)
    assert math.isnan(shared_gain(asked(1, 0.4, 0.6), few)[0].relative.mean)  # other items


def test_the_answers_of_bases_are_read_for_the_verdict(tmp_path: Path) -> None:
    records, items = inference(10, 6, 200)
    entry = {"flips": {"n": 200, "flipped": 16, "gained": 10, "lost": 6, "unpaired": 0},
             "answer_shift": {"n": 200, "kl": 0.0, "nll_gold": 0.0, "left_out": 0}}  # fmt: skip
    records[1]["divergence"] = [one | entry for one in records[1]["divergence"]]  # all that others need
    tuned = synthetic.record("mamba_tiny", "fp32", "none", 0)
    synthetic.study(tmp_path, [tuned])
    for record in records:
        home = tmp_path / record["name"]
        home.mkdir()
        (home / "record.json").write_text(synthetic.json.dumps(record), encoding="utf-8")
        items[record["id"]].to_parquet(home / "items.parquet", index=False)
    cells = load_study(tmp_path).cells
    assert {cell.record["id"] for cell in cells if cell.items is not None} == items.keys()
    read = {tuple(cell.items.columns) for cell in cells if cell.items is not None}
    assert read == {("task", "subset", "item", "shots", "correct")}  # of a large task all columns are a lot
