"""How far cells lie from their full-precision counterparts, with intervals, tests and noise floors.

`pairs` and `items` compare one cell with one counterpart; `estimates` and `decisions` take one value per seed; `icl`
measures in-context learning. All of it is pure: numbers and tables in, numbers out.
"""

from lyapft.divergence.decisions import (
    ALPHA,
    MARGIN_POINTS,
    POWER,
    Comparison,
    Outcome,
    RankTest,
    adjusted,
    compare,
    compare_each,
    holm,
    p_different,
    p_equivalent,
    p_outside,
    power_equivalent,
    power_outside,
    rank_test,
    seeds_to_decide,
)
from lyapft.divergence.estimates import (
    BCA_COVERAGE,
    FEW_SEEDS,
    Estimate,
    bca_coverage,
    bca_interval,
    by_size,
    estimate,
    ratio_of_means,
    t_interval,
)
from lyapft.divergence.icl import ShotScores, icl_gains, shot_scores
from lyapft.divergence.items import AnswerShift, Flips, answer_shift, item_flips
from lyapft.divergence.pairs import (
    SPIKE_POINTS,
    Divergence,
    ScoreDivergence,
    against_counterparts,
    is_spike,
    paired_divergence,
)

__all__ = [
    "ALPHA",
    "BCA_COVERAGE",
    "FEW_SEEDS",
    "MARGIN_POINTS",
    "POWER",
    "SPIKE_POINTS",
    "AnswerShift",
    "Comparison",
    "Divergence",
    "Estimate",
    "Flips",
    "Outcome",
    "RankTest",
    "ScoreDivergence",
    "ShotScores",
    "adjusted",
    "against_counterparts",
    "answer_shift",
    "bca_coverage",
    "bca_interval",
    "by_size",
    "compare",
    "compare_each",
    "estimate",
    "holm",
    "icl_gains",
    "is_spike",
    "item_flips",
    "p_different",
    "p_equivalent",
    "p_outside",
    "paired_divergence",
    "power_equivalent",
    "power_outside",
    "rank_test",
    "ratio_of_means",
    "seeds_to_decide",
    "shot_scores",
    "t_interval",
]
