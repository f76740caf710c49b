"""The verdict on made-up studies whose answer is known, each number by hand."""

import math
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lyapft.divergence import against_counterparts, estimate, seeds_to_decide
from lyapft.errors import InputError
from lyapft.verdict import Settings, Verdict, judge
from tests import synthetic

ITEMS = 1000  # one answer is 0.1 points
STEADY = [0.2, -0.3, 0.1, 0.0, -0.2, 0.3, -0.1, 0.1]  # points by seed: equivalent within ±1
WORSE = [-3.1, -2.8, -3.3, -2.9, -3.0, -3.2, -2.7, -3.0]
WILD = [4.0, -5.0, 3.0, -4.0, 5.0, -3.0, 4.0, -4.0]
BASE = [0.50, 0.51, 0.49, 0.52, 0.50, 0.48, 0.51, 0.50]  # the counterpart's score, by seed


def run(
    model: str,
    precision: str,
    peft: str,
    seed: int,
    values: dict[int, float],
    *,
    speed: float = 1000.0,
    memory: float = 100.0,
    parameters: int = 230_000,
    beyond: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """One finished record with the given score at each number of shots."""
    record = synthetic.record(model, precision, peft, seed, **options)
    record["cost"] = {"tokens_per_s": speed, "peak_bytes_per_token": memory}
    record["model"]["parameters_total"] = parameters
    record["environment"]["threads"] = 2
    record["scores"] = [
        {"task": "t", "shots": shots, "metric": "acc", "value": value, "n": ITEMS, "beyond_trained_length": beyond}
        for shots, value in values.items()
    ]
    return record


def study(
    cells: dict[tuple[str, str], Sequence[float]],
    model: str = "mamba_tiny",
    costs: dict[tuple[str, str], tuple[float, float]] | None = None,
    base: Sequence[float] = BASE,
    **options: Any,
) -> list[dict[str, Any]]:
    """The counterpart, and recipes that lie the given points off at 0 shots and at 5, seed by seed."""
    seeds = range(max(map(len, cells.values())))
    made = {("fp32", "none", s): run(model, "fp32", "none", s, {0: base[s] / 2, 5: base[s]}, **options) for s in seeds}
    for (precision, peft), points in cells.items():
        speed, memory = (costs or {}).get((precision, peft), (1.5, 0.5))
        for seed, off in enumerate(points):
            values = {0: base[seed] / 2 + off / 100, 5: base[seed] + off / 100}
            made[precision, peft, seed] = run(
                model, precision, peft, seed, values, speed=1000 * speed, memory=100 * memory, **options
            )
    for (_, peft, seed), record in made.items():
        record["divergence"] = counterparts(record, made["fp32", "none", seed], made.get(("fp32", peft, seed)))
    return list(made.values())


def counterparts(
    record: dict[str, Any], paper: dict[str, Any], same_peft: dict[str, Any] | None
) -> list[dict[str, Any]]:
    found = {"paper": None if paper is record else paper}
    if same_peft is not None:
        found["precision_only"] = None if same_peft is record else same_peft
    return against_counterparts(record, found)


def text(verdict: Verdict, title: str) -> str:
    return "\n".join(line for section in verdict.sections if section.title == title for line in section.lines)


# --- recommendation --------------------------------------------------------------------------------------------------


def test_the_cheapest_equivalent_recipe_is_recommended_with_its_numbers() -> None:
    cells = {("bf16", "lora"): STEADY, ("bf16", "none"): STEADY, ("fp16", "lora"): WORSE}
    costs = {("bf16", "lora"): (2.0, 0.5), ("bf16", "none"): (1.2, 0.9), ("fp16", "lora"): (4.0, 0.25)}
    found = judge(study(cells, costs=costs))
    (advice,) = found.recommendations
    assert advice.chosen is not None
    assert advice.chosen.recipe.label == "bf16 · lora"
    ours, by_hand = advice.chosen.comparison.estimate, estimate(STEADY)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((by_hand.mean, by_hand.low, by_hand.high))
    said = text(found, "Recommendation")
    assert "mamba_tiny on skills: use bf16 · lora, the cheapest recipe that is equivalent" in said
    mean = sum(STEADY) / 8
    assert f"+{mean:.2f} points" in said
    assert "n = 8 seeds)" in said
    assert "adjusted for 3 recipes" in said
    assert (
        "It trains 2 × the tokens/s (95% 2.00 to 2.00, n = 8 seeds) (emulated) and needs 50% less memory per token."
        in said
    )
    score = sum(b * 0.75 for b in BASE) / 8
    assert f"score {score + mean / 100:.3f} against {score:.3f}" in said
    assert said.splitlines()[-1].startswith("(emulated): half precision ran in software")  # the made-up bf16 did


def test_cost_weights_are_the_readers() -> None:
    cells = {("bf16", "lora"): STEADY, ("fp16", "none"): STEADY}
    costs = {("bf16", "lora"): (1.1, 0.3), ("fp16", "none"): (3.0, 0.9)}
    chosen = []
    for settings in (Settings(speed_weight=0), Settings(memory_weight=0), Settings()):
        (advice,) = judge(study(cells, costs=costs), settings=settings).recommendations
        assert advice.chosen is not None
        chosen.append((advice.chosen.recipe.label, advice.chosen.cost.index.mean))
    assert [label for label, _ in chosen] == ["bf16 · lora", "fp16 · none", "bf16 · lora"]
    assert [index for _, index in chosen] == pytest.approx([0.3, 1 / 3, math.sqrt(0.3 / 1.1)])


def test_the_margin_is_the_readers() -> None:
    records = study({("bf16", "lora"): [x - 0.7 for x in STEADY]})
    outcomes = [
        judge(records, settings=Settings(margin=m)).rows[0].outcome(Settings(margin=m)) for m in (0.2, 0.7, 1.5)
    ]
    assert outcomes == ["worse", "undecided", "equivalent"]


def test_too_little_power_is_undecided_with_the_seeds_that_would_decide() -> None:
    found = judge(study({("bf16", "lora"): WILD, ("fp16", "lora"): WORSE}))
    wild = next(row for row in found.rows if row.recipe.label == "bf16 · lora")
    needed = seeds_to_decide(0.0, wild.comparison.sd, 1.0, 0.05 / 2)
    assert needed is not None
    assert f"about {needed} seeds would show that it is equivalent, with 80% chance" in text(found, "Recommendation")
    assert "undecided. No recipe is shown to be equivalent" in text(found, "Recommendation")


def test_one_seed_decides_nothing_however_small_the_difference() -> None:
    found = judge(study({("bf16", "lora"): [0.0]}))
    assert found.rows[0].outcome(found.settings) == "undecided"
    assert "no interval, n = 1 seed, preliminary" in text(found, "Recommendation")
    assert "use " not in text(found, "Recommendation").split("undecided")[0]


def test_two_equal_seeds_are_no_proof_of_equality() -> None:
    found = judge(study({("bf16", "lora"): [0.9, 0.9]}))
    assert found.rows[0].outcome(found.settings) == "undecided"


def test_few_seeds_are_labelled() -> None:
    assert "n = 4 seeds, preliminary" in text(judge(study({("bf16", "lora"): STEADY[:4]})), "Recommendation")


def test_what_costs_no_less_is_not_recommended() -> None:
    found = judge(study({("bf16", "none"): STEADY}, costs={("bf16", "none"): (0.5, 1.0)}))
    assert "stay with full-precision" in text(found, "Recommendation")
    said = text(found, "Recommendation")
    assert (
        "No recipe that is equivalent to full-precision fine-tuning of all weights within ±1 point costs less." in said
    )
    dear = "Equivalent, but shown to cost more: mamba_tiny · bf16 · none, at 1.41 × the cost [1.41, 1.41] (emulated)"
    assert f"{dear}, p < 0.001; " in said


def test_what_no_number_of_seeds_would_decide_is_said_so_for_the_spread_as_for_the_mean() -> None:
    near = [x + 0.085 for x in STEADY]  # 0.0975 points on average
    records = study({("bf16", "lora"): near, ("fp16", "lora"): WILD})
    said = text(judge(records, settings=Settings(margin=0.1)), "Recommendation")
    assert said.count("over 10,000 seeds would be needed to show that it is ") == 2
    for points in (near, WILD):
        assert seeds_to_decide(float(np.mean(points)), float(np.std(points, ddof=1)), 0.1, 0.05 / 2) is None


def test_the_cheapest_undecided_ones_are_listed_and_that_with_the_fewest_seeds() -> None:
    names = ("none", "lora", "ia3", "dora", "vera")
    cells = {("bf16", name): [x * (0.4 if name == "dora" else 1) + (name == "vera") for x in WILD] for name in names}
    costs = {("bf16", name): (1.0, 0.5 + 0.1 * place) for place, name in enumerate(names)}
    found = judge(study(cells, costs=costs))
    (advice,) = found.recommendations
    assert [row.recipe.peft for row in advice.open] == list(names)
    soonest = advice.soonest(found.settings)
    assert soonest is not None
    assert soonest[0].recipe.peft == "dora"
    assert soonest[1] == min(
        count
        for row in advice.open
        if (count := row.comparison.seeds_needed()) and abs(row.comparison.estimate.mean) < 1
    )
    listed = re.findall(r"Undecided: mamba_tiny · bf16 · (\w+), ", text(found, "Recommendation"))
    assert listed == ["none", "lora", "ia3", "dora"]
    assert "Undecided too: mamba_tiny · bf16 · vera." in text(found, "Recommendation")


def test_a_recipe_that_broke_down_on_a_seed_is_not_recommended() -> None:
    records = study({("fp16", "lora"): STEADY})
    records[-1] |= {
        "status": "nonfinite",
        "error": {"type": "X", "message": "loss is nan"},
        "scores": [],
        "divergence": [],
    }
    found = judge(records)
    assert found.recommendations[0].chosen is None
    assert "training broke down on 1 of 8" in text(found, "Recommendation")
    assert "training broke down on 1 of 8 seeds (nonfinite)" in text(found, "Where it fails")
    assert "nonfinite for seed 7." in text(found, "What is missing")


def test_nothing_to_compare_says_so() -> None:
    record = run("mamba_tiny", "bf16", "lora", 0, {0: 0.5})
    assert "nothing can be recommended" in text(judge([record]), "Recommendation")
    assert "no counterpart for seed 0" in text(judge([record]), "What is missing")
    assert judge([]).tables == {}
    assert judge([{"schema_version": 1, "id": "x", "status": "ok"}]).rows == ()


def test_what_is_better_and_cheaper_is_named_though_it_is_not_equivalent() -> None:
    found = judge(study({("bf16", "lora"): [-x for x in WORSE], ("fp16", "lora"): WORSE}))
    assert found.recommendations[0].chosen is None
    said = text(found, "Recommendation")
    assert "Not equivalent but better: mamba_tiny · bf16 · lora, at 0.577 × the cost (emulated), +3.00 points" in said
    assert "fp16" not in said


def test_a_recipe_at_the_margin_is_recommended_in_one_study_of_twenty_at_most() -> None:
    rng = np.random.default_rng(11)
    chosen = 0
    for _ in range(200):
        cells = {("bf16", "lora"): rng.normal(1.0, 0.6, 8), ("fp16", "lora"): rng.normal(-1.0, 0.6, 8)}
        chosen += judge(study(cells)).recommendations[0].chosen is not None
    assert chosen <= 200 * 0.05 + 3 * math.sqrt(200 * 0.05 * 0.95)


@pytest.mark.parametrize("wrong", [{"margin": 0}, {"alpha": 0.7}, {"power": 1.0}, {"speed_weight": -1}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"are needed|must not"):
        Settings(**wrong)


@pytest.mark.parametrize("speed", [0.0, 500.0])
def test_what_is_undecided_is_said_so_whatever_it_costs(speed: float) -> None:
    cells = {("bf16", "none"): WILD}
    records = study(cells, costs={("bf16", "none"): (0.5, 2.0)})
    for record in records:
        record["cost"] = {"tokens_per_s": speed} if not speed else record["cost"]
    said = text(judge(records), "Recommendation")
    assert "undecided. No recipe is shown to be equivalent" in said
    assert (
        "Undecided: mamba_tiny · bf16 · none, " + ("its cost not measured" if not speed else "at 2 × the cost") in said
    )
    assert "seeds would show that it is" in said
    assert "stay with" not in said


def test_a_base_that_nobody_trained_is_no_fine_tuning() -> None:
    records = study({("bf16", "none"): WILD})
    for record in records:
        record["config"]["trainer"] = {**record["config"].get("trainer", {}), "steps": 0}
    assert "equivalent to the full-precision base (nothing was trained)" in text(judge(records), "Recommendation")


def test_recipes_on_two_data_sets_are_told_apart() -> None:
    both = [study({("bf16", "none"): points}) for points in (STEADY, WORSE)]
    for record in both[1]:
        record["choices"] = record["choices"] | {"data": "other"}
        record["id"] = f"{record['id']}o"
        for entry in record["divergence"]:
            entry["reference_id"] = f"{entry['reference_id']}o" if entry.get("reference_id") else None
    found = judge([*both[0], *both[1]])
    assert set(found.tables["recipes"]["data"]) == {"skills", "other"}
    assert {one.setting[1] for one in found.recommendations} == {"skills", "other"}


def test_a_rerun_that_failed_is_missing() -> None:
    records = study({("bf16", "none"): STEADY})
    again = run("mamba_tiny", "bf16", "none", 0, {0: 0.25, 5: 0.5}, status="failed") | {"replicate": 1}
    again["error"] = {"type": "RuntimeError", "message": "broke"}
    assert "rerun failed for seed 0" in text(judge([*records, again]), "What is missing")


def test_models_of_very_different_size_have_no_twin() -> None:
    cells = {("bf16", "none"): STEADY}
    large = study(cells, model="llama_large", parameters=2_800_000_000)
    for record in large:
        record["kernels"] = {}
    found = judge([*study(cells), *large])
    assert "architectures" not in found.tables
    assert "of about its size" in text(found, "Mamba against Transformer")


@pytest.mark.parametrize(
    "wrong", [{"margin": math.nan}, {"margin": math.inf}, {"margin": 0.0}, {"speed_weight": math.nan}]
)
def test_what_is_wrong_with_the_settings_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"given: {next(iter(wrong)).partition('_')[0]}"):
        Settings(**wrong)


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_names_its_parts_which_add_up() -> None:
    peft = [x - 2.5 for x in STEADY]
    whole = [p + x - 0.5 for p, x in zip(peft, reversed(STEADY), strict=True)]
    found = judge(study({("fp32", "lora"): peft, ("fp16", "lora"): whole}))
    said = text(found, "Where it fails")
    line = next(line for line in said.splitlines() if line.startswith("mamba_tiny · fp16 · lora is worse"))
    part, form = sum(peft) / 8, (sum(whole) - sum(peft)) / 8
    assert f"Of it {part:.2f}".replace("-", "−") in line
    assert f"and {form:.2f} (95% ".replace("-", "−") in line
    assert " is the peft's (lora" in line
    assert " the format's (fp16)" in line
    assert "may be nothing" not in line  # both intervals lie on one side of 0
    assert "single scores outside ±1 point" in said


def test_a_remedy_is_the_nearest_recipe_that_changes_the_choice_to_blame() -> None:
    off, near, far = ([x + by for x in STEADY] for by in (-4.0, -0.1, -2.5))
    cells = {("fp32", "lora"): near, ("fp16", "lora"): off, ("bf16", "lora"): far, ("fp16", "none"): near}
    said = text(judge(study(cells)), "Where it fails")
    line = next(line for line in said.splitlines() if line.startswith("mamba_tiny · fp16 · lora is worse"))
    assert f"Remedy tried: precision=fp32 instead, {sum(near) / 8:.2f} points".replace("-", "−") in line
    assert "inside the margin" in line
    said = text(judge(study({("fp32", "lora"): off, ("bf16", "lora"): near})), "Where it fails")
    assert "All of it is the peft's: lora" in said
    assert "No remedy was tried: add another peft=…" in said
    assert "Remedy" not in text(judge(study({("fp32", "lora"): [-x for x in off]})), "Where it fails")


def test_no_failure_is_not_called_agreement() -> None:
    said = text(judge(study({("bf16", "lora"): WILD})), "Where it fails")
    assert "1 of 1 are undecided, which does not mean that they agree" in said


def test_spikes_say_what_one_answer_is_worth() -> None:
    records = study({("bf16", "lora"): [1.5, 0.2]})
    assert "Spikes: 2 of 4 single scores" in text(judge(records), "Where it fails")
    for record in records:
        for score in record["scores"]:
            score["n"] = 50
    assert "one answer is worth 2.00 points there" in text(judge(records), "Where it fails")


# --- Mamba against Transformer ---------------------------------------------------------------------------------------


def two_models(ours: Sequence[float], theirs: Sequence[float]) -> list[dict[str, Any]]:
    twin = study({("bf16", "lora"): theirs}, model="llama_tiny", parameters=320_000)
    other = study({("bf16", "lora"): WORSE}, model="pythia_tiny", parameters=9_000_000)
    return study({("bf16", "lora"): ours}) + twin + other


def test_the_steadier_model_is_named_with_both_sizes_and_their_difference() -> None:
    found = judge(two_models(STEADY, WORSE))
    (contrast,) = [c for c in found.contrasts if c.counterpart == "paper" and c.overall]
    apart = [abs(a) - abs(b) for a, b in zip(STEADY, WORSE, strict=True)]
    assert (contrast.model, contrast.twin) == ("mamba_tiny", "llama_tiny")  # nearest in parameters
    assert contrast.comparison.estimate.mean == pytest.approx(sum(apart) / 8)
    said = text(found, "Mamba against Transformer")
    assert "mamba_tiny is steadier than llama_tiny" in said
    assert "not about the architectures as such" in said
    turned = judge(two_models(WORSE, STEADY))
    assert "llama_tiny is steadier than mamba_tiny" in text(turned, "Mamba against Transformer")


def test_no_difference_in_size_is_not_called_steadiness() -> None:
    found = judge(two_models(WILD, [-x for x in reversed(WILD)]))
    assert "neither is shown to be steadier" in text(found, "Mamba against Transformer")
    one = judge(two_models(WILD[:1], STEADY[:1]))
    assert "one common seed has no interval, so neither can be called steadier" in text(
        one, "Mamba against Transformer"
    )


def test_in_context_learning_is_relative_to_the_twin() -> None:
    flat = [0.5] * 8
    records = study({("bf16", "lora"): STEADY}, base=flat)
    twin = study({("bf16", "lora"): STEADY}, model="llama_tiny", base=flat)
    for record in twin:
        if record["choices"]["precision"] == "fp32":
            record["scores"][1]["value"] = 0.75  # gain (0.75 − 0.25) / 0.25 = 2, of Mamba (0.5 − 0.25) / 0.25 = 1
    found = judge(records + twin)
    (gain,) = [g for g in found.gains if g.reference and g.twin]
    assert gain.gain.mean == pytest.approx(1.0)
    assert gain.relative is not None
    assert gain.relative.mean == pytest.approx(0.5)
    assert "50% of llama_tiny's" in text(found, "Mamba against Transformer")


# --- noise, gaps, labels ---------------------------------------------------------------------------------------------


def test_floors_by_hand() -> None:
    records = study({("bf16", "lora"): [0.0, 0.0]})
    again = run("mamba_tiny", "bf16", "lora", 0, {0: 0.252, 5: 0.501}, replicate=1)
    threads = run("mamba_tiny", "bf16", "lora", 1, {0: 0.255, 5: 0.510})
    threads["environment"]["threads"] = 1
    found = judge([*records, again, threads])
    assert {(f.kind, f.n): f.mean_abs for f in found.floors} == {
        ("replicate", 1): pytest.approx((0.2 + 0.1) / 2),  # 0.250 and 0.500 the first time
        ("threads", 1): pytest.approx(0.0),  # 0.255 and 0.510 with two threads
        ("seeds", 1): pytest.approx((0.5 + 1.0) / 2),
    }
    assert "the same cell again 0.15 points (1 pair, scores 0.375 to 0.377)" in text(found, "Noise")
    assert len(found.rows) == 1
    assert found.tables["recipes"].floor_seeds_points[0] == pytest.approx(0.75)
    assert "Not measured: the same cell again and" in text(judge(records), "Noise")


def test_what_is_missing_is_named() -> None:
    records = study({("bf16", "lora"): STEADY[:3], ("fp16", "lora"): STEADY[:2]})
    records[4] |= {"status": "oom", "error": {"type": "E", "message": "out of memory"}, "scores": [], "divergence": []}
    found = judge(records)
    said = text(found, "What is missing")
    without = "no counterpart with the same peft for seeds 0"  # the made-up study has no LoRA in full precision
    assert f"mamba_tiny · bf16 · lora: {without}, 2; oom for seed 1." in said
    assert f"mamba_tiny · fp16 · lora: {without}, 1; not run for seed 2." in said
    errors = found.tables["missing"].set_index(["recipe", "seed"]).error
    assert errors["bf16 · lora", 1] == "out of memory"


def test_scores_beyond_the_trained_length_are_labelled() -> None:
    said = text(judge(study({("bf16", "lora"): STEADY}, beyond=7)), "Beyond the trained length")
    assert "t 5-shot (7 of 1000)" in said
    assert text(judge(study({("bf16", "lora"): STEADY})), "Beyond the trained length") == ""


def test_recipes_that_share_precision_and_peft_are_told_apart_by_what_differs() -> None:
    records = study({("bf16", "lora"): STEADY})
    other = study({("bf16", "lora"): WORSE})[8:]
    for record in other:
        record["config"] = {**record["config"], "peft": {"r": 64}}
        record["id"] = record["id"][::-1]
    found = judge([*records, *other])
    assert {row.recipe.label: row.outcome(found.settings) for row in found.rows} == {
        "bf16 · lora": "equivalent",
        "bf16 · lora · peft.r=64": "worse",
    }


def test_the_order_of_the_records_does_not_matter() -> None:
    records = two_models(STEADY, WILD)
    first = judge(records)
    random.Random(0).shuffle(records)
    second = judge(records)
    assert {(s.title, line) for s in first.sections for line in s.lines} == {
        (s.title, line) for s in second.sections for line in s.lines
    }


def test_items_add_flips_and_shifts(tmp_path: Any) -> None:
    import pandas as pd

    records = synthetic.study(tmp_path, synthetic.matrix(seeds=3))
    items = {r["id"]: pd.read_parquet(tmp_path / r["name"] / "items.parquet") for r in records}
    table = judge(records, items).tables["recipes"].set_index("recipe")
    assert table.loc["bf16 · none", "flip_rate"] > 0.01
    assert table.loc["bf16 · none", "kl_nats"] == 0.0  # the made-up likelihoods are all alike
    without = judge(records).tables["recipes"]
    assert without.flip_rate.isna().all()
    assert table.difference_points.tolist() == without.difference_points.tolist()
