"""Which recipe is recommended: ties of cost, what one seed's cost shows, and seeds that are missing."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from lyapft.report.verdict_tables import caption
from lyapft.verdict import Settings, Verdict, judge
from tests.test_verdict import STEADY, WILD, WORSE, study, text

CHEAP = [0.50, 0.52, 0.49, 0.51, 0.50, 0.53, 0.48, 0.50]  # cost by seed, as a ratio to the counterpart


def costing(costs: dict[tuple[str, str], Sequence[float | None]], **cells: Sequence[float]) -> list[dict[str, Any]]:
    """Recipes that are all equivalent, with the given cost at each seed in memory alone; None was not measured."""
    records = study({key: cells.get("_".join(key), STEADY) for key in costs})
    for record in records:
        own = costs.get((record["choices"]["precision"], record["choices"]["peft"]))
        ratio = own[record["seed"]] if own else 1.0
        record["cost"] = {"peak_bytes_per_token": None if ratio is None else 100.0 * ratio}
    return records


def memory_only(records: list[dict[str, Any]]) -> Verdict:
    return judge(records, settings=Settings(speed_weight=0))


def test_recipes_whose_costs_the_seeds_do_not_tell_apart_are_named_as_ties() -> None:
    near = [c * f for c, f in zip(CHEAP, [1.05, 0.97, 1.04, 0.98, 1.06, 0.95, 1.02, 0.99], strict=True)]
    far = [1.2 * c for c in near]
    costs = {("bf16", "lora"): CHEAP, ("fp16", "lora"): near, ("fp16", "none"): far}
    p = [stats.ttest_rel(np.log(other), np.log(CHEAP)).pvalue for other in (near, far)]
    assert p[0] > 0.05 / 3 > p[1]  # shared among the pairs of three
    found = memory_only(costing(costs))
    (advice,) = found.recommendations
    assert advice.chosen is not None
    assert advice.chosen.recipe.label == "bf16 · lora"
    assert [row.recipe.label for row in advice.tied] == ["fp16 · lora"]
    said = text(found, "Recommendation")
    assert "use bf16 · lora, one of the cheapest recipes that are equivalent" in said
    assert f"cannot be told from that of fp16 · lora (at {math.exp(np.mean(np.log(near))):.3g} × the cost" in said
    assert "fp16 · none" not in said
    alone = memory_only(costing({key: costs[key] for key in (("bf16", "lora"), ("fp16", "none"))}))
    assert "use bf16 · lora, the cheapest recipe that is equivalent" in text(alone, "Recommendation")


def test_a_cost_that_varies_much_or_was_measured_on_one_seed_is_a_tie() -> None:
    wild = [c * f for c, f in zip(CHEAP, [3.0, 0.4, 2.5, 0.5, 3.0, 0.4, 2.0, 0.6], strict=True)]
    once = [0.9, *[None] * 7]
    found = memory_only(costing({("bf16", "lora"): CHEAP, ("fp16", "lora"): wild, ("fp16", "none"): once}))
    assert {row.recipe.label for row in found.recommendations[0].tied} == {"fp16 · lora", "fp16 · none"}
    assert "fp16 · none (at 0.9 × the cost (one seed) (emulated), score" in text(found, "Recommendation")


def test_the_cost_of_one_seed_shows_no_saving() -> None:
    found = memory_only(costing({("bf16", "lora"): [0.1, *[None] * 7]}))
    (advice,) = found.recommendations
    assert advice.chosen is None
    assert [row.recipe.label for row in advice.cost_open] == ["bf16 · lora"]
    said = text(found, "Recommendation")
    assert "stay with" not in said
    assert (
        "whether it costs less is undecided: mamba_tiny · bf16 · lora, at 0.1 × the cost (one seed) (emulated);" in said
    )
    assert "one seed has no spread, so run at least three" in said
    never = memory_only(costing({("bf16", "lora"): [None] * 8}))
    assert never.recommendations[0].advice == "cost_open"
    assert "its cost not measured; " in text(never, "Recommendation")
    assert "whether it costs less is open (its cost was not measured)" in never.page[0].lines[0]
    two = memory_only(costing({("bf16", "lora"): [0.1, 0.11, *[None] * 6]}))
    assert two.recommendations[0].chosen is not None


SLIGHT = [0.93, 1.06, 0.88, 1.02, 0.90, 0.97, 1.03, 0.91]  # costs less on average; the seeds do not tell


def test_a_cost_that_the_seeds_do_not_decide_is_undecided_with_its_interval_and_the_seeds_that_would() -> None:
    logs = np.log(SLIGHT)
    mean, sd = logs.mean(), logs.std(ddof=1)
    p = stats.ttest_1samp(logs, 0.0).pvalue
    assert 0.05 < p < 0.2
    low, high = np.exp(stats.t.interval(0.95, 7, mean, sd / math.sqrt(8)))
    needed = math.ceil(TTestPower().solve_power(abs(mean) / sd, alpha=0.05, power=0.8))
    found = memory_only(costing({("bf16", "lora"): SLIGHT}))
    (advice,) = found.recommendations
    assert (advice.advice, advice.cost_open[0].cost.seeds_needed(0.05, 0.8)) == ("cost_open", needed)
    cost = f"{math.exp(mean):.3g} × the cost [{low:.3g}, {high:.3g}] (emulated), p = {p:.3f}"
    said = text(found, "Recommendation")
    assert (
        "undecided. No recipe that is equivalent to full-precision fine-tuning of all weights within ±1 point is"
        in said
    )
    assert f"whether it costs less is undecided: mamba_tiny · bf16 · lora, at {cost}; " in said
    assert f"about {needed} seeds would show that it costs less, with 80% chance, if mean and spread stay." in said
    (line, *_) = found.page[0].lines
    assert line.startswith("mamba_tiny: undecided. bf16 · lora is equivalent (")
    assert line.endswith(
        f"whether it costs less is open ({cost.replace(' the cost', '')}; about {needed} seeds would show it)."
    )
    table = found.tables["recipes"]
    assert table[["p_cost", "cost_seeds_to_decide"]].iloc[0].tolist() == pytest.approx([p, needed])
    dearer = memory_only(costing({("bf16", "lora"): [1 / c for c in SLIGHT]}))
    assert f"about {needed} seeds would show that it costs more, with" in text(dearer, "Recommendation")
    assert f"about {needed} seeds would show that it costs more)" in dearer.page[0].lines[0]


def test_p_and_seeds_of_a_cost_are_those_of_the_whole_table() -> None:
    costs = {("bf16", "lora"): SLIGHT, ("fp16", "lora"): CHEAP, ("fp16", "none"): [1 / c for c in SLIGHT]}
    found = memory_only(costing(costs))
    raw = [stats.ttest_1samp(np.log(own), 0.0).pvalue for own in costs.values()]
    assert found.tables["recipes"].p_cost.tolist() == pytest.approx([2 * raw[0], 3 * raw[1], 2 * raw[2]])
    logs = np.log(SLIGHT)
    needed = TTestPower().solve_power(abs(logs.mean()) / logs.std(ddof=1), alpha=0.05 / 3, power=0.8)
    seeds = found.tables["recipes"].cost_seeds_to_decide
    assert seeds.iloc[[0, 2]].tolist() == [math.ceil(needed)] * 2
    assert math.isnan(seeds.iloc[1])  # is decided
    repeated = judge(two_names()).tables["recipes"]
    assert repeated.p_cost.isna().tolist() == [False, True, False, True]


def test_to_stay_with_the_reference_is_said_only_where_nothing_is_left() -> None:
    dear, higher = [2.6 * c for c in CHEAP], [x + 4.0 for x in STEADY]
    only = memory_only(costing({("bf16", "lora"): dear})).recommendations[0]
    assert (only.advice, [row.recipe.label for row in only.dear]) == ("dear", ["bf16 · lora"])
    costs = {("bf16", "lora"): dear, ("fp16", "lora"): CHEAP}
    for other, advice in ((higher, "better"), (WORSE, "dear"), (WILD, "open")):
        found = memory_only(costing(costs, fp16_lora=other))
        assert found.recommendations[0].advice == advice
        said = text(found, "Recommendation")
        assert ("stay with" in said) == (advice == "dear")
        assert "Equivalent, but shown to cost more: mamba_tiny · bf16 · lora, at 1.31 × the cost [" in said
        assert ("that may cost less is" in said) == (advice in ("better", "open"))
        (line, *_) = found.page[0].lines
        assert ("stay with the reference. bf16 · lora is equivalent (" in line) == (advice == "dear")
    assert "undecided. Left: fp16 · lora (" in line
    assert line.endswith("; bf16 · lora is equivalent, but is shown to cost more (p < 0.001).")


def test_what_costs_the_same_to_the_byte_is_not_open() -> None:
    found = memory_only(costing({("bf16", "lora"): [1.0] * 8}))
    assert found.recommendations[0].advice == "dear"
    assert (
        "Equivalent, but its cost is the same on every seed: mamba_tiny · bf16 · lora, at 1 × the cost [1, 1]"
        in text(found, "Recommendation")
    )
    assert "but costs as much on every seed: " in found.page[0].lines[0]


def test_what_scores_higher_at_a_cost_that_is_open_is_named_with_it() -> None:
    found = memory_only(costing({("bf16", "lora"): SLIGHT}, bf16_lora=[x + 4.0 for x in STEADY]))
    assert found.recommendations[0].advice == "better"
    low, high = found.rows[0].cost.index.low, found.rows[0].cost.index.high
    assert low < 1 < high
    assert f"× the cost [{low:.3g}, {high:.3g}] (emulated), +4.01 points" in text(found, "Recommendation")


def test_what_a_cost_is_stands_on_the_page_in_the_details_and_above_the_tables() -> None:
    records = study({("fp32", "lora"): STEADY, ("bf16", "lora"): STEADY})
    for settings, said in (
        (Settings(), "Cost: geometric mean of time and memory per token, weighted 1:1."),
        (
            Settings(speed_weight=0.5, memory_weight=2),
            "Cost: geometric mean of time and memory per token, weighted 0.5:2.",
        ),
        (Settings(memory_weight=0), "Cost: time per token alone."),
    ):
        found = judge(records, settings=settings)
        assert said in found.page[-1].lines[0]
        assert f"{said} It is a ratio to the counterpart's" in text(found, "Recommendation")
        assert all(said in caption(found, name) for name in ("recipes", "formats"))
        assert said not in caption(found, "scores")


def lost(records: list[dict[str, Any]], at: int, status: str) -> list[dict[str, Any]]:
    records[at] |= {"status": status, "error": {"type": "E", "message": status}, "scores": [], "divergence": []}
    return records


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("oom", "1 of 8 seeds did not finish (oom)"),
        ("failed", "1 of 8 seeds did not finish (failed)"),
        ("nonfinite", "training broke down on 1 of 8 seeds (nonfinite)"),
    ],
)
def test_a_recipe_that_lost_a_seed_is_undecided_with_the_reason(status: str, reason: str) -> None:
    found = judge(lost(study({("bf16", "lora"): STEADY}), -1, status))
    (advice,) = found.recommendations
    assert found.rows[0].outcome(found.settings) == "equivalent"
    assert (advice.chosen, [row.recipe.label for row in advice.unsound]) == (None, ["bf16 · lora"])
    said = text(found, "Recommendation")
    assert "undecided. No recipe with all of its seeds is shown to be equivalent" in said
    assert "Undecided: mamba_tiny · bf16 · lora is equivalent on the 7 seeds that could be compared, " in said
    assert f"but {reason}: the seeds that are left may flatter it." in said
    assert found.tables["recipes"].doubts.tolist() == [reason]


def test_a_recipe_whose_counterpart_broke_on_a_seed_is_undecided_with_the_reason() -> None:
    records = study({("bf16", "lora"): STEADY})
    lost(records, 7, "nonfinite")  # the counterpart of seed 7
    records[-1]["divergence"][0] |= {"status": "missing", "per_score": []}
    found = judge(records)
    assert found.recommendations[0].chosen is None
    assert "but the counterpart of 1 of 8 seeds is missing" in text(found, "Recommendation")


@pytest.mark.parametrize("status", ["running", "interrupted"])
def test_a_seed_that_is_still_to_come_is_named_but_forbids_nothing(status: str) -> None:
    found = judge(lost(study({("bf16", "lora"): STEADY}), -1, status))
    assert found.recommendations[0].chosen is not None
    assert "1 of 8 of its runs did not finish." in text(found, "Recommendation")


def test_another_equivalent_recipe_is_taken_where_the_cheapest_lost_a_seed() -> None:
    costs = {("bf16", "lora"): CHEAP, ("fp16", "lora"): [1.5 * c for c in CHEAP]}
    records = costing(costs)
    place = next(i for i, r in enumerate(records) if r["choices"]["precision"] == "bf16" and r["seed"] == 3)
    found = memory_only(lost(records, place, "oom"))
    chosen = found.recommendations[0].chosen
    assert chosen is not None
    assert chosen.recipe.label == "fp16 · lora"
    assert "bf16 · lora is equivalent on the 7 seeds that could be compared" in text(found, "Recommendation")


# --- one recipe under two names --------------------------------------------------------------------------------------


def two_names(second: dict[str, int] | None = None, apart: float = 0.0) -> list[dict[str, Any]]:
    """LoRA and LoRA on all layers, which adapt the same ones unless `second` says otherwise, in two formats."""
    moved = [x + apart for x in STEADY]
    cells = {(form, peft): STEADY if peft == "lora" else moved for form in ("bf16", "fp16") for peft in LORAS}
    records = study(cells)
    for record in records:
        peft = record["choices"]["peft"]
        if peft == "none":
            continue
        adapted = {"in_proj": 2, "out_proj": 2, "dt_proj": 0} | ((second or {}) if peft == "lora_all" else {})
        record["peft"]["coverage"] = {name: {"adapted": n, "present": 2} for name, n in adapted.items()}
        record["config"] = record["config"] | {"peft": {"name": peft, "targets": LORAS[peft], "r": 8}}
    return records


LORAS = {"lora": "auto", "lora_all": "all"}


def test_a_recipe_under_two_names_counts_once_in_holm_and_is_named() -> None:
    once, twice = judge(two_names()), judge(two_names({"dt_proj": 2}))
    by_label = {row.recipe.label: row for row in once.rows}
    assert {row.comparison.family for row in once.rows} == {2}
    assert {row.comparison.family for row in twice.rows} == {4}
    assert by_label["bf16 · lora"].comparison == by_label["bf16 · lora_all"].comparison
    alone = stats.ttest_1samp(np.array(STEADY) + 1.0, 0.0, alternative="greater").pvalue
    for found, family in ((once, 2), (twice, 4)):
        assert found.rows[0].comparison.p_equivalent == pytest.approx(
            family * max(alone, stats.ttest_1samp(np.array(STEADY) - 1.0, 0.0, alternative="less").pvalue)
        )
    assert {one.comparison.family for one in once.scores} == {4}  # two formats, 0 and 5 shots
    assert text(once, "One recipe under two names") == (
        "mamba_tiny on skills: lora and lora_all adapt the same layers (in_proj, out_proj) and are one recipe in bf16 "
        "and fp16: where they came out alike they count once in every correction."
    )
    assert text(twice, "One recipe under two names") == ""
    assert once.tables["recipes"].same_as.tolist() == ["", "bf16 · lora", "", "fp16 · lora"]
    (advice,) = once.recommendations
    assert not any(row.recipe.peft == "lora_all" for row in advice.tied)


def test_two_names_that_came_out_differently_are_two_tests() -> None:
    assert {row.comparison.family for row in judge(two_names(apart=0.1)).rows} == {4}
    records = two_names()
    for record in records:
        if record["choices"]["peft"] == "lora_all":
            record["config"]["peft"]["r"] = 16
    assert {row.comparison.family for row in judge(records).rows} == {4}


def test_a_failing_recipe_is_told_though_the_first_of_its_names_finished_no_run() -> None:
    records = two_names(apart=-5.0)
    assert {one.row.recipe.peft for one in judge(records).failures.whole} == {"lora_all"}  # they came out differently
    for record in records:
        if record["choices"]["peft"] == "lora":
            record |= {"status": "nonfinite", "scores": [], "divergence": [], "error": {"type": "E", "message": "nan"}}
    found = judge(records)
    assert {(one.row.recipe.peft, one.row.recipe.precision) for one in found.failures.whole} == {
        ("lora_all", "bf16"),
        ("lora_all", "fp16"),
    }
    assert sum(one.scores for one in found.spikes) == 2 * 2 * len(STEADY)


# --- the cost of the same cell again ---------------------------------------------------------------------------------


def test_how_far_the_cost_of_the_same_cell_again_lies_off_stands_beside_the_costs() -> None:
    records = study({("bf16", "lora"): STEADY})
    first = [record for record in records if record["choices"]["precision"] == "bf16"][:2]
    for record, speed in zip(first, (1.2, 0.9), strict=True):
        own = {"tokens_per_s": record["cost"]["tokens_per_s"] * speed, "peak_bytes_per_token": 50.0}
        again = {"id": f"{record['id']}r", "role": "rerun", "replicate": 1, "cost": own}
        records.append(record | again)
        other = own | {"tokens_per_s": 1e6}  # another thread count is another cost, not noise
        records.append(record | again | {"id": f"{record['id']}t", "replicate": 0, "cost": other})
        records[-1]["environment"] = record["environment"] | {"threads": 1}
    table = judge(records).tables["recipes"]
    (speed, memory) = table.iloc[0][["floor_speed_ratio", "floor_memory_ratio"]]
    assert speed == pytest.approx(math.exp(np.sqrt((math.log(1.2) ** 2 + math.log(0.9) ** 2) / 2)))
    assert memory == pytest.approx(1.0)
    assert judge(study({("bf16", "lora"): STEADY})).tables["recipes"]["floor_speed_ratio"].isna().all()
