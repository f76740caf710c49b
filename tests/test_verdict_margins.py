"""Stability margins by recipe: ranges of the runs, differences seed by seed, tests that count once."""

import numpy as np
import pytest
from scipy import stats

from lyapft.verdict import judge
from tests.test_verdict import STEADY, study

NOISE = [0.1, -0.2, 0.3, 0.0, -0.1, 0.2, -0.3, 0.15]  # by seed


def test_margins_are_compared_with_those_of_full_precision_seed_by_seed() -> None:
    records = study({("bf16", "lora"): STEADY, ("fp16", "lora"): STEADY})
    means = {"fp32": 3e-3, "bf16": 2e-3, "fp16": 3.1e-3}
    for record in records:
        precision, seed = record["choices"]["precision"], record["seed"]
        own = NOISE[seed] if precision == "fp32" else 0.5 * NOISE[-1 - seed]
        record["stability"] = {"margin": means[precision] + 1e-3 * own}
    table = judge(records).tables["stability"].set_index("recipe")
    margins = {
        p: np.array([r["stability"]["margin"] for r in records if r["choices"]["precision"] == p]) for p in means
    }
    p = {form: stats.ttest_rel(margins[form], margins["fp32"]).pvalue for form in ("bf16", "fp16")}
    assert p["bf16"] < p["fp16"]
    expected = {"bf16": min(1.0, 2 * p["bf16"]), "fp16": max(min(1.0, 2 * p["bf16"]), p["fp16"])}  # Holm by hand
    for form in ("bf16", "fp16"):
        row = table.loc[f"{form} · lora"]
        assert (row["lowest_margin"], row["highest_margin"]) == (margins[form].min(), margins[form].max())
        assert row["difference"] == pytest.approx((margins[form] - margins["fp32"]).mean())
        assert row["p_different"] == pytest.approx(expected[form])
    own = table.loc["fp32 · none"]
    assert np.isnan(own["difference"])
    assert own["margin"] == pytest.approx(margins["fp32"].mean())


def test_a_study_of_transformers_has_no_table_of_margins() -> None:
    assert "stability" not in judge(study({("bf16", "lora"): STEADY}, model="llama_tiny")).tables
