"""What counts once, and which tests share an error rate: by hand, and by SciPy."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lyapft.divergence import holm
from lyapft.verdict import Settings, Verdict, judge
from lyapft.verdict.evidence import gather
from lyapft.verdict.parts import Part, jointly
from lyapft.verdict.recipes import rows
from lyapft.verdict.recommendation import doubts, recommend
from tests.test_verdict import BASE, STEADY, WILD, WORSE, counterparts, study, text

LITTLE = [0.3, -0.2, 0.1, -0.1, 0.2, -0.3, 0.1, -0.2]


def adapting(records: list[dict[str, Any]], layers: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """The records with the layers that each peft adapts."""
    for record in records:
        peft = record["choices"]["peft"]
        if peft in layers:
            record["peft"]["coverage"] = {name: {"adapted": n, "present": 2} for name, n in layers[peft].items()}
            record["config"] = record["config"] | {"peft": {"name": peft, "targets": peft, "r": 8}}
    return records


def one_page(found: Verdict) -> str:
    return "\n".join(line for section in found.page for line in section.lines)


# --- once ------------------------------------------------------------------------------------------------------------


def test_a_recipe_under_two_names_weighs_once_in_the_comparison_of_models() -> None:
    cells = {("bf16", "none"): STEADY, ("bf16", "lora"): WILD, ("bf16", "lora_all"): WILD}
    twin = cells | {("bf16", "lora"): WORSE, ("bf16", "lora_all"): LITTLE}
    same = {"lora": {"in_proj": 2}, "lora_all": {"in_proj": 2}}
    ours = adapting(study(cells), same)
    theirs = adapting(study(twin, model="llama_tiny"), same | {"lora_all": {"in_proj": 2, "out_proj": 2}})
    found = judge(ours + theirs)
    (pooled,) = [one for one in found.contrasts if one.overall and one.counterpart == "paper"]
    sizes = {name: np.abs(points) for name, points in (("a", STEADY), ("b", WILD), ("c", WORSE))}
    apart = (sizes["a"] + sizes["b"]) / 2 - (sizes["a"] + sizes["c"]) / 2
    assert pooled.pooled == 2
    assert pooled.comparison.estimate.mean == pytest.approx(apart.mean())
    assert pooled.size.mean == pytest.approx((sizes["a"] + sizes["b"]).mean() / 2)
    said = text(found, "Mamba against Transformer")
    why = "because mamba_tiny's lora_all is its lora; llama_tiny's differs"
    assert f"mean over 2 recipes that both have, without bf16 · lora_all, {why})" in said
    assert len([one for one in found.contrasts if one.counterpart == "paper"]) == 4  # its own row stays


# --- costs -----------------------------------------------------------------------------------------------------------


def priced(logs: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Equivalent recipes with the given ln of their memory beside the counterpart's, seed by seed."""
    records = study({("bf16", peft): STEADY for peft in logs})
    for record in records:
        own = logs[record["choices"]["peft"]][record["seed"]] if record["choices"]["precision"] == "bf16" else 0.0
        record["cost"] = {"peak_bytes_per_token": 100.0 * math.exp(own)}
    return records


def test_savings_share_an_error_rate_over_the_recipes_of_a_setting() -> None:
    memory = Settings(speed_weight=0)
    slight = [-0.05 + 0.05 * x for x in (1.2, -1.0, 0.6, -0.8, 1.1, -0.9, 0.5, -0.7)]
    none = [0.02, -0.01, 0.03, 0.01, -0.02, 0.02, -0.01, 0.0]
    raw = stats.ttest_1samp(slight, 0.0).pvalue
    assert 0.05 / 3 < raw < 0.05
    (alone,) = judge(priced({"lora": slight}), settings=memory).recommendations
    assert alone.chosen is not None
    assert alone.chosen.cost.p == pytest.approx(raw)
    found = judge(priced({"lora": slight, "none": none, "ia3": none[::-1]}), settings=memory)
    (among,) = found.recommendations
    assert among.chosen is None
    assert next(row for row in among.cost_open if row.recipe.peft == "lora").cost.p == pytest.approx(3 * raw)
    clear = [x - 0.2 for x in slight]
    said = text(judge(priced({"lora": clear, "none": none, "ia3": none[::-1]}), settings=memory), "Recommendation")
    assert "It is cheaper at p < 0.001, adjusted for 3 recipes." in said


