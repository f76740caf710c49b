"""Figures of a study: each with its title, units and one sentence on what it shows and what it does not.

One encoding throughout: colour and marker are the precision, dash and hatching the peft, a panel is a model. So a figure
reads in black and white, and a study of many cells adds panels and thin lines, never more colours.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lyapft.report.cells import COUNTERPARTS, Cell, Study, choice, divergence_entry, read
from lyapft.report.tables import score_keys

# Okabe and Ito's palette: distinct under the common colour-vision deficiencies.
PRECISION_STYLES = {
    "fp32": ("#000000", "circle"),
    "bf16": ("#0072B2", "square"),
    "fp16": ("#D55E00", "triangle-up"),
    "tf32": ("#009E73", "star"),
}
SPARE_STYLES = [("#CC79A7", "diamond"), ("#E69F00", "cross"), ("#56B4E9", "x")]
PEFT_STYLES = {"none": ("solid", ""), "lora": ("dash", "/")}  # line dash, bar hatching
SPARE_PEFT_STYLES = [("dot", "x"), ("dashdot", "."), ("longdash", "+")]

CURVE_POINTS = 400  # a longer series is drawn as the means of this many bins
SMOOTHING = 0.05  # loss curves: share of the steps in the running mean
LINE_LAYERS = 6  # a model with more recurrent layers is drawn as one heatmap per cell
PANEL_HEIGHT = 270  # pixels


@dataclass(frozen=True)
class Style:
    """How the cells of one (precision, peft) are drawn."""

    name: str
    colour: str
    marker: str
    dash: str
    hatch: str


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading and the sentence below it."""

    title: str
    drawing: go.Figure
    reading: str


def styles(cells: Sequence[Cell]) -> dict[tuple[str, str], Style]:
    """A style per (precision, peft) of the study; choices beyond the known ones take the spare styles in turn."""
    keys = list(dict.fromkeys(style_key(cell) for cell in cells))
    colours, dashes = dict(PRECISION_STYLES), dict(PEFT_STYLES)
    for precision, peft in keys:
        if precision not in colours:
            colours[precision] = SPARE_STYLES[len(colours) % len(SPARE_STYLES)]
        if peft not in dashes:
            dashes[peft] = SPARE_PEFT_STYLES[len(dashes) % len(SPARE_PEFT_STYLES)]
    return {
        (precision, peft): Style(html.escape(f"{precision} · {peft}"), *colours[precision], *dashes[peft])
        for precision, peft in keys
    }


def style_key(cell: Cell) -> tuple[str, str]:
    """What decides a cell's style."""
    return choice(cell.record, "precision"), choice(cell.record, "peft")


