"""Where a recipe fails: which layers, which block, which task; on made-up studies whose answer is known."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lyapft import cell
from lyapft import records as records_
from lyapft.verdict import Settings, Verdict, judge
from lyapft.verdict.blame import blame, inquire
from lyapft.verdict.evidence import gather
from lyapft.verdict.recipes import rows, score_rows
from tests.test_cell import prepared
from tests.test_verdict import BASE, STEADY, WORSE, run, study, text

SMALL, ALL = {"in_proj": 2, "dt_proj": 0}, {"in_proj": 2, "dt_proj": 2}
LITTLE = [0.3, -0.2, 0.1, -0.1, 0.2, -0.3, 0.1, -0.2]


def adapting(
    cells: dict[tuple[str, str], Sequence[float]], layers: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    """A study whose pefts adapt the given number of layers of each name."""
    records = study(cells)
    for record in records:
        if counts := layers.get(record["choices"]["peft"]):
            record["peft"]["coverage"] = {name: {"adapted": n, "present": 2} for name, n in counts.items()}
    return records


def line_of(found: Verdict, recipe: str) -> str:
    (line,) = [
        line for line in text(found, "Where it fails").splitlines() if line.startswith(f"mamba_tiny · {recipe} is w")
    ]
    return line


# --- which layers ----------------------------------------------------------------------------------------------------


def test_layers_that_were_left_alone_are_blamed_where_adapting_them_too_gains() -> None:
    wider = [w + 2.0 + x for w, x in zip(WORSE, LITTLE, strict=True)]
    cells = {("fp32", "lora"): WORSE, ("fp32", "lora_all"): wider}
    line = line_of(judge(adapting(cells, {"lora": SMALL, "lora_all": ALL})), "fp32 · lora")
    theirs = stats.ttest_rel(wider, WORSE)
    interval = theirs.confidence_interval(0.95)
    assert theirs.pvalue < 0.05
    apart = np.mean(wider) - np.mean(WORSE)
    middle = np.mean(BASE) * 0.75
    scores = f"{middle + np.mean(wider) / 100:.3f} against {middle + np.mean(WORSE) / 100:.3f}"
    assert "lora on in_proj" in line
    assert (
        "Leaving dt_proj alone is to blame for part of it: lora_all, which adapts it too, lies "
        f"+{apart:.2f} points from it (95% +{interval.low:.2f} to +{interval.high:.2f}, n = 8 seeds; {scores}); "
        "its other layers were not varied." in line in line
    )


def test_layers_whose_adapting_costs_are_blamed_and_those_whose_adapting_helps_are_not() -> None:
    worse_still = [w - 2.0 + x for w, x in zip(WORSE, LITTLE, strict=True)]
    cells = {("fp32", "lora"): WORSE, ("fp32", "lora_all"): worse_still}
    found = judge(adapting(cells, {"lora": SMALL, "lora_all": ALL}))
    said = line_of(found, "fp32 · lora_all")
    assert "Adapting dt_proj is to blame for part of it: lora, which leaves it alone, lies +2.01 points" in said
    said = line_of(found, "fp32 · lora")
    assert "Leaving dt_proj alone is not to blame: lora_all, which adapts it too, lies −2.01 points" in said


def test_where_the_records_cannot_tell_the_layers_they_say_so() -> None:
    same = [w + x for w, x in zip(WORSE, LITTLE, strict=True)]
    cells = {("fp32", "lora"): WORSE, ("fp32", "lora_all"): same}
    said = line_of(judge(adapting(cells, {"lora": SMALL, "lora_all": ALL})), "fp32 · lora")
    assert "Whether leaving dt_proj alone is to blame, the seeds do not tell: " in said
    cannot = "Which of these layers, the records cannot tell: no other peft.targets were tried beside them."
    assert cannot in line_of(judge(adapting({("fp32", "lora"): WORSE}, {"lora": SMALL})), "fp32 · lora")
    crossed = {
        "lora": {"in_proj": 2, "dt_proj": 0},
        "lora_all": {"in_proj": 0, "dt_proj": 2},
    }  # neither holds the other
    assert cannot in line_of(judge(adapting(cells, crossed)), "fp32 · lora")


def test_without_full_precision_of_the_same_peft_peft_and_format_cannot_be_told_apart() -> None:
    said = line_of(judge(study({("bf16", "lora"): WORSE})), "bf16 · lora")
    assert "Peft or format, the records cannot tell: full precision with the same peft is missing." in said


# --- which block -----------------------------------------------------------------------------------------------------


def shadowed(blocks: Sequence[Mapping[str, float | None]]) -> list[dict[str, Any]]:
    """All weights in fp16, worse than full precision, each seed with what a shadow probe saw after each block."""
    records = study({("fp16", "none"): WORSE})
    half = [record for record in records if record["choices"]["precision"] == "fp16"]
    for record, own in zip(half, blocks, strict=False):
        record["shadow"] = {"n": 6, "nonfinite": 0, "deviation_max_by_block": dict(own)}
    return records


def test_the_block_that_is_shown_to_add_most_is_named_not_the_one_that_passes_it_on() -> None:
    seen = [{"layers.0": 0.001, "layers.1": 0.011 + x / 1000, "layers.2": 0.012 + x / 1000} for x in LITTLE]
    seen[3] = {"layers.0": 0.006, "layers.1": 0.011, "layers.2": 0.012}
    said = line_of(judge(shadowed(seen)), "fp16 · none")
    assert "All of it is the number format's" in said
    added = [run["layers.1"] - run["layers.0"] for run in seen]
    largest = np.mean([run["layers.2"] for run in seen])
    assert f"grow most in layers.1, in 7 of 8 runs: by {np.mean(added):.1e} of {largest:.1e}" in said
    assert "which does not prove that the score is lost there" in said


def test_a_block_is_named_by_a_paired_test_against_every_other_with_one_error_rate_for_the_page() -> None:
    first = np.array([0.010, 0.009, 0.012, 0.006, 0.011, 0.012, 0.007, 0.010])
    second = np.array([0.007, 0.007, 0.009, 0.008, 0.006, 0.006, 0.0072, 0.007])
    p = stats.ttest_rel(first, second).pvalue
    assert 0.05 / 2 < p < 0.05
    seen = [{"layers.0": a, "layers.1": a + b, "layers.2": a + b + 0.001} for a, b in zip(first, second, strict=True)]
    alone = shadowed(seen)
    assert "grow most in layers.0, in 6 of 8 runs" in line_of(judge(alone), "fp16 · none")
    other = study({("bf16", "none"): STEADY}, model="mamba2_tiny")  # does not fail, and is asked all the same
    for record in other:
        if record["choices"]["precision"] == "bf16":
            added = 0.01 + 0.001 * (-1) ** record["seed"]
            record["shadow"] = {"deviation_max_by_block": {"layers.0": 0.01, "layers.1": 0.01 + added}}
    said = line_of(judge([*alone, *other]), "fp16 · none")
    assert "the shadow probe does not tell: on average the deviation grows most in layers.0, in 6 of 8 runs." in said


def test_a_block_in_which_the_format_overflows_comes_before_every_deviation() -> None:
    said = line_of(judge(shadowed([{"layers.0": 0.5, "layers.1": None, "layers.2": None}] * 8)), "fp16 · none")
    assert "The shadow probe saw fp16 leave its range in layers.1, in 8 of 8 runs." in said
    twice = [{"layers.0": 0.5, "layers.1": None}] * 2 + [{"layers.0": 0.5, "layers.1": 0.6}] * 6
    said = line_of(judge(shadowed(twice)), "fp16 · none")
    assert "leave its range in layers.1, in 2 of 8 runs." in said


def test_blocks_that_the_records_do_not_hold_or_do_not_agree_on_are_not_named() -> None:
    assert "no shadow probe ran (probe=shadow)" in line_of(judge(study({("fp16", "none"): WORSE})), "fp16 · none")
    split = [{"layers.0": 0.01, "layers.1": 0.01}] * 4 + [{"layers.0": 0.001, "layers.1": 0.01}] * 4
    for seen in (split, [{"layers.0": 0.001, "layers.1": 0.01}]):  # one run has no spread
        said = line_of(judge(shadowed(seen)), "fp16 · none")
        assert "In which block, the shadow probe does not tell" in said


def test_the_block_of_real_records_is_what_their_step_series_say(tmp_path: Path) -> None:
    for seed in range(3):  # each makes its counterpart
        cell.ensure(
            prepared(tmp_path, "precision=fp16", "peft=none", f"seed={seed}", "probe=shadow", "probe.shadow.every=1")
        )
    evidence = gather([record for _, record in records_.load_study(tmp_path / "default")])
    settings = Settings()
    found = rows(evidence, settings)
    # so few steps leave nothing to fail, and a failure is only what is asked about
    (one,) = inquire(evidence, found, score_rows(found, settings), [(row, row.keys) for row in found], settings)
    series = [pd.read_parquet(path) for path in sorted(tmp_path.glob("default/*fp16*/steps.parquet"))]
    columns = [column for column in series[0] if column.startswith("shadow_deviation/")]
    largest = np.array([[run[column].max() for column in columns] for run in series])
    added = np.diff(largest, axis=1, prepend=0.0)
    assert (added.shape, len(columns)) == ((3, 2), 2)
    most = int(added.mean(axis=0).argmax())
    p = stats.ttest_rel(added[:, most], added[:, 1 - most]).pvalue
    assert one.origins is not None
    assert one.origins.p == pytest.approx(p)
    where = f"{columns[most].partition('/')[2]}, in {(added.argmax(axis=1) == most).sum()} of 3 runs"
    said = blame(one, settings)
    assert "All of it is the number format's: every weight trains in both." in said
    if p <= 0.05:
        assert f"grow most in {where}: by {added[:, most].mean():.1e} of {largest.max(axis=1).mean():.1e}" in said
    else:
        assert f"does not tell: on average the deviation grows most in {where}." in said


def test_a_block_is_asked_for_only_where_the_format_is_shown_to_lose() -> None:
    cells = {("fp32", "lora"): WORSE, ("fp16", "lora"): [w + f for w, f in zip(WORSE, LITTLE, strict=True)]}
    said = line_of(judge(study(cells)), "fp16 · lora")
    assert "which may be nothing) the format's (fp16): " in said
    assert "block" not in said


# --- which task ------------------------------------------------------------------------------------------------------


def test_the_second_counterpart_has_its_differences_per_task_and_shots() -> None:
    same_peft = [x - 2.0 for x in STEADY]
    cells = {("fp32", "lora"): same_peft, ("bf16", "lora"): WORSE}
    found = judge(study(cells)).tables["format_scores"].set_index(["recipe", "shots"])
    assert set(found.index) == {("bf16 · lora", 0), ("bf16 · lora", 5)}  # the others are their own counterparts
    theirs = stats.ttest_rel(WORSE, same_peft)
    interval = theirs.confidence_interval(0.95)
    for shots, factor in ((0, 0.5), (5, 1.0)):
        own = found.loc["bf16 · lora", shots]
        assert own.counterpart == "precision_only"
        assert own.counterpart_score == pytest.approx(np.mean(BASE) * factor + np.mean(same_peft) / 100)
        assert own.score == pytest.approx(np.mean(BASE) * factor + np.mean(WORSE) / 100)
        assert (own.difference_points, own.difference_points_low, own.difference_points_high) == pytest.approx(
            (np.mean(WORSE) - np.mean(same_peft), interval.low, interval.high)
        )
        assert own.p_different == pytest.approx(min(1.0, 2 * theirs.pvalue))


def test_single_scores_outside_the_margin_name_their_counterpart() -> None:
    said = text(judge(study({("fp32", "lora"): STEADY, ("bf16", "lora"): WORSE})), "Where it fails")
    assert "bf16 · lora: single scores outside ±1 point from full precision with the same peft: t " in said


def test_spikes_are_counted_by_task_beside_the_floor_of_the_same_score() -> None:
    records = study({("bf16", "lora"): [1.5, 0.2], ("fp16", "lora"): [-2.0, 0.0]})
    for record in records:  # half of the made-up 0-shot differences: never a spike
        half = {"fp16": -1.0, "bf16": 0.75}.get(record["choices"]["precision"], 0.0) * (record["seed"] == 0)
        record["scores"][0]["value"] = BASE[record["seed"]] / 2 + half / 100
        for entry in record["divergence"]:
            for score in entry["per_score"]:
                score["signed_points"] = half if score["shots"] == 0 else score["signed_points"]
    again = run("mamba_tiny", "bf16", "lora", 0, {0: BASE[0] / 2 + 0.0075, 5: BASE[0] + 0.015 - 0.004}, replicate=1)
    found = judge([*records, again])
    table = found.tables["spikes"].set_index("shots")
    assert (table.spikes[0], table.scores[0], table.spikes[5], table.scores[5]) == (0, 4, 2, 4)
    assert table.mean_abs_points[5] == pytest.approx((1.5 + 0.2 + 2.0 + 0.0) / 4)
    assert table.largest_points[5] == pytest.approx(2.0)
    assert table.floor_seeds_points.tolist() == pytest.approx([0.5, 1.0])  # BASE[1] − BASE[0], half of it at 0 shots
    assert table.floor_replicate_points.tolist() == pytest.approx([0.0, 0.4])
    score = np.mean(BASE[:2])
    beside = f"{score + (1.5 + 0.2 - 2.0) / 400:.3f} against {score:.3f}"
    assert (
        "Spikes of mamba_tiny on skills, most often at t 5-shot 2 of 4, mean size 0.93 points, scores "
        f"{beside} (noise floor there: another seed 1.00, same again 0.40)." in text(found, "Where it fails")
    )
    without = text(judge([r for r in records if r["seed"] == 0]), "Where it fails")
    assert "(no noise floor measured there)" in without


# --- raw scores and labels -------------------------------------------------------------------------------------------

DIFFERENCE = re.compile(r"[+−]?\d+\.\d\d points \((95%|no interval)")
RAW = re.compile(r"\d\.\d{3} against \d\.\d{3}")


@pytest.fixture(scope="module")
def everything() -> Verdict:
    cells = {("fp32", "lora"): WORSE, ("bf16", "lora"): STEADY, ("bf16", "none"): STEADY, ("fp16", "lora"): LITTLE}
    twin = study(cells | {("bf16", "lora"): WORSE}, model="llama_tiny", parameters=300_000, beyond=9)
    return judge(study(cells, beyond=9) + twin)


def test_every_sentence_with_a_difference_has_the_raw_scores_beside_it(everything: Verdict) -> None:
    checked = 0
    for section in everything.sections:
        for line in section.lines:
            if DIFFERENCE.search(line):
                checked += 1
                assert RAW.search(line), line
    assert checked > 8
    assert {"Recommendation", "Where it fails", "Mamba against Transformer"} <= {s.title for s in everything.sections}


def test_every_table_with_a_difference_has_the_raw_scores_beside_it(everything: Verdict) -> None:
    differing = {name: t for name, t in everything.tables.items() if "difference_points" in t}
    assert set(differing) == {"recipes", "formats", "scores", "format_scores", "architectures"}
    for table in differing.values():
        assert table[["score", "counterpart_score"]].notna().all().all()
    apart = differing["recipes"]
    assert (100 * (apart.score - apart.counterpart_score)).tolist() == pytest.approx(apart.difference_points.tolist())


def test_a_contrast_has_the_scores_of_both_models_and_of_their_counterparts(everything: Verdict) -> None:
    middle = np.mean(BASE) * 0.75
    table = everything.tables["architectures"].set_index(["counterpart", "recipe"])
    one = table.loc["paper", "bf16 · lora"]
    assert (one.score, one.counterpart_score) == pytest.approx((middle + np.mean(STEADY) / 100, middle))
    assert (one.twin_score, one.twin_counterpart_score) == pytest.approx((middle + np.mean(WORSE) / 100, middle))
    pooled = table.loc["paper", "all shared recipes"]
    mean = np.mean([np.mean(WORSE), np.mean(STEADY), np.mean(STEADY), np.mean(LITTLE)]) / 100
    assert pooled.score == pytest.approx(middle + mean)
    said = text(everything, "Mamba against Transformer")
    assert f"of mamba_tiny, scores {middle + mean:.3f} against {middle:.3f}, and " in said


def test_scores_beyond_the_trained_length_are_labelled_wherever_they_decide(everything: Verdict) -> None:
    label = "(2 of its 2 scores beyond the trained length)"
    use = next(line for line in text(everything, "Recommendation").splitlines() if ": use " in line)
    assert label in use
    assert everything.tables["recipes"].beyond_trained_length.eq(2).all()
    lines = text(everything, "Mamba against Transformer").splitlines()
    contrasts = [line for line in lines if "steadier" in line]
    assert len(contrasts) == 2
    assert all(line.endswith("Some of these scores are beyond the trained length.") for line in contrasts)
    assert "beyond the trained length" not in "\n".join(
        line for section in judge(study({("bf16", "lora"): STEADY})).sections for line in section.lines
    )
