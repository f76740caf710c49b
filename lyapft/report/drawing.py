"""How the figures of a report look: one encoding throughout.

Colour and marker are the precision, dash and hatching the peft, a panel is a model. So a figure reads in black and
white, and a study of many cells adds panels and thin lines, never more colours.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lyapft.report.cells import Cell, choice

# Okabe and Ito's palette: distinct under the common colour-vision deficiencies.
PRECISION_STYLES = {
    "fp32": ("#000000", "circle"),
    "bf16": ("#0072B2", "square"),
    "fp16": ("#D55E00", "triangle-up"),
    "tf32": ("#009E73", "star"),
}
SPARE_STYLES = [("#CC79A7", "diamond"), ("#E69F00", "cross"), ("#56B4E9", "x")]
PEFT_STYLES = {"none": ("solid", ""), "lora": ("dash", "/"), "lora_all": ("dot", "x")}  # line dash, bar hatching
SPARE_PEFT_STYLES = [("dashdot", "."), ("longdash", "+"), ("longdashdot", "|")]

CURVE_POINTS = 400  # a longer series is drawn as the means of this many bins
PANEL_HEIGHT = 270  # pixels
LEGEND_COLUMNS, LEGEND_ROW = 6, 30  # entries to a line of a narrow window, pixels


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
    steps, values = list(x), y.astype(float).to_numpy()
    values = np.where(np.abs(values) < math.inf, values, math.nan)
    if len(steps) > points:
        frame = pd.DataFrame({"x": steps, "y": values})
        bins = frame.groupby(frame.index // math.ceil(len(frame) / points)).mean()
        steps, values = bins["x"].tolist(), bins["y"].to_numpy()
    return steps, [None if math.isnan(value) else value for value in values.tolist()]


class Panels:
    """A grid of panels that share one legend."""

    def __init__(self, rows: int, columns: int, titles: Sequence[str], legend: Iterable[Style] = ()) -> None:
        self.rows, legend = rows, list(legend)
        self.extra = LEGEND_ROW * max(0, math.ceil(len(legend) / LEGEND_COLUMNS) - 1)  # pixels, above the panels
        gap = min(0.5 / rows, 70 / (rows * PANEL_HEIGHT))
        self.figure = make_subplots(
            rows,
            columns,
            subplot_titles=[html.escape(title) for title in titles],
            vertical_spacing=gap,
            horizontal_spacing=0.09,
        )
        self.figure.update_layout(height=rows * PANEL_HEIGHT + 110 + self.extra)
        for style in legend:
            self.figure.add_scatter(
                x=[None],
                y=[None],
                name=style.name,
                legendgroup=style.name,
                mode="lines+markers",
                line={"color": style.colour, "dash": style.dash},
                marker={"symbol": style.marker, "size": 7},
            )

    def line(self, row: int, column: int, cell: Cell, style: Style, point: str = "step %{x:.0f}", **trace: Any) -> None:
        """One cell's line, in its style, paler if it did not end well; `point` says on hovering where on x it is."""
        name = f"{html.escape(cell.label)} ({cell.record['status']})"
        marker = {"symbol": style.marker, "size": 7, "color": style.colour, "maxdisplayed": 9}
        drawn = trace | {
            "type": "scatter",
            "name": style.name,
            "legendgroup": style.name,
            "showlegend": False,
            "line": {"color": style.colour, "dash": style.dash, "width": 1.8},
            "marker": marker | trace.get("marker", {}),
            "opacity": 0.9 if cell.ok else 0.45,
            "hovertemplate": f"{name}<br>{point}: %{{y:.4g}}<extra></extra>",
            "mode": "lines+markers",
        }
        self.figure.add_trace(drawn, row=row, col=column)  # of a Scatter plotly would make a second one

    def level(self, row: int, column: int, x: Sequence[float], y: float) -> None:
        """A dotted line without a name, at one height; a trace, for plotly takes longer over each further shape."""
        line = {"color": "#777", "width": 1, "dash": "dot"}
        drawn = {"type": "scatter", "mode": "lines", "x": x, "y": [y, y], "line": line, "showlegend": False}
        self.figure.add_trace(drawn | {"hoverinfo": "skip"}, row=row, col=column)

    def dress(self, x_title: str, y_titles: Sequence[str]) -> go.Figure:
        """Axis titles: x below the last row, y beside the panels of the first columns."""
        for column, title in enumerate(y_titles, start=1):
            self.figure.update_yaxes(title_text=title, col=column)
        self.figure.update_xaxes(title_text=x_title, row=self.rows)
        drawing = plain(self.figure)
        drawing.update_layout(margin_t=drawing.layout.margin.t + self.extra)
        return drawing


def plain(figure: go.Figure) -> go.Figure:
    """The common look: white, thin grid, legend above, nothing that needs colour to be read."""
    figure.update_layout(
        template="plotly_white",
        margin={"l": 70, "r": 20, "t": 66, "b": 50},
        hovermode="closest",
        font={"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13, "color": "#1a1a1a"},
        legend={"orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 0, "xanchor": "left"},
    )
    figure.update_xaxes(showline=True, linecolor="#777", ticks="outside", gridcolor="#e6e6e6", zeroline=False)
    figure.update_yaxes(showline=True, linecolor="#777", ticks="outside", gridcolor="#e6e6e6", zeroline=False)
    figure.update_xaxes(title_font_size=13, title_standoff=8)
    figure.update_yaxes(title_font_size=13, title_standoff=8)
    figure.update_annotations(font_size=13)
    return figure


def facets_of(cells: Sequence[Cell]) -> list[str]:
    """Panels of these cells, in order."""
    return list(dict.fromkeys(cell.facet for cell in cells))
