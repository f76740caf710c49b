"""Figures of a study: each with its title, units and one sentence on what it shows and what it does not."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lyapft.records import accuracies, divergence_entry
from lyapft.report.cells import COUNTERPARTS, Cell, Study, choice, read
from lyapft.report.columns import score_keys
from lyapft.report.drawing import Figure, Panels, Style, facets_of, plain, style_key, styles, thin

SMOOTHING = 0.05  # loss curves: share of the steps in the running mean
LINE_LAYERS = 6  # a model with more recurrent layers has a line for its largest λ only, beside its heat map


def loss_curves(study: Study) -> Figure | None:
    """Training loss over steps, a panel per model."""
    cells = [cell for cell in study.cells if "loss" in cell.steps and len(cell.steps)]
    if not cells:
        return None
    facets, look = facets_of(cells), styles(study.cells)
    columns = min(2, len(facets))
    panels = Panels(math.ceil(len(facets) / columns), columns, facets, look.values())
    for cell in cells:
        row, column = divmod(facets.index(cell.facet), columns)
        window = max(1, round(SMOOTHING * len(cell.steps)))
        smooth = cell.steps["loss"].rolling(window, center=True, min_periods=1).mean()
        x, y = thin(cell.steps["step"].tolist(), smooth)
        panels.line(row + 1, column + 1, cell, look[style_key(cell)], x=x, y=y)
    reading = (
        "Curves that lie on each other and end level show that the formats trained alike and to the end (running mean "
        f"over {SMOOTHING:.0%} of the steps; paler: did not finish); a lower loss does not show a better score, and "
        "curves that coincide do not show that the scores do."
    )
    return Figure("Training loss", panels.dress("step", ["loss (nats/token)"]), reading)


def layer_names(cell: Cell) -> list[str]:
    """Recurrent layers in the step series of a cell, in model order."""
    return [name.removeprefix("lambda_max/") for name in cell.steps.columns if name.startswith("lambda_max/")]


def stability(study: Study) -> list[Figure]:
    """λ_max and margin over steps: lines (of few layers each, of many the largest), and a heat map per cell."""
    cells = [cell for cell in study.cells if layer_names(cell) and len(cell.steps)]
    several = [cell for cell in cells if len(layer_names(cell)) > 1]
    figures = [_stability_lines(study, cells)] if cells else []
    if several:
        figures.append(_stability_heatmaps(_worst_of_their_kind(several)))
    if ended := [cell for cell in _worst_of_their_kind(cells) if _has_spectrum(cell)]:
        figures.append(_spectra(study, ended))
    return figures


def _worst_of_their_kind(cells: Sequence[Cell]) -> list[Cell]:
    """Of the seeds of one kind the cell with the smallest margin: pictures of every seed would hide it."""
    worst: dict[tuple[str, str], Cell] = {}
    cells = [cell for cell in cells if cell.record.get("role") != "rerun"] or list(cells)
    for cell in cells:
        key = cell.facet, cell.kind
        if key not in worst or cell.steps["margin"].min() < worst[key].steps["margin"].min():
            worst[key] = cell
    return [cell for cell in cells if worst[cell.facet, cell.kind] is cell]


def _has_spectrum(cell: Cell) -> bool:
    return cell.stability is not None and bool((cell.stability["kind"] == "spectrum").any())


def _spectra(study: Study, cells: Sequence[Cell]) -> Figure:
    """All exponents of every layer at the end of the training, as a curve over their share."""
    drawn = [
        (cell, cell.stability[cell.stability["kind"] == "spectrum"]) for cell in cells if cell.stability is not None
    ]
    layers = {
        (cell.facet, layer): None for cell, table in drawn for layer in _ends(list(dict.fromkeys(table["layer"])))
    }
    rows = math.ceil(len(layers) / 2)
    look = styles(study.cells)
    used = {style_key(cell) for cell in cells}
    panels = Panels(rows, 2, [f"{facet}, {layer}" for facet, layer in layers], [look[k] for k in look if k in used])
    for index, (facet, layer) in enumerate(layers):
        for cell, table in drawn:
            own = table[table["layer"] == layer]
            if cell.facet == facet and len(own):
                y = (-own["value"].astype(float)).where(own["value"] < 0)
                panels.line(
                    index // 2 + 1, index % 2 + 1, cell, look[style_key(cell)], "share %{x:.2f}",
                    x=own["index"].tolist(), y=[None if math.isnan(v) else v for v in y],
                )  # fmt: skip
    panels.figure.update_yaxes(type="log", tickformat=".2~g", nticks=6)
    drawing = panels.dress("share of the layer's exponents, slowest first", ["−λ (nats/token)"] * 2)
    return Figure("Spectrum of the recurrent state, per layer, at the end of training", drawing, SPECTRUM_READING)


def _ends(layers: list[str]) -> list[str]:
    """All layers, or of many the first, the middle and the last."""
    return layers if len(layers) <= LINE_LAYERS else [layers[0], layers[len(layers) // 2], layers[-1]]


STABILITY_READING = (
    "Distance from 0 is what to compare: a smaller margin means a longer memory and slower forgetting of rounding "
    "errors; λ_max below 0 is no finding, since every finite Mamba weight has it, and it does not certify the outputs."
)


SPECTRUM_READING = (
    "The left end is the margin, 1/−λ the memory in tokens: a curve that was pushed down remembers, and keeps rounding "
    "errors, for longer. Curves that coincide say that fine-tuning left the recurrence as it was, not that the outputs "
    "agree. Of several seeds the one with the smallest margin is drawn."
)


def _line_columns(cell: Cell) -> dict[str, str]:
    """Panels of a cell's λ lines and the end of their column names: each layer, or only the model's largest."""
    layers = layer_names(cell)
    return {"whole model": ""} if len(layers) > LINE_LAYERS else {layer: f"/{layer}" for layer in layers}


def _stability_lines(study: Study, cells: Sequence[Cell]) -> Figure:
    rows = list(dict.fromkeys((cell.facet, name) for cell in cells for name in _line_columns(cell)))
    titles = [f"{facet}, {name}: {what}" for facet, name in rows for what in ("λ_max", "margin (log axis)")]
    look = styles(study.cells)
    used = {style_key(cell) for cell in cells}
    panels = Panels(len(rows), 2, titles, [look[key] for key in look if key in used])
    for cell in cells:
        for name, suffix in _line_columns(cell).items():
            row = rows.index((cell.facet, name)) + 1
            for column, quantity in ((1, "lambda_max"), (2, "margin")):
                x, y = thin(cell.steps["step"].tolist(), cell.steps[f"{quantity}{suffix}"])
                panels.line(row, column, cell, look[style_key(cell)], x=x, y=y)
    panels.figure.update_yaxes(tickformat=".3~g")
    panels.figure.update_yaxes(type="log", nticks=6, col=2)
    drawing = panels.dress("step", ["λ_max (nats/token)", "−λ_max (nats/token)"])
    return Figure("Stability of the recurrent state over training", drawing, STABILITY_READING)


def _stability_heatmaps(cells: Sequence[Cell]) -> Figure:
    columns = min(2, len(cells))
    rows = math.ceil(len(cells) / columns)
    panels = Panels(rows, columns, [cell.label for cell in cells])
    for index, cell in enumerate(cells):
        layers = layer_names(cell)
        grid = [thin(cell.steps["step"].tolist(), cell.steps[f"margin/{layer}"], 120) for layer in layers]
        logs = [[math.log10(v) if v is not None and v > 0 else None for v in y] for _, y in grid]
        panels.figure.add_heatmap(
            z=logs,
            x=grid[0][0],
            y=list(range(len(layers))),
            coloraxis="coloraxis",
            text=_rows(layers, len(grid[0][0])),
            hovertemplate="%{text}<br>step %{x}: margin 10^%{z:.2f}<extra></extra>",
            row=index // columns + 1,
            col=index % columns + 1,
        )
    panels.figure.update_layout(
        coloraxis={"colorscale": "Cividis", "colorbar": {"title": "log₁₀ margin<br>(nats/token)"}}
    )
    drawing = panels.dress("step", ["recurrent layer"])
    drawing.update_layout(margin_t=60)
    if max(len(layer_names(cell)) for cell in cells) <= 12:
        drawing.update_yaxes(dtick=1)  # layers are whole numbers
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
    panels.figure.update_yaxes(range=[-0.03, 1.05])
    panels.figure.update_xaxes(tickvals=shots)
    drawing = panels.dress("shots in the prompt", ["accuracy (fraction right)"])
    counts = sorted({int(score["n"]) for cell in cells for score in cell.record["scores"]})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    several = len({cell.record.get("seed") for cell in cells}) > 1
    bars = "bars: lowest to highest seed around the seeds' mean" if several else "bars: 95% over items"
    longer = any(_beyond(cell) for cell in cells)
    bars += ", hollow: items beyond the trained length, which also measure extrapolation" * longer
    reading = (
        f"A rise from left to right is in-context learning ({bars}, {n} items per point, drawn side by side); "
        "overlapping bars do not show that two cells agree, because cells answer the same items: compare them below, "
        "in pairs."
    )
    return Figure("Scores against shots", drawing, reading)


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


def _beyond(cell: Cell) -> bool:
    """Whether any score of a cell is of items that are longer than what its base model was trained on."""
    return any(score.get("beyond_trained_length") for score in accuracies(cell.record))


def _open(marker: str, beyond: bool) -> str:
    """The marker of a score, hollow where it also measures extrapolation."""
    return f"{marker}-open" if beyond else marker


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
                beyond=any(_beyond(cell) for cell, _ in own),
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
    marks += "; † some items beyond the trained length" * any(_beyond(cell) for cell in study.cells)
    return (
        f"A long bar names a cell to look at ({marks}; {grain}); it is no finding by itself, because "
        "an absolute difference is above 0 even under pure noise: judge it beside reruns."
    )


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