def test_of_recipes_that_cost_alike_few_studies_recommend_any() -> None:
    rng, memory, chosen, studies = np.random.default_rng(5), Settings(speed_weight=0), 0, 150
    names = ("none", "lora", "ia3", "dora", "vera", "lokr")
    for _ in range(studies):
        costs = {name: list(rng.normal(0.0, 0.05, 8)) for name in names}
        (one,) = recommend(rows(gather(priced(costs)), memory), memory)
        chosen += one.chosen is not None
    assert chosen <= stats.binom.ppf(0.999, studies, 0.025)  # of the risk of 5%, half is that of costing more


# --- blame -----------------------------------------------------------------------------------------------------------

SMALL, ALL = {"in_proj": 2, "dt_proj": 0}, {"in_proj": 2, "dt_proj": 2}
UNSURE = [1.0, -0.1, 0.9, -0.1, 0.8, 0.4, 0.9, -0.1]  # points by which the wider target set gains, or half precision


def test_layers_are_blamed_with_one_error_rate_for_all_target_sets_whether_they_fail_or_not() -> None:
    p = stats.ttest_1samp(UNSURE, 0.0).pvalue
    assert 0.05 / 2 < p < 0.05
    targets = {"lora": SMALL, "lora_all": ALL}
    wider = [w + x for w, x in zip(WORSE, UNSURE, strict=True)]
    ours = adapting(study({("fp32", "lora"): WORSE, ("fp32", "lora_all"): wider}), targets)
    alone = text(judge(ours), "Where it fails")  # the two ask about each other: one test
    assert "Leaving dt_proj alone is to blame for part of it" in alone
    near = [x + y for x, y in zip(STEADY, LITTLE, strict=True)]
    fine = adapting(study({("fp32", "lora"): STEADY, ("fp32", "lora_all"): near}, model="llama_tiny"), targets)
    said = text(judge([*ours, *fine]), "Where it fails")
    assert "llama_tiny" not in said.split("Spikes")[0]
    assert "Whether leaving dt_proj alone is to blame, the seeds do not tell" in said
    assert "dt_proj alone is to blame for" not in said


def test_a_format_is_blamed_with_one_error_rate_for_all_recipes_whether_they_fail_or_not() -> None:
    def moved(points: list[float], by: list[float]) -> list[float]:
        return [a + b for a, b in zip(points, by, strict=True)]

    ours = study({("fp32", "lora"): WORSE, ("bf16", "lora"): moved(WORSE, UNSURE)})
    fine = study({("fp32", "lora"): STEADY, ("bf16", "lora"): moved(STEADY, LITTLE)}, model="llama_tiny")
    low, high = stats.ttest_1samp(UNSURE, 0.0).confidence_interval(0.95)
    share = f"+{np.mean(UNSURE):.2f} (95% +{low:.2f} to +{high:.2f}, n = 8 seeds"
    assert f"{share}) the format's (bf16)" in text(judge(ours), "Where it fails")
    assert f"{share}, which may be nothing) the format's (bf16)" in text(judge([*ours, *fine]), "Where it fails")


def test_scores_that_were_chosen_by_their_numbers_are_tested_one_by_one() -> None:
    keys = [("t", 0), ("t", 5)]
    points = {"a": (UNSURE, WORSE), "b": (LITTLE, WILD)}
    parts = [
        Part(
            ("format", name),
            {seed: dict(zip(keys, own, strict=True)) for seed, own in enumerate(zip(*both, strict=True))},
            1000,
        )
        for name, both in points.items()
    ]
    families = jointly([*parts, parts[0]])  # what is one test counts once
    raw = [stats.ttest_1samp(own, 0.0).pvalue for both in points.values() for own in both]
    single = holm(raw)
    means = [stats.ttest_1samp(np.mean(both, axis=0), 0.0).pvalue for both in points.values()]
    assert families.comparison(parts[0], keys, 1.0).p_different == pytest.approx(holm(means)[0])
    for key, p in zip(keys, single[:2], strict=True):
        found = families.comparison(parts[0], [key], 1.0)
        assert found.p_different == pytest.approx(p)
        assert found.estimate.mean == pytest.approx(np.mean(points["a"][keys.index(key)]))
    three = [Part(("peft", "c"), {s: own | {("t", 9): WILD[s]} for s, own in parts[0].points.items()}, 1000)]
    found = jointly(three).comparison(three[0], keys, 1.0)  # −1.3 points, of which the first score is no part
    least = holm([*raw[:2], stats.ttest_1samp(WILD, 0.0).pvalue])[1]
    assert found.p_different == pytest.approx(max(least, means[0]))  # no less than that of their mean