def thin(x: Sequence[float], y: pd.Series, points: int = CURVE_POINTS) -> tuple[list[float], list[float | None]]:
    """Means of at most `points` bins of neighbouring steps; a bin without a finite number is a gap."""
    finite = y.astype(float).where(y.abs() < math.inf)
    size = math.ceil(len(finite) / points)
    frame = pd.DataFrame({"x": list(x), "y": finite.to_list()})
    bins = frame.groupby(frame.index // max(size, 1)).mean()
    return bins["x"].tolist(), [None if math.isnan(value) else value for value in bins["y"]]


class Panels:
    """A grid of panels that share one legend."""

    def __init__(self, rows: int, columns: int, titles: Sequence[str], **options: object) -> None:
        gap = min(0.5 / rows, 70 / (rows * PANEL_HEIGHT))
        self.figure = make_subplots(
            rows, columns, subplot_titles=[html.escape(title) for title in titles], vertical_spacing=gap,
            horizontal_spacing=0.09, **options,
        )  # fmt: skip
        self.figure.update_layout(height=rows * PANEL_HEIGHT + 110)
        self._in_legend: set[str] = set()

    def line(self, row: int, column: int, cell: Cell, style: Style, **trace: object) -> None:
        """One cell's line, in its style; a cell that did not end well is paler."""
        self.figure.add_scatter(
            row=row, col=column, name=style.name, legendgroup=style.name, showlegend=style.name not in self._in_legend,
            line={"color": style.colour, "dash": style.dash, "width": 1.8},
            marker={"symbol": style.marker, "size": 7, "color": style.colour, "maxdisplayed": 9},
            opacity=0.9 if cell.ok else 0.45,
            hovertemplate=f"{html.escape(cell.label)} ({cell.record['status']})<br>%{{x}}: %{{y:.4g}}<extra></extra>",
            mode="lines+markers", **trace,
        )  # fmt: skip
        self._in_legend.add(style.name)

    def dress(self, x_title: str, y_titles: Sequence[str]) -> go.Figure:
        """Axis titles: x below the last row, y beside every panel of its column (the last one given repeats)."""
        rows, columns = self.figure._get_subplot_rows_columns()
        for row in rows:
            for column in columns:
                title = y_titles[min(column, len(y_titles)) - 1] if column <= len(y_titles) else None
                self.figure.update_yaxes(title_text=title, row=row, col=column)
                self.figure.update_xaxes(title_text=x_title if row == rows[-1] else None, row=row, col=column)
        return plain(self.figure)


def plain(figure: go.Figure) -> go.Figure:
    """The common look: white, thin grid, legend above, nothing that needs colour to be read."""
    figure.update_layout(
        template="plotly_white", margin={"l": 70, "r": 20, "t": 90, "b": 55}, hovermode="closest",
        font={"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13, "color": "#1a1a1a"},
        legend={"orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 0, "xanchor": "left"},
    )  # fmt: skip
    figure.update_xaxes(showline=True, linecolor="#777", ticks="outside", gridcolor="#e6e6e6", zeroline=False)
    figure.update_yaxes(showline=True, linecolor="#777", ticks="outside", gridcolor="#e6e6e6", zeroline=False)
    figure.update_annotations(font_size=13)
    return figure


def _facets(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.facet for cell in cells))


def loss_curves(study: Study) -> Figure | None:
    """Training loss over steps, a panel per model."""
    cells = [cell for cell in study.cells if "loss" in cell.steps and len(cell.steps)]
    if not cells:
        return None
    facets, look = _facets(cells), styles(study.cells)
    columns = min(2, len(facets))
    panels = Panels(math.ceil(len(facets) / columns), columns, facets)
    for cell in cells:
        row, column = divmod(facets.index(cell.facet), columns)
        window = max(1, round(SMOOTHING * len(cell.steps)))
        smooth = cell.steps["loss"].rolling(window, center=True, min_periods=1).mean()
        x, y = thin(cell.steps["step"].tolist(), smooth)
        panels.line(row + 1, column + 1, cell, look[style_key(cell)], x=x, y=y)
    reading = (
        f"Curves that lie on each other and end level show that the formats trained alike and to the end "
        f"(running mean over {SMOOTHING:.0%} of the steps; paler: not finished); a lower loss does not show a better score, "
        "and curves that coincide do not show that the scores do."
    )
    return Figure("Training loss", panels.dress("step", ["cross-entropy (nats per target token)"]), reading)


def layer_names(cell: Cell) -> list[str]:
    """Recurrent layers in the step series of a cell, in model order."""
    return [name.removeprefix("lambda_max/") for name in cell.steps.columns if name.startswith("lambda_max/")]


def stability(study: Study) -> list[Figure]:
    """λ_max and margin over steps: lines per layer for few layers, a heatmap per cell for many."""
    cells = [cell for cell in study.cells if layer_names(cell) and len(cell.steps)]
    few = [cell for cell in cells if len(layer_names(cell)) <= LINE_LAYERS]
    many = [cell for cell in cells if len(layer_names(cell)) > LINE_LAYERS]
    figures = [_stability_lines(study, few)] if few else []
    if many:
        figures.append(_stability_heatmaps(many))
    return figures


STABILITY_READING = (
    "Distance from 0 is what to compare: a smaller margin means a longer memory and slower forgetting of rounding errors; "
    "λ_max below 0 is no finding, since every finite Mamba weight has it, and it does not certify the outputs."
)


def _stability_lines(study: Study, cells: Sequence[Cell]) -> Figure:
    rows = list(dict.fromkeys((cell.facet, layer) for cell in cells for layer in layer_names(cell)))
    titles = [f"{facet}, {layer}: {what}" for facet, layer in rows for what in ("λ_max", "margin (log axis)")]
    panels, look = Panels(len(rows), 2, titles), styles(study.cells)
    for cell in cells:
        for layer in layer_names(cell):
            row = rows.index((cell.facet, layer)) + 1
            for column, quantity in ((1, "lambda_max"), (2, "margin")):
                x, y = thin(cell.steps["step"].tolist(), cell.steps[f"{quantity}/{layer}"])
                panels.line(row, column, cell, look[style_key(cell)], x=x, y=y)
    panels.figure.update_yaxes(type="log", dtick="D2", col=2)
    drawing = panels.dress("step", ["λ_max (nats/token)", "−λ_max (nats/token)"])
    return Figure("Stability of the recurrent state over training, layer by layer", drawing, STABILITY_READING)


def _stability_heatmaps(cells: Sequence[Cell]) -> Figure:
    columns = min(2, len(cells))
    rows = math.ceil(len(cells) / columns)
    panels = Panels(rows, columns, [cell.label for cell in cells])
    for index, cell in enumerate(cells):
        layers = layer_names(cell)
        grid = [thin(cell.steps["step"].tolist(), cell.steps[f"margin/{layer}"], 120) for layer in layers]
        logs = [[math.log10(v) if v is not None and v > 0 else None for v in y] for _, y in grid]
        panels.figure.add_heatmap(
            z=logs, x=grid[0][0], y=list(range(len(layers))), coloraxis="coloraxis", text=_rows(layers, len(grid[0][0])),
            hovertemplate="%{text}<br>step %{x}: margin 10^%{z:.2f}<extra></extra>",
            row=index // columns + 1, col=index % columns + 1,
        )  # fmt: skip
    panels.figure.update_layout(coloraxis={"colorscale": "Cividis", "colorbar": {"title": "log₁₀ margin<br>(nats/token)"}})
    drawing = panels.dress("step", ["recurrent layer"])
    drawing.update_layout(margin_t=60)
    return Figure("Margin −λ_max of every recurrent layer over training", drawing, STABILITY_READING)


def _rows(layers: Sequence[str], width: int) -> list[list[str]]:
    return [[html.escape(layer)] * width for layer in layers]


def scores_against_shots(study: Study) -> Figure | None:
    """Accuracy against the number of shots: a row per model, a column per task."""
    cells = [cell for cell in study.cells if cell.record.get("scores")]
    if not cells:
        return None
    keys = score_keys([cell.record for cell in cells])
    tasks, shots = list(dict.fromkeys(task for task, _ in keys)), sorted({count for _, count in keys})
    facets, look = _facets(cells), styles(study.cells)
    panels = Panels(len(facets), len(tasks), [f"{facet}: {task}" for facet in facets for task in tasks])
    spread = 0.02 * (max(shots) - min(shots) or 1)  # side by side, so that error bars do not hide each other
    for cell in cells:
        style = look[style_key(cell)]
        shift = spread * (list(look).index(style_key(cell)) - (len(look) - 1) / 2)
        for task in tasks:
            own = sorted((s for s in cell.record["scores"] if s["task"] == task), key=lambda s: int(s["shots"]))
            if not own:
                continue
            interval = {"type": "data", "array": [1.96 * (s.get("stderr") or 0) for s in own], "thickness": 1, "width": 3}
            panels.line(
                facets.index(cell.facet) + 1, tasks.index(task) + 1, cell, style,
                x=[s["shots"] + shift for s in own], y=[s["value"] for s in own], error_y=interval,
                text=[f"n = {s['n']}" for s in own],
            )  # fmt: skip
    panels.figure.update_yaxes(range=[-0.03, 1.05])
    panels.figure.update_xaxes(tickvals=shots)
    drawing = panels.dress("shots in the prompt", ["accuracy (fraction right)"])
    counts = sorted({int(score["n"]) for cell in cells for score in cell.record["scores"]})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    reading = (
        f"A rise from left to right is in-context learning (bars: 95% over items, {n} per point, drawn side by side); "
        "overlapping bars do not show that two cells agree, because cells answer the same items: compare them below, in pairs."
    )
    return Figure("Scores against shots", drawing, reading)


def divergence_bars(study: Study) -> Figure | None:
    """Mean absolute divergence from each counterpart, a bar per kind of cell."""
    entries = {
        name: [(c, e) for c in study.cells if (e := divergence_entry(c.record, name)) and e.get("status") == "ok"]
        for name in COUNTERPARTS
    }
    kinds = list(dict.fromkeys(cell.kind for pairs in entries.values() for cell, _ in pairs))
    if not kinds:
        return None
    widest = max(s["abs_points"] for pairs in entries.values() for _, e in pairs for s in e["per_score"])
    titles = [f"against {COUNTERPARTS[name]} fine-tuning" for name in COUNTERPARTS]
    drawing = make_subplots(1, len(COUNTERPARTS), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    look = styles(study.cells)
    for column, pairs in enumerate(entries.values(), start=1):
        for kind in kinds:
            _bar(drawing, column, kind, [(c, e) for c, e in pairs if c.kind == kind], look, 1.06 * widest or 1.0)
    drawing.update_xaxes(title_text="mean |difference| (percentage points)", range=[0, (1.75 * widest) or 1.0])
    drawing.update_yaxes(categoryorder="array", categoryarray=[html.escape(kind) for kind in kinds[::-1]], automargin=True)
    plain(drawing)
    drawing.update_layout(height=34 * len(kinds) + 150, bargap=0.35, showlegend=False, margin_t=50)
    return Figure("Divergence from full precision", drawing, _divergence_reading(study))


def _bar(
    drawing: go.Figure, column: int, kind: str, pairs: Sequence[tuple[Cell, dict]], look: dict, note_x: float
) -> None:
    """A kind's bar, the points it is the mean of, and in words what it rests on."""
    if not pairs:
        return
    style: Style = look[style_key(pairs[0][0])]
    y = html.escape(kind)
    means = [float(entry["mean_abs_points"]) for _, entry in pairs]
    mean = math.fsum(means) / len(means)
    seeds = len({cell.record.get("seed") for cell, _ in pairs})
    if seeds == 1:
        points = [float(score["abs_points"]) for _, entry in pairs for score in entry["per_score"]]
        note = f"<b>{mean:.2f}</b>  n = {len(points)} scores, one seed: no interval"
    else:
        points = means
        note = f"<b>{mean:.2f}</b>  n = {seeds} seeds: {min(means):.2f} to {max(means):.2f}"
    drawing.add_bar(
        x=[mean], y=[y], orientation="h", row=1, col=column, name=style.name,
        marker={"color": style.colour, "opacity": 0.75, "line": {"color": style.colour, "width": 1},
                "pattern": {"shape": style.hatch, "fgcolor": "#fff", "size": 7, "solidity": 0.35}},
        hovertemplate=f"{y}: %{{x:.3f}} points<extra></extra>",
    )  # fmt: skip
    drawing.add_scatter(
        x=points, y=[y] * len(points), mode="markers", row=1, col=column, hovertemplate="%{x:.3f} points<extra></extra>",
        marker={"symbol": f"{style.marker}-open", "size": 8, "color": "#444", "line": {"width": 1.4}},
    )  # fmt: skip
    drawing.add_scatter(
        x=[note_x], y=[y], mode="text", text=[note], textposition="middle right", row=1, col=column, hoverinfo="skip",
        textfont={"size": 11.5}, cliponaxis=False,
    )  # fmt: skip


def _divergence_reading(study: Study) -> str:
    counts = [int(score["n"]) for cell in study.cells for score in cell.record.get("scores") or []]
    grain = f"one answer is worth {100 / min(counts):.2f} points where n = {min(counts)}" if counts else ""
    several = len({cell.record.get("seed") for cell in study.cells}) > 1
    marks = "open marks: the scores, or with several seeds each seed's mean" if several else "open marks: the single scores"
    return (
        f"A long bar names a cell to look at ({marks}; {grain}); it is no finding by itself, because an absolute difference "
        "is above 0 even under pure noise: judge it beside reruns with other seeds."
    )


def not_recurrent(study: Study) -> list[str]:
    """Why cells have no λ, once per reason: 'llama_tiny: attention has …'."""
    reasons = {
        f"{choice(cell.record, 'model')}: {reason}"
        for cell in study.cells
        if (reason := read(cell.record, "stability", "not_applicable"))
    }
    return sorted(reasons)


def all_figures(study: Study) -> list[Figure]:
    """Every figure that the study has numbers for, in reading order."""
    makers: list[Callable[[Study], Figure | None]] = [scores_against_shots, divergence_bars, loss_curves]
    return [figure for make in makers if (figure := make(study))] + stability(study)
