"""The stall's figures: states against tokens with the remedies, and where step sizes stop short."""

from typing import Any

from lyapft.report.drawing import Figure, Panels

STYLES = {
    "state": ("state stored in the format", "#D55E00", "solid", "circle"),
    "decay": ("state and decay in the format", "#CC79A7", "dash", "square"),
    "float32": ("float32 state", "#000000", "dot", "diamond"),
    "stochastic": ("stochastic rounding (mean)", "#0072B2", "dashdot", "triangle-up"),
    "kahan": ("Kahan's sum", "#009E73", "longdash", "x"),
}
FORMAT_STYLES = {"bf16": ("#0072B2", "square", "dash"), "fp16": ("#D55E00", "triangle-up", "dot")}


def figures(content: dict[str, Any]) -> list[Figure]:
    """Trajectories, then the sweep over step sizes."""
    return [_trajectories(content["series"]), _sweep(content["series"])]


def _trajectories(series: dict[str, Any]) -> Figure:
    curves = series["curves"]
    starts, formats = list(dict.fromkeys(c["start"] for c in curves)), list(dict.fromkeys(c["format"] for c in curves))
    panels = Panels(len(formats), len(starts), [f"{name}, from x₀ = {start:g}" for name in formats for start in starts])
    for curve in curves:
        name, colour, dash, marker = STYLES[curve["method"]]
        row, column = formats.index(curve["format"]) + 1, starts.index(curve["start"]) + 1
        panels.figure.add_scatter(
            row=row,
            col=column,
            x=curve["x"],
            y=curve["y"],
            name=name,
            legendgroup=name,
            showlegend=(row, column) == (1, 1),
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": marker, "size": 7, "maxdisplayed": 7 + list(STYLES).index(curve["method"])},
            hovertemplate=f"{name}<br>token %{{x}}: %{{y:.4f}}<extra></extra>",
        )
    panels.figure.add_hline(y=series["truth"], line={"color": "#777", "width": 1})
    drawing = panels.dress("token", [])
    drawing.update_yaxes(title_text="state x (dimensionless)", col=1, rangemode="tozero")
    reading = (
        f"The grey line is the truth, {series['truth']:.4f}: a state stored in a half format stops before it, though "
        f"λ = −{series['step']:g} nats/token is below 0 all along, and each of the three remedies brings it there; a "
        "remedy that serves this constant input is not shown to repair a trained model."
    )
    return Figure("A stored state that stops, and three remedies", drawing, reading)


def _sweep(series: dict[str, Any]) -> Figure:
    panels = Panels(1, 1, ["x₀ = 0, after twelve memories 1/Δ"])
    for name, (colour, marker, dash) in FORMAT_STYLES.items():
        points = [point for point in series["sweep"] if point["format"] == name]
        panels.figure.add_scatter(
            x=[point["step"] for point in points],
            y=[point["relative"] for point in points],
            name=f"state stored in {name} (filled: inside its neutral zone; line: its edge)",
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": [f"{marker}{'' if point['inside'] else '-open'}" for point in points], "size": 10},
            hovertemplate=f"{name}, Δ = %{{x:.2g}}: %{{y:.3f}} of the truth<extra></extra>",
        )
        if points:
            panels.figure.add_vline(x=points[0]["edge"], line={"color": colour, "dash": dash, "width": 1.2})
    panels.figure.add_hline(y=1, line={"color": "#777", "width": 1})
    panels.figure.update_xaxes(type="log", dtick=1, tickformat=".0e")
    drawing = panels.dress("step size Δ with A = −1 (log axis)", ["last state / truth"])
    drawing.update_yaxes(rangemode="tozero")
    reading = (
        "Every step inside a format's neutral zone (left of its line) stops far short, so the zone is a sure alarm, "
        "but states stop short to the right of it as well, so a step outside is not shown to be safe: the zone "
        "asks whether the decay rounds to 1, the stall whether a change of the state is below half its spacing."
    )
    return Figure("How far a stored state gets, by step size", drawing, reading)