# --- reruns ----------------------------------------------------------------------------------------------------------


def again(records: list[dict[str, Any]], seed: int, status: str, **fields: Any) -> dict[str, Any]:
    """Another run of a seed of bf16 LoRA that did not finish."""
    first = next(r for r in records if (r["choices"]["precision"], r["seed"]) == ("bf16", seed))
    lost = {"id": f"{first['id']}{status}", "status": status, "scores": [], "divergence": []}
    return first | lost | {"error": {"type": "E", "message": status}} | fields


def test_reruns_that_failed_are_no_seeds() -> None:
    records = study({("bf16", "lora"): STEADY})
    other_threads = records[-1]["environment"] | {"threads": 1}
    found = judge(
        [
            *records,
            again(records, 0, "nonfinite", replicate=1),
            again(records, 1, "interrupted", replicate=1),
            again(records, 2, "running", environment=other_threads),
        ]
    )
    (row,) = found.rows
    broken = "training broke down in 1 of 3 reruns (nonfinite)"
    assert (row.n, doubts(row)) == (8, [broken])
    assert f"mamba_tiny · bf16 · lora: {broken}." in text(found, "Where it fails")
    assert "of 9" not in "\n".join(line for section in found.sections for line in section.lines)
    assert text(found, "What is missing").startswith("mamba_tiny · bf16 · lora: ")
    for what in ("rerun nonfinite for seed 0", "rerun interrupted for seed 1", "rerun not finished for seed 2"):
        assert what in text(found, "What is missing")


def test_a_seed_that_broke_down_is_counted_as_one_however_often_it_was_run_again() -> None:
    records = study({("bf16", "lora"): STEADY})
    first = again(records, 7, "nonfinite")
    found = judge([*records[:-1], first, first | {"id": "again", "replicate": 1}])
    (row,) = found.rows
    reasons = [
        "training broke down on 1 of 8 seeds (nonfinite)",
        "training broke down in 1 of 1 reruns (nonfinite)",
    ]
    assert doubts(row) == reasons
    assert f"mamba_tiny · bf16 · lora: {' and '.join(reasons)}." in text(found, "Where it fails")
    assert found.tables["recipes"].broke_down.tolist() == [1]


# --- what the numbers are --------------------------------------------------------------------------------------------


def test_a_corrected_p_beside_an_uncorrected_interval_is_said_once_in_each_section() -> None:
    cells = {("fp32", "lora"): WORSE, ("bf16", "lora"): STEADY, ("fp16", "lora"): WILD}
    found = judge(study(cells) + study(cells, model="llama_tiny"))
    note = "Every p is after Holm's correction; the interval beside it is of that one comparison alone, uncorrected."
    for section in ("Where it fails", "Mamba against Transformer"):
        assert text(found, section).count(note) == 1
    assert note not in text(judge(study({("bf16", "lora"): WILD})), "Where it fails")  # nothing there has a p


# --- one sentence ----------------------------------------------------------------------------------------------------


Points = tuple[list[float], list[float]]  # at 0 and at 5 shots, by seed


