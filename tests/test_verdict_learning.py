"""What the studies `icl` and `tied` answer: paired numbers on made-up records, by hand and by SciPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lyapft.divergence import holm
from lyapft.report.verdict_tables import SPECS, text_columns
from lyapft.verdict import judge
from lyapft.verdict.words import ALONE
from tests.test_verdict import BASE, run, study, text

ZERO, FEW = [0.25, 0.24, 0.26, 0.25], [0.55, 0.50, 0.58, 0.52]  # tuned, by seed
BASE_SCORES = {0: 0.25, 1: 0.25, 5: 0.35}  # gain (0 + 0.4) / 2 = 0.2


def icl_study(base: dict[int, float] = BASE_SCORES, model: str = "mamba_tiny", **options: Any) -> list[dict[str, Any]]:
    """A pretrained base that ran once, and tuned seeds with 1 and 5 shots that score alike."""
    records = [run(model, "fp32", "none", 0, base, overrides=("trainer.steps=0",), **options)]
    records[0]["config"]["trainer"]["steps"] = 0
    records += [
        run(model, "fp32", "none", seed, {0: zero, 1: few, 5: few}, **options)
        for seed, (zero, few) in enumerate(zip(ZERO, FEW, strict=True))
    ]
    for record in records:
        record["config"]["model"]["init"] = "pretrained"
        record["divergence"] = [
            {"counterpart": kind, "reference_id": record["id"], "status": "self", "per_score": []}
            for kind in ("paper", "precision_only")
        ]
    return records


def tuned_gains() -> np.ndarray:
    return np.array(FEW) / np.array(ZERO) - 1


def test_tuned_against_base_is_a_paired_number_over_seeds_with_its_raw_scores() -> None:
    found = judge(icl_study())
    (one,) = found.learned
    apart = tuned_gains() - 0.2
    theirs = stats.ttest_1samp(apart, 0.0)
    interval = theirs.confidence_interval(0.95)
    assert (one.shots, one.difference.n, one.base_gain) == ((1, 5), 4, pytest.approx(0.2))
    assert (one.difference.mean, one.difference.low, one.difference.high) == pytest.approx(
        (apart.mean(), interval.low, interval.high)
    )
    assert one.p == pytest.approx(theirs.pvalue)
    said = text(found, "Base against tuned")
    assert "fp32 · none · trainer.steps=120 on skills, t, 1 to 5 shots, learns more in context than its base" in said
    assert f"gain +{tuned_gains().mean():.2f} of the 0-shot score (0.250 0-shot, 0.537 few-shot)" in said
    assert "against +0.20 of its base (0.250 0-shot, 0.300 few-shot)" in said
    assert f"difference +{apart.mean():.2f} (95% +{interval.low:.2f} to +{interval.high:.2f}, n = 4 seeds, " in said
    assert "none to recommend" in text(found, "Recommendation")
    assert "Nothing is missing" in text(found, "What is missing")  # the base needs no other seed


def test_every_task_is_compared_by_itself_and_holm_is_over_all_of_them() -> None:
    records = icl_study()
    rng = np.random.default_rng(0)
    for record in records:
        record["scores"] += [s | {"task": "u", "value": 0.4 + 0.01 * rng.integers(5)} for s in record["scores"]]
    found = judge(records).tables["base_and_tuned"].set_index("task")
    assert set(found.index) == {"t", "u"}
    raw = []
    for task in ("t", "u"):
        value = {(r["config"]["trainer"]["steps"], r["seed"], s["shots"]): s["value"] for r in records
                 for s in r["scores"] if s["task"] == task}  # fmt: skip
        gains = {key: (value[*key, 1] + value[*key, 5]) / 2 / value[*key, 0] - 1 for key in {k[:2] for k in value}}
        raw.append(stats.ttest_1samp([gains[120, seed] - gains[0, 0] for seed in range(4)], 0.0).pvalue)
    assert found.p_different.tolist() == pytest.approx(holm(raw))


def test_only_shots_that_both_have_are_compared() -> None:
    (one,) = judge(icl_study({0: 0.25, 5: 0.35})).learned
    assert one.shots == (5,)
    assert one.base_gain == pytest.approx(0.4)
    assert one.difference.mean == pytest.approx(tuned_gains().mean() - 0.4)


def test_a_base_that_was_not_scored_with_shots_or_not_at_all_gives_no_number() -> None:
    assert judge(icl_study({0: 0.25})).learned == ()
    assert judge(icl_study()[1:]).learned == ()
    one = judge(icl_study()[:2])
    assert one.learned[0].difference.n == 1
    said = text(one, "Base against tuned")
    assert "is not shown to learn more or less in context than its base" in said
    assert "no interval, n = 1 seed, preliminary" in said


def test_a_base_whose_weights_come_from_the_seed_is_paired_by_seed() -> None:
    records = icl_study()
    for record in records:
        record["config"]["model"]["init"] = "random"
    assert judge(records).learned[0].difference.n == 1  # the base ran on seed 0
    assert "trainer.steps=0: not run for seeds 1, 2, 3." in text(judge(records), "What is missing")


def test_scores_beyond_the_trained_length_are_labelled_beside_a_gain() -> None:
    label = "Some of these scores are beyond the trained length."
    assert text(judge(icl_study(beyond=3)), "Base against tuned").splitlines()[0].endswith(label)
    assert label not in text(judge(icl_study()), "Base against tuned")
    twins = icl_study(beyond=3) + icl_study(model="llama_tiny", beyond=3)
    lines = text(judge(twins), "Mamba against Transformer").splitlines()
    assert all(line.endswith(label) for line in lines if line.startswith("In-context learning"))


def test_gains_stand_beside_the_scores_they_come_from() -> None:
    twin = icl_study(model="llama_tiny")
    for record in twin:
        for score in record["scores"]:
            score["value"] = min(1.0, score["value"] + 0.1)
    found = judge(icl_study() + twin).tables["learning"].set_index(["model", "recipe"])
    tuned = found.loc["mamba_tiny", "fp32 · none · trainer.steps=120"]
    assert (tuned.zero_shot_score, tuned.few_shot_score) == pytest.approx((np.mean(ZERO), np.mean(FEW)))
    assert (tuned.twin_zero_shot_score, tuned.twin_few_shot_score) == pytest.approx(
        (np.mean(ZERO) + 0.1, np.mean(FEW) + 0.1)
    )


# --- a ratio to the twin ---------------------------------------------------------------------------------------------


def beside_a_twin(few: Sequence[float], seeds: int = 8, items: int = 200) -> list[dict[str, Any]]:
    """The counterparts of a Mamba that gains from examples, and of a twin with these scores with examples, by seed."""
    records = []
    for model, scores in (("mamba_tiny", [0.5] * seeds), ("llama_tiny", few)):
        own = study({("bf16", "none"): LITTLE[:seeds]}, model=model, base=[0.5] * 8)
        for record in own:
            for score in record["scores"]:
                score["n"] = items
                if score["shots"]:
                    score["value"] = scores[record["seed"]]
        records += [record for record in own if record["choices"]["precision"] == "fp32"]
    return records


def relative(records: list[dict[str, Any]]) -> tuple[Any, str]:
    found = judge(records)
    (gain,) = [one for one in found.gains if one.twin]
    return gain, text(found, "Mamba against Transformer")


def test_no_ratio_is_made_to_a_twin_whose_gain_may_be_zero() -> None:
    barely = [0.29, 0.22, 0.27, 0.26, 0.24, 0.28, 0.27, 0.26]  # 0-shot 0.25: the mean gain is above 0
    low = stats.ttest_1samp(np.array(barely) / 0.25 - 1, 0.0).confidence_interval(0.95).low
    assert np.mean(barely) > 0.25
    assert low < 0
    gain, said = relative(beside_a_twin(barely))
    assert np.isnan(gain.relative.mean)
    assert gain.twin_raw.few == pytest.approx(np.mean(barely))
    assert "llama_tiny is not shown to gain there, so no ratio (0.250 0-shot, 0.261 few-shot)" in said
    clearly = [x + 0.02 for x in barely]
    assert stats.ttest_1samp(np.array(clearly) / 0.25 - 1, 0.0).confidence_interval(0.95).low > 0
    gain, said = relative(beside_a_twin(clearly))
    assert gain.relative.mean == pytest.approx(1.0 / (np.mean(clearly) / 0.25 - 1))


def test_equal_scores_on_every_seed_do_not_make_a_gain_of_one_answer_sure() -> None:
    one_answer = 0.25 + 1 / 200
    gain, _ = relative(beside_a_twin([one_answer] * 4, seeds=4))
    assert np.isnan(gain.relative.mean)
    assert gain.gain.high > gain.gain.low  # nor is the model's own gain without a spread
    gain, _ = relative(beside_a_twin([0.5] * 4, seeds=4))
    assert gain.relative.mean == pytest.approx(1.0)
    assert gain.relative.low < 1.0 < gain.relative.high


def test_a_share_of_a_loss_or_of_one_seed_is_no_ratio() -> None:
    gain, said = relative(beside_a_twin([0.15 + 0.001 * n for n in range(8)]))
    assert np.isnan(gain.relative.mean)
    assert "so no ratio" in said
    gain, said = relative(beside_a_twin([0.5], seeds=1))
    assert np.isnan(gain.relative.mean)
    assert "one seed gives no ratio to llama_tiny's" in said


def test_gains_of_several_recipes_of_a_model_are_told_apart_on_the_page() -> None:
    found = judge(icl_study() + icl_study(model="llama_tiny"))
    said = [line for section in found.page for line in section.lines if line.startswith("In-context")]
    recipes = [
        line.split(", as share of llama_tiny's gain")[0].removeprefix("In-context learning of ") for line in said
    ]
    assert recipes == [f"mamba_tiny · fp32 · none · trainer.steps={steps}" for steps in (0, 120)]
    (alone,) = [
        line
        for section in judge(beside_a_twin([0.5] * 8)).page
        for line in section.lines
        if line.startswith("In-context")
    ]
    assert alone.startswith("In-context learning of mamba_tiny, as share of llama_tiny's gain: ")


def test_corrected_p_values_are_called_so_beside_base_and_settings() -> None:
    said = text(judge(icl_study()), "Base against tuned").splitlines()
    assert said[-1] == ALONE
    assert ALONE not in text(judge(icl_study()[:2]), "Base against tuned")  # one seed has no p
    said = text(judge(tied_study(LITTLE, LITTLE[::-1])), "Settings asked about").splitlines()
    assert said[-1] == f"{ALONE} Means over all scores and single scores are two families."
    assert ALONE not in text(judge(tied_study(LITTLE[:1], LITTLE[:1])), "Settings asked about")


def test_a_tuned_recipe_under_two_names_is_one_test() -> None:
    records = icl_study()
    tuned = [record for record in records if record["config"]["trainer"]["steps"]]
    for names in (("lora", "lora_all"), ("lora", "ia3")):
        made = [records[0]]
        for name in names:
            for record in tuned:
                own = record | {"choices": record["choices"] | {"peft": name}, "id": f"{record['id']}{name}"}
                own["config"] = record["config"] | {"peft": {"name": name, "r": 1 + (name == "ia3")}}
                own["peft"] = {"coverage": {"in_proj": {"adapted": 2, "present": 2}}}
                made.append(own)
        found = judge(made).learned
        assert [one.p for one in found] == pytest.approx([stats.ttest_1samp(tuned_gains() - 0.2, 0.0).pvalue
                                                          * (1 if "lora_all" in names else 2)] * 2)  # fmt: skip


# --- one setting, everything else equal -----------------------------------------------------------------------------

LITTLE = [0.2, -0.1, 0.3, 0.1, -0.2, 0.0, 0.2, 0.1]  # points by seed


def tied_study(tied: Sequence[float], untied: Sequence[float], **options: Any) -> list[dict[str, Any]]:
    """LoRA in full precision with the memory buffer tied, and the same with it untied; points off the counterpart."""
    records = study({("fp32", "lora"): tied}, **options)
    other = [record for record in study({("fp32", "lora"): untied}, **options) if record["choices"]["peft"] == "lora"]
    for value, own in (("tied", records), ("untied", other)):
        for record in own:
            if record["choices"]["peft"] == "lora":
                record["config"] = record["config"] | {"peft": {"name": "lora", "r": 8, "memory_buffer": value}}
    for record in other:
        record["id"] = f"{record['id']}u"
    return records + other


def test_tied_against_untied_is_scipys_paired_t_test_with_raw_scores() -> None:
    tied, untied = [x + 2.0 for x in LITTLE], [-x for x in reversed(LITTLE)]
    found = judge(tied_study(tied, untied))
    whole, *single = found.ablations
    theirs = stats.ttest_rel(tied, untied)
    interval = theirs.confidence_interval(0.95)
    estimate = whole.comparison.estimate
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == pytest.approx(
        (np.mean(tied) - np.mean(untied), interval.low, interval.high, 8)
    )
    assert whole.comparison.p_different == pytest.approx(theirs.pvalue)
    middle = np.mean(BASE) * 0.75  # of 0 and 5 shots
    assert (whole.score, whole.other_score) == pytest.approx(
        (middle + np.mean(tied) / 100, middle + np.mean(untied) / 100)
    )
    assert [one.key for one in single] == [("t", 0), ("t", 5)]
    for one in single:  # the made-up shifts are the same at both shots; Holm over two
        assert one.comparison.p_different == pytest.approx(2 * theirs.pvalue)
    said = text(found, "Settings asked about")
    assert "mamba_tiny on skills, fp32 · lora, peft.memory_buffer tied against untied: +2.15 points" in said
    assert f"score {whole.score:.3f} against {whole.other_score:.3f}; tied scores higher, p < 0.001." in said
    assert "single scores in which peft.memory_buffer shows: t " in said


def test_a_setting_that_does_nothing_is_equivalent_or_undecided_but_never_silent() -> None:
    said = text(judge(tied_study(LITTLE, list(reversed(LITTLE)))), "Settings asked about")
    assert "equivalent within ±1 point, TOST p" in said
    wild = [6.0, -5.0, 4.0, -6.0, 5.0, -4.0, 6.0, -5.0]
    said = text(judge(tied_study(wild, LITTLE)), "Settings asked about")
    assert "no difference is shown, p = " in said
    assert "nor equivalence; about" in said
    assert "one seed has no spread" in text(judge(tied_study(LITTLE[:1], LITTLE[:1])), "Settings asked about")


def test_recipes_that_differ_in_more_than_the_setting_are_no_ablation() -> None:
    records = tied_study(LITTLE, LITTLE)
    for record in records:
        if record["id"].endswith("u"):
            record["config"] = record["config"] | {"trainer": {"steps": 240}}
    assert judge(records).ablations == ()
    assert judge(study({("fp32", "lora"): LITTLE})).ablations == ()


def test_the_tables_of_both_studies_read_as_text() -> None:
    for records, name in ((icl_study(beyond=1), "base_and_tuned"), (tied_study(LITTLE, LITTLE, beyond=1), "settings")):
        verdict = judge(records)
        columns = {(column.group, column.title): column.cells for column in text_columns(verdict, name)}
        assert len(columns) > 8
        assert {len(cells) for cells in columns.values()} == {len(verdict.tables[name])}
        assert set(columns["", "beyond trained length"]) == {"yes"}
        assert {title for _, title in columns} <= {spec.title for spec in SPECS[name]}


def test_the_least_spread_of_a_gain_is_what_one_answer_without_shots_moves_it() -> None:
    zero, few, items = 0.25, 0.95, 200
    records = icl_study()
    for record in records:
        tuned = record["config"]["trainer"]["steps"] != 0
        for score in record["scores"]:
            score["n"] = items
            score["value"] = (few if score["shots"] else zero) if tuned else 0.25  # alike on every seed
    (one,) = judge(records).learned
    moved = few / zero - few / (zero + 1 / items)
    assert moved == pytest.approx(0.0745, abs=1e-4)
    half = one.difference.high - one.difference.mean
    assert half == pytest.approx(stats.t.ppf(0.975, 3) * few / (items * zero**2) / 2)  # four seeds
    assert half > stats.t.ppf(0.975, 3) * moved / 2
