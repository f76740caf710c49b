"""The theorem's figures: deviations of random layers against tokens, and where their rates lie."""

import math
from typing import Any

import numpy as np
from plotly.colors import sample_colorscale

from lyapft.report.drawing import Figure, Panels

FORMATS = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FAMILIES = {"selective_scan": "Mamba-1", "ssd": "Mamba-2"}
MARKERS = ("circle", "square", "triangle-up", "diamond", "cross", "x", "star", "triangle-down")
BINS = np.linspace(-6, 2, 33)  # of log₁₀ −ζ


def figures(content: dict[str, Any]) -> list[Figure]:
    """Deviations after a change of the state and of the input, then the histogram of ζ."""
    curves, rows = content["series"]["curves"], content["rows"]
    return [*(_deviations(curves, change) for change in ("state", "input")), _rates(curves, rows)]


def _deviations(curves: list[dict[str, Any]], change: str) -> Figure:
    titles = [f"{family}, {name}" for family in FAMILIES.values() for name in FORMATS.values()]
    panels = Panels(len(FAMILIES), len(FORMATS), titles)
    shown = [curve for curve in curves if curve["change"] == change]
    for curve in shown:
        row, column = list(FAMILIES).index(curve["family"]) + 1, list(FORMATS).index(curve["format"]) + 1
        colours = sample_colorscale("Cividis", np.linspace(0, 0.85, len(curve["sizes"])).tolist())
        for index, size in enumerate(curve["sizes"]):
            name, marker = f"ε = {size:.0e}", MARKERS[index % len(MARKERS)]
            panels.figure.add_scatter(
                row=row,
                col=column,
                x=curve["tokens"],
                y=[value or None for value in curve["largest"][index]],  # 0 has no place on a log axis
                name=name,
                legendgroup=name,
                showlegend=(row, column) == (1, 1),
                mode="lines+markers",
                line={"color": colours[index], "width": 1.6},
                marker={"symbol": marker, "size": 6, "color": colours[index], "maxdisplayed": 7},
                hovertemplate=f"{name}<br>token %{{x}}: %{{y:.3g}}<extra></extra>",
            )
    panels.figure.update_xaxes(type="log", dtick=1)
    floor = math.log10(min(size for curve in shown for size in curve["sizes"])) - 3
    panels.figure.update_yaxes(type="log", tickformat=".0e", nticks=6, range=[floor, 1])
    drawing = panels.dress("token (log axis)", [])
    drawing.update_xaxes(title_text="token (log axis)", row=len(FAMILIES))
    drawing.update_yaxes(title_text="largest |deviation|", col=1)
    reading = (
        "Largest deviation of any state over all random layers, after ε was added to the "
        f"{'initial state' if change == 'state' else 'first input'}: in float64 no curve rises, as ζ ≤ 0 says; where a "
        "format's curves rise, meet in one plateau, or are missing (ε was rounded away), rounding decides. That a "
        "change does not grow does not show that a model's answers stay the same."
    )
    return Figure(f"A change of the {change} against tokens, largest over layers", drawing, reading)


def _rates(curves: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Figure:
    titles = [f"{family}, {name}" for family in FAMILIES.values() for name in FORMATS.values()]
    panels = Panels(len(FAMILIES), len(FORMATS), titles)
    middles = ((BINS[1:] + BINS[:-1]) / 2).tolist()
    for curve, numbers in zip(curves, rows, strict=True):
        if curve["change"] != "state":
            continue
        place = {"row": list(FAMILIES).index(curve["family"]) + 1, "col": list(FORMATS).index(curve["format"]) + 1}
        falling = [math.log10(-zeta) for zeta in curve["zeta"] if zeta < 0]
        counts = np.histogram(falling, BINS)[0].tolist()
        panels.figure.add_bar(
            x=middles, y=counts, marker_color="#56B4E9", marker_line={"color": "#000", "width": 0.6}, width=0.25,
            hovertemplate="−ζ = 10^%{x:.2f}: %{y} layers<extra></extra>", showlegend=False, **place,
        )  # fmt: skip
        ends = [-numbers[key] if numbers[key] is not None else math.nan for key in ("zeta_high", "zeta", "zeta_low")]
        high = max(counts) * 1.12
        if all(end > 0 for end in ends):
            panels.figure.add_scatter(
                x=[math.log10(end) for end in ends], y=[high] * 3, mode="lines+markers", showlegend=False,
                line={"color": "#000", "width": 2}, marker={"symbol": ["line-ns-open", "diamond", "line-ns-open"]},
                hovertemplate="mean of ζ with its 95% interval: −10^%{x:.2f}<extra></extra>", **place,
            )  # fmt: skip
        share = numbers["share_nonpositive"]
        panels.figure.add_annotation(
            text=f"ζ ≤ 0: {share:.2%}<br>of {numbers['fitted']} slopes" if share is not None else "no slope fitted",
            x=0.02, y=0.97, xref="x domain", yref="y domain", showarrow=False, align="left", **place,
        )  # fmt: skip
    panels.figure.update_xaxes(range=[-6, 2])
    panels.figure.update_yaxes(rangemode="tozero")
    drawing = panels.dress("log₁₀ −ζ (nats/token)", [])
    drawing.update_xaxes(title_text="log₁₀ −ζ (nats/token)", row=len(FAMILIES))
    drawing.update_yaxes(title_text="layers", col=1)
    drawing.update_annotations(font_size=12)
    reading = (
        "Fitted rates ζ of layers whose initial state was changed (diamond: mean over layers with its 95% interval; "
        "slopes above 0 are counted in the share and have no bar): mass that thins out in a half format are layers "
        "whose deviation met the rounding floor before a slope could be fitted. A share of 100% says that these layers "
        "forget, not that any trained model is accurate."
    )
    return Figure("Fitted rates ζ of the random layers", drawing, reading)
