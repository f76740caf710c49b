"""How often the verdict calls a model steadier that is not: whole studies, simulated, on the verdict's own path."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import false_positives

STUDIES = 400  # benchmarks/false_positives.py has 2,000


@pytest.mark.parametrize("recipes", [(("bf16", "none"),), (("bf16", "none"), ("bf16", "lora"), ("fp32", "lora"))])
def test_of_models_that_diverge_alike_none_is_called_steadier_more_than_one_time_in_twenty(
    recipes: tuple[tuple[str, str], ...],
) -> None:
    claims = false_positives.claims(STUDIES, recipes, seeds=8, flips=(0.1, 0.1), rng=np.random.default_rng(1))
    # what a test at 6% exceeds in one run of a thousand
    assert claims <= stats.binom.ppf(0.999, STUDIES, 0.06)


def test_a_model_that_diverges_less_is_called_steadier() -> None:
    claims = false_positives.claims(
        20, (("bf16", "none"), ("bf16", "lora")), seeds=8, flips=(0.02, 0.3), rng=np.random.default_rng(2)
    )
    assert claims >= 18
