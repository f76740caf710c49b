"""How far cells lie from full precision: a bar per kind of cell."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lyapft.records import accuracies, divergence_entry
from lyapft.report.cells import COUNTERPARTS, Cell, Study
from lyapft.report.drawing import Figure, Style, plain, style_key, styles
from lyapft.report.figures.scores import has_longer


@dataclass(frozen=True)
class _Bar:
    """A kind's mean absolute divergence (points), what it is the mean of, and how many seeds it rests on."""

    kind: str
    style: Style
    mean: float
    points: list[float]
    seeds: int
    score: float  # mean over seeds, tasks and shots, fraction
    counterpart_score: float
    beyond: bool

    @property
    def note(self) -> str:
        """The figure in words, with its n and the raw scores behind it."""
        n = f"1 seed, n = {len(self.points)}" if self.seeds == 1 else f"{self.seeds} seeds"
        mark = " †" if self.beyond else ""
        return f"<b>{self.mean:.2f}</b> ({n})<br>{self.score:.3f} against {self.counterpart_score:.3f}{mark}"


def _bars(study: Study, counterpart: str) -> list[_Bar]:
    """A bar per kind of cell that has a divergence from this counterpart."""
    entries = [
        (c, e) for c in study.cells if (e := divergence_entry(c.record, counterpart)) and e.get("status") == "ok"
    ]
    look, bars = styles(study.cells), []
    for kind in dict.fromkeys(cell.kind for cell, _ in entries):
        own = [(cell, entry) for cell, entry in entries if cell.kind == kind]
        means = [float(entry["mean_abs_points"]) for _, entry in own]
        single = [float(score["abs_points"]) for _, entry in own for score in entry["per_score"]]
        style, mean = look[style_key(own[0][0])], math.fsum(means) / len(means)
        bars.append(
            _Bar(
                kind=kind,
                style=style,
                mean=mean,
                points=single if len(own) == 1 else means,
                seeds=len(own),
                **_raw(own),
                beyond=any(has_longer(cell) for cell, _ in own),
            )
        )
    return bars


def _raw(own: Sequence[tuple[Cell, Mapping[str, Any]]]) -> dict[str, float]:
    """Mean scores of the cells and of their counterparts, on the scores that are compared.

    A counterpart's score is the cell's less the difference, so that it need not be among the cells that are shown.
    """
    ours, theirs = [], []
    for cell, entry in own:
        values = {(score["task"], score["shots"]): float(score["value"]) for score in accuracies(cell.record)}
        for score in entry["per_score"]:
            ours.append(values[score["task"], score["shots"]])
            theirs.append(ours[-1] - float(score["signed_points"]) / 100)
    return {"score": math.fsum(ours) / len(ours), "counterpart_score": math.fsum(theirs) / len(theirs)}


def divergence_bars(study: Study) -> Figure | None:
    """Mean absolute divergence from each counterpart, a bar per kind of cell."""
    bars = {name: _bars(study, name) for name in COUNTERPARTS}
    present = {bar.kind for own in bars.values() for bar in own}
    kinds = [kind for kind in dict.fromkeys(cell.kind for cell in study.cells) if kind in present]
    if not kinds:
        return None
    widest = max(max(*bar.points, bar.mean) for own in bars.values() for bar in own) or 1.0
    titles = [f"from {name}" for name in COUNTERPARTS.values()]
    drawing = make_subplots(1, len(COUNTERPARTS), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    for column, (name, own) in enumerate(bars.items(), start=1):
        for bar in own:
            _draw_bar(drawing, column, bar)
            _note(drawing, column, bar.kind, 1.06 * widest, bar.note)
        for kind in sorted(_own_counterparts(study, name) & present):
            _note(drawing, column, kind, 0.01 * widest, "its own counterpart")
    rows = [html.escape(kind) for kind in kinds[::-1]]
    drawing.update_xaxes(title_text="mean |difference| (percentage points)", range=[0, 1.5 * widest])
    drawing.update_yaxes(categoryorder="array", categoryarray=rows, range=[-0.6, len(rows) - 0.4], automargin=True)
    plain(drawing)
    drawing.update_layout(height=36 * len(kinds) + 110, bargap=0.35, showlegend=False, margin_t=34)
    return Figure("Divergence from full precision", drawing, _divergence_reading(study))


def _draw_bar(drawing: go.Figure, column: int, bar: _Bar) -> None:
    y, style = html.escape(bar.kind), bar.style
    drawing.add_bar(
        x=[bar.mean],
        y=[y],
        orientation="h",
        row=1,
        col=column,
        marker={
            "color": style.colour,
            "opacity": 0.75,
            "line": {"color": style.colour, "width": 1},
            "pattern": {"shape": style.hatch, "fgcolor": "#fff", "size": 7, "solidity": 0.35},
        },
        hovertemplate=f"{y}: %{{x:.3f}} points<extra></extra>",
    )
    drawing.add_scatter(
        x=bar.points,
        y=[y] * len(bar.points),
        mode="markers",
        row=1,
        col=column,
        marker={"symbol": style.marker, "size": 8, "color": "#fff", "line": {"width": 1.3, "color": "#222"}},
        hovertemplate="%{x:.3f} points<extra></extra>",
    )


def _note(drawing: go.Figure, column: int, kind: str, x: float, text: str) -> None:
    """Words beside a bar, or where there is none."""
    drawing.add_scatter(
        x=[x],
        y=[html.escape(kind)],
        mode="text",
        text=[text],
        textposition="middle right",
        row=1,
        col=column,
        hoverinfo="skip",
        textfont={"size": 11, "color": "#444"},
        cliponaxis=False,
    )


def _own_counterparts(study: Study, counterpart: str) -> set[str]:
    """Kinds of cell that are themselves this counterpart."""
    entries = [(cell.kind, divergence_entry(cell.record, counterpart)) for cell in study.cells]
    return {kind for kind, entry in entries if entry and entry.get("status") == "self"}


def points_per_answer(study: Study) -> float:
    """What one answer is worth in percentage points where a score has the fewest items; 0 without scores."""
    counts = [int(score["n"]) for cell in study.cells for score in cell.record.get("scores") or []]
    return 100.0 / min(counts) if counts else 0.0


def _divergence_reading(study: Study) -> str:
    several = len({cell.record.get("seed") for cell in study.cells}) > 1
    one, many = (
        "white marks: its n scores; one seed: no interval",
        "white marks: the seeds' means; no interval is computed",
    )
    grain = f"one answer is worth up to {points_per_answer(study):.2f} points"
    marks = many if several else one
    marks += "; † some items beyond the trained length" * any(has_longer(cell) for cell in study.cells)
    return (
        f"A long bar names a cell to look at ({marks}; {grain}); it is no finding by itself, because "
        "an absolute difference is above 0 even under pure noise: judge it beside reruns."
    )
