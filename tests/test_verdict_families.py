"""What counts once, and which tests share an error rate: by hand, and by SciPy."""

from typing import Any

import numpy as np
import pytest

from lyapft.verdict import judge
from tests.test_verdict import STEADY, WILD, WORSE, study, text

LITTLE = [0.3, -0.2, 0.1, -0.1, 0.2, -0.3, 0.1, -0.2]


def adapting(records: list[dict[str, Any]], layers: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """The records with the layers that each peft adapts."""
    for record in records:
        peft = record["choices"]["peft"]
        if peft in layers:
            record["peft"]["coverage"] = {name: {"adapted": n, "present": 2} for name, n in layers[peft].items()}
            record["config"] = record["config"] | {"peft": {"name": peft, "targets": peft, "r": 8}}
    return records


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
    assert "mean over the 2 recipes that both have, each counted once" in said
    assert len([one for one in found.contrasts if one.counterpart == "paper"]) == 4  # its own row stays
