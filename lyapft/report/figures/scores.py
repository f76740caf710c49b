"""What cells can do: accuracy against the number of shots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lyapft.records import accuracies
from lyapft.report.cells import Cell, Study
from lyapft.report.columns import score_keys
from lyapft.report.drawing import Figure, Panels, facets_of, style_key, styles


def scores_against_shots(study: Study) -> Figure | None:
    """Accuracy against the number of shots: a row per model, a column per task."""
    scored = [cell for cell in study.cells if cell.record.get("scores")]
    cells = [
        cell for cell in scored if cell.record.get("role") != "rerun"
    ]  # one seed of a recipe, drawn beside its mean
    if not cells:
        return None
    keys = score_keys([cell.record for cell in cells])
    tasks, shots = list(dict.fromkeys(task for task, _ in keys)), sorted({count for _, count in keys})
    facets, look = facets_of(cells), styles(study.cells)
    panels = Panels(len(facets), len(tasks), [f"{facet}: {task}" for facet in facets for task in tasks], look.values())
    spread = 0.02 * (max(shots) - min(shots) or 1)  # side by side, so that error bars do not hide each other
    for kind in dict.fromkeys(cell.kind for cell in cells):
        seeds = [cell for cell in cells if cell.kind == kind]
        place = list(look).index(style_key(seeds[0]))
        shift = spread * (place - (len(look) - 1) / 2)
        for task in tasks:
            own = [point for count in shots if (point := _score_point(seeds, task, count))]
            panels.line(
                facets.index(seeds[0].facet) + 1,
                tasks.index(task) + 1,
                seeds[0],
                look[style_key(seeds[0])],
                point="%{text}",
                x=[point.shots + shift for point in own],
                y=[point.mean for point in own],
                text=[point.note for point in own],
                marker={"symbol": [_open(look[style_key(seeds[0])].marker, point.beyond) for point in own]},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [point.above for point in own],
                    "arrayminus": [point.below for point in own],
                    "thickness": 1,
                    "width": 3,
                },
            )
    guesses = _guesses(cells)
    for (facet, task), guess in guesses.items():
        panels.level(facets.index(facet) + 1, tasks.index(task) + 1, [shots[0] - spread, shots[-1] + spread], guess)
    panels.figure.update_yaxes(range=[-0.03, 1.05])
    panels.figure.update_xaxes(tickvals=shots)
    drawing = panels.dress("shots in the prompt", ["accuracy (fraction right)"])
    counts = sorted({int(score["n"]) for cell in cells for score in cell.record["scores"]})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    several = len({cell.record.get("seed") for cell in cells}) > 1
    bars = "bars: lowest to highest seed around the seeds' mean" if several else "bars: 95% over items"
    longer = any(has_longer(cell) for cell in cells)
    bars += ", hollow: items beyond the trained length, which also measure extrapolation" * longer
    bars += ", dotted: a blind guess" * bool(guesses)
    reading = (
        f"A rise from left to right is in-context learning ({bars}, {n} items per point, drawn side by side); "
        "overlapping bars do not show that two cells agree, because cells answer the same items: compare them below, "
        f"in pairs.{' Reruns for the noise floor are left out.' * (len(cells) < len(scored))}"
    )
    return Figure("Scores against shots", drawing, reading)


def _guesses(cells: Sequence[Cell]) -> dict[tuple[str, str], float]:
    """The accuracy of a blind guess by facet and task, where records have it."""
    return {
        (cell.facet, str(score["task"])): float(score["chance"])
        for cell in cells
        for score in accuracies(cell.record)
        if score.get("chance")
    }


@dataclass(frozen=True)
class _ScorePoint:
    """The mean over seeds of one score, and how far the bar around it reaches."""

    shots: int
    mean: float
    above: float
    below: float
    note: str
    beyond: bool  # whether items are longer than the sequences that the base model was trained on


def _score_point(seeds: Sequence[Cell], task: str, shots: int) -> _ScorePoint | None:
    """With one seed the bar is the 95% interval over items, with several the range of the seeds."""
    found = [
        score for cell in seeds for score in accuracies(cell.record) if (score["task"], score["shots"]) == (task, shots)
    ]
    if not found:
        return None
    values = [float(score["value"]) for score in found]
    mean = math.fsum(values) / len(values)
    half = 1.96 * float(found[0].get("stderr") or 0.0)
    above, below = (half, half) if len(values) == 1 else (max(values) - mean, mean - min(values))
    longer = max(int(score.get("beyond_trained_length") or 0) for score in found)
    note = f"{shots}-shot, n = {found[0]['n']} items, seeds: {len(values)}"
    note += f", {longer} items beyond the trained length" if longer else ""
    return _ScorePoint(shots, mean, above, below, note, longer > 0)


def has_longer(cell: Cell) -> bool:
    """Whether any score of a cell is of items that are longer than what its base model was trained on."""
    return any(score.get("beyond_trained_length") for score in accuracies(cell.record))


def _open(marker: str, beyond: bool) -> str:
    """The marker of a score, hollow where it also measures extrapolation."""
    return f"{marker}-open" if beyond else marker
