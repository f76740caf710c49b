"""Figures of a study: each with its title, units and one sentence on what it shows and what it does not."""

from collections.abc import Callable, Sequence

from lyapft.report.cells import Study, choice, read
from lyapft.report.drawing import Figure
from lyapft.report.figures.bars import divergence_bars, points_per_answer
from lyapft.report.figures.curves import layer_names, loss_curves, stability
from lyapft.report.figures.scores import scores_against_shots

__all__ = [
    "divergence_bars",
    "layer_names",
    "loss_curves",
    "not_recurrent",
    "points_per_answer",
    "score_figures",
    "scores_against_shots",
    "stability",
    "training_figures",
]


def not_recurrent(study: Study) -> list[str]:
    """Why cells have no λ, once per reason: 'llama_tiny: attention has …'."""
    reasons = {
        f"{choice(cell.record, 'model')}: {reason}"
        for cell in study.cells
        if (reason := read(cell.record, "stability", "not_applicable"))
    }
    return sorted(reasons)


def _made(makers: Sequence[Callable[[Study], Figure | None]], study: Study) -> list[Figure]:
    return [figure for make in makers if (figure := make(study))]


def score_figures(study: Study) -> list[Figure]:
    """What the cells can do, and how far that is from full precision; none where no cell has scores."""
    return _made([scores_against_shots, divergence_bars], study)


def training_figures(study: Study) -> list[Figure]:
    """What happened during training; none where no cell has a step yet."""
    return _made([loss_curves], study) + stability(study)