def off_by(cells: dict[tuple[str, str], Points]) -> list[dict[str, Any]]:
    """Recipes that lie the given points off the counterpart."""
    records = study(dict.fromkeys(cells, STEADY))
    full = {(r["choices"]["peft"], r["seed"]): r for r in records if r["choices"]["precision"] == "fp32"}
    for record in records:
        points = cells.get((record["choices"]["precision"], record["choices"]["peft"]))
        for place, score in enumerate(record["scores"] if points else ()):
            paper = full["none", record["seed"]]["scores"][place]["value"]
            score["value"] = paper + points[place][record["seed"]] / 100
    for record in records:
        peft, seed = record["choices"]["peft"], record["seed"]
        record["divergence"] = counterparts(record, full["none", seed], full.get((peft, seed)))
    return records


def single_scores(found: Verdict) -> list[str]:
    """The sentences on single scores against the paper's counterpart."""
    lines = text(found, "Where it fails").splitlines()
    return [line for line in lines if "single scores outside" in line and "from full precision" not in line]


def test_single_scores_of_one_recipe_in_several_formats_are_one_sentence() -> None:
    moved = {"fp32": 8.0, "bf16": 9.0, "fp16": 8.5}
    cells = {(form, "lora"): ([x + m for x in STEADY], [x - m for x in STEADY]) for form, m in moved.items()}
    found = judge(off_by(cells))
    assert {row.outcome(found.settings) for row in found.rows} == {"equivalent"}  # what 5 shots lose, 0 shots win
    (line,) = single_scores(found)
    assert line.startswith("mamba_tiny · lora in fp32, bf16 and fp16: single scores outside ±1 point: t 0-shot in bf16")
    mean, base = np.mean(STEADY) - 9, np.mean(BASE)
    assert f"t 5-shot in bf16 −{abs(mean):.2f} points (95% " in line
    assert f"{base + mean / 100:.3f} against {base:.3f} and 4 more. In fp32: all of it is the peft's: lora." in line
    assert "In bf16, 0.00 (95% −0.04 to +0.04, n = 8 seeds, which may be nothing) of it is the format's." in line
    assert "In fp16, 0.00 (95%" in line


def test_the_remedy_of_single_scores_is_measured_on_these_scores() -> None:
    wild = [3 * x for x in WILD]
    cells = {("fp32", "lora"): (wild, WORSE), ("bf16", "lora"): (wild, WORSE), ("fp32", "lora_all"): (wild, LITTLE)}
    (line,) = single_scores(judge(off_by(cells)))
    theirs, base = stats.ttest_1samp(LITTLE, 0.0).confidence_interval(0.95), np.mean(BASE)
    assert (
        f"Remedy tried in fp32: peft=lora_all instead, −{abs(np.mean(LITTLE)):.2f} points (95% −{abs(theirs.low):.2f} "
        f"to +{theirs.high:.2f}, n = 8 seeds), score {base + np.mean(LITTLE) / 100:.3f} against {base:.3f}, which "
        "brings it inside the margin. No remedy was tried in bf16: add another peft=… to the study." in line
    )
    (line,) = single_scores(judge(off_by({("fp32", "lora"): (wild, WORSE)})))
    assert "No remedy was tried: add another peft=… to the study." in line
    (line,) = single_scores(judge(off_by({("fp32", "lora"): (wild, [-x for x in WORSE])})))
    assert "emedy" not in line  # what is won needs none


def test_in_context_learning_of_a_model_is_one_sentence() -> None:
    records = study({("bf16", "lora"): STEADY}) + study({("bf16", "lora"): STEADY}, model="llama_tiny")
    for record in records:
        record["scores"] += [score | {"task": "u"} for score in record["scores"]]
    (line,) = [
        line
        for line in text(judge(records), "Mamba against Transformer").splitlines()
        if line.startswith("In-context learning of mamba_tiny")
    ]
    assert line.count("100% of llama_tiny's") == 2
    assert "as gain of the 0-shot score: t +1.00 (" in line
    assert "; u +1.00 (" in line


def pooled_twice(ours: list[float], twins: dict[str, list[float]]) -> Verdict:
    """A Mamba whose lora_all is its lora, beside a Transformer of which they are two recipes."""
    same = {"lora": {"in_proj": 2}, "lora_all": {"in_proj": 2}}
    own = adapting(study({("bf16", peft): ours for peft in twins}), same)
    cells = {("bf16", peft): points for peft, points in twins.items()}
    twin = adapting(study(cells, model="llama_tiny"), same | {"lora_all": {"in_proj": 2, "out_proj": 2}})
    return judge(own + twin)


