"""Nothing is left out silently: scores without a pair, seeds without either counterpart."""

from typing import Any

import numpy as np
import pytest

from lyapft.verdict import judge
from tests.test_verdict import STEADY, counterparts, study, text


def with_task(records: list[dict[str, Any]], task: str, value: float) -> None:
    for record in records:
        record["scores"].append(record["scores"][0] | {"task": task, "value": value})


def paired_again(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with their divergences made anew from their scores."""
    full = {(r["choices"]["peft"], r["seed"]): r for r in records if r["choices"]["precision"] == "fp32"}
    for record in records:
        peft, seed = record["choices"]["peft"], record["seed"]
        record["divergence"] = counterparts(record, full["none", seed], full.get((peft, seed)))
    return records


def complete() -> list[dict[str, Any]]:
    return study({("fp32", "lora"): STEADY[:3], ("bf16", "lora"): STEADY[:3]})


def of(records: list[dict[str, Any]], precision: str, peft: str) -> list[dict[str, Any]]:
    return [r for r in records if (r["choices"]["precision"], r["choices"]["peft"]) == (precision, peft)]


def test_a_score_that_only_one_side_has_is_a_gap() -> None:
    records = complete()
    assert "Nothing is missing" in text(judge(records), "What is missing")
    with_task(of(records, "bf16", "lora")[:2], "u", 0.5)
    found = judge(paired_again(records))
    assert text(found, "What is missing") == (
        "mamba_tiny · bf16 · lora: no pair of u 0-shot for seeds 0, 1, 2; "
        "no pair with full precision of the same peft of u 0-shot for seeds 0, 1, 2."
    )
    assert len(found.tables["missing"]) == 6
    assert set(found.tables["scores"].task) == {"t"}


def test_scores_that_not_every_seed_has_keep_their_row_and_are_gaps_of_the_others() -> None:
    records = complete()
    later = [record for record in records if record["seed"] > 0]
    with_task(later, "u", 0.5)
    for record in of(records, "bf16", "lora"):
        for score in record["scores"]:
            score["value"] += 0.01 * (score["task"] == "u" and record["seed"] == 1)
    found = judge(paired_again(records))
    table = found.tables["scores"].set_index(["recipe", "task", "shots"])
    own = table.loc["bf16 · lora", "u", 0]
    assert own.seeds == 2  # the first seed has none
    assert own.difference_points == pytest.approx(np.mean([1.0, 0.0]))
    assert (own.score, own.counterpart_score) == pytest.approx((0.505, 0.5))
    assert "bf16 · lora: no pair of u 0-shot for seed 0" in text(found, "What is missing")


def test_a_missing_counterpart_of_the_same_peft_is_a_gap() -> None:
    records = complete()
    lost = of(records, "bf16", "lora")[1]
    lost["divergence"][1] |= {"status": "missing", "per_score": []}
    assert text(judge(records), "What is missing") == (
        "mamba_tiny · bf16 · lora: no counterpart with the same peft for seed 1."
    )
    lost["divergence"] = lost["divergence"][:1]  # of a record that names the paper's counterpart alone
    assert "no counterpart with the same peft for seed 1" in text(judge(records), "What is missing")
    lost["divergence"] = []
    assert "bf16 · lora: no counterpart for seed 1." in text(judge(records), "What is missing")


def test_a_rerun_on_other_threads_that_failed_hides_no_seed_that_was_not_run() -> None:
    records = complete()
    last = records.pop()
    rerun = last | {"role": "rerun", "status": "failed", "scores": [], "divergence": []}
    rerun["error"] = {"type": "E", "message": "broke"}
    said = text(judge([*records, rerun]), "What is missing")
    assert said == "mamba_tiny · bf16 · lora: not run for seed 2; rerun failed for seed 2."