def test_what_only_one_pooling_of_recipes_shows_is_not_said() -> None:
    found = pooled_twice(STEADY, {"none": WORSE, "lora": WORSE, "lora_all": LITTLE})
    (one,) = [one for one in found.contrasts if one.overall and one.counterpart == "paper"]
    sizes = {name: np.abs(points) for name, points in (("s", STEADY), ("w", WORSE), ("l", LITTLE))}
    apart = {
        2: sizes["s"] - sizes["w"],  # none and lora
        3: sizes["s"] - (2 * sizes["w"] + sizes["l"]) / 3,  # and lora_all
    }
    means = {len(other.recipes): other.comparison.estimate.mean for other in one.others}
    assert one.comparison.estimate.mean == pytest.approx(apart[2].mean())
    assert {len(other.recipes) for other in one.others} == {2, 3}
    assert next(other for other in one.others if len(other.recipes) == 3).comparison.p_different == pytest.approx(
        stats.ttest_1samp(apart[3], 0.0).pvalue
    )
    assert means[3] == pytest.approx(apart[3].mean())
    instead = next(other for other in one.others if len(other.recipes) == 2)
    assert instead.recipes == ("bf16 · none", "bf16 · lora_all")
    assert one.steadier(found.settings) == "mamba_tiny"  # shown in all three
    assert "mamba_tiny is steadier over 2 recipes" in one_page(found)

    found = pooled_twice(STEADY, {"none": LITTLE, "lora": WORSE, "lora_all": [0.0] * 7 + [0.1]})
    (one,) = [one for one in found.contrasts if one.overall and one.counterpart == "paper"]
    assert one.steadier_in(one.comparison, found.settings) == "mamba_tiny"
    assert one.steadier(found.settings) is None
    said = text(found, "Mamba against Transformer")
    assert "neither is shown to be steadier, as it hangs on which recipes are pooled; " in said
    assert "Pooled otherwise: over all 3 " in said
    assert "over 2 with lora_all instead of lora " in said
    assert "undecided (mamba_tiny steadier over 2 recipes, " in one_page(found)


def test_a_pooling_that_lost_seeds_takes_nothing_back() -> None:
    """It may be these that show nothing, not the choice of recipes."""
    found = pooled_twice(STEADY, {"none": WORSE, "lora": WORSE, "lora_all": LITTLE[:1]})
    (one,) = [one for one in found.contrasts if one.overall and one.counterpart == "paper"]
    assert {other.comparison.estimate.n for other in one.others} == {1}
    assert one.steadier(found.settings) == "mamba_tiny"
    assert "mamba_tiny is steadier over 2 recipes" in one_page(found)


def test_the_single_recipes_that_show_a_difference_are_named() -> None:
    cells = {("bf16", "none"): STEADY, ("bf16", "lora"): WORSE}
    twin = {("bf16", "none"): [x + 3 for x in STEADY], ("bf16", "lora"): WORSE[::-1]}
    found = judge(study(cells) + study(twin, model="llama_tiny"))
    said = text(found, "Mamba against Transformer")
    assert "By itself 1 of the 2 recipes shows a difference: bf16 · none (mamba_tiny the steadier)." in said
    alike = judge(study(cells) + study(cells, model="llama_tiny"))
    assert "By itself none of the 2 recipes shows a difference." in text(alike, "Mamba against Transformer")


def test_the_noise_of_both_models_stands_beside_the_first_comparison_of_them() -> None:
    cells = {("bf16", "lora"): STEADY, ("fp32", "lora"): STEADY}
    found = judge(study(cells) + study(cells, model="llama_tiny", base=[2 * b / 1.5 for b in BASE]))
    floors = {floor.setting[0]: floor.mean_abs for floor in found.floors if floor.kind == "seeds"}
    noise = f"; another seed: {floors['mamba_tiny']:.2f} and {floors['llama_tiny']:.2f}."
    compared = [line for line in one_page(found).splitlines() if line.startswith("mamba_tiny and llama_tiny")]
    assert [line.endswith(noise) for line in compared] == [True, False]
