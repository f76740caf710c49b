"""Figures of experiments that compare models: a line with its interval per model, all architectures on one axis."""

from typing import Any

from lyapft.report.drawing import Figure, Panels

# Dash says Mamba (solid) or Transformer (dashed); marker and colour say which.
LOOKS = [("#0072B2", "circle"), ("#D55E00", "square"), ("#000000", "triangle-up"), ("#56B4E9", "diamond"),
         ("#009E73", "x"), ("#CC79A7", "star"), ("#E69F00", "cross")]  # fmt: skip


def growth(content: dict[str, Any]) -> list[Figure]:
    """‖δ logits‖ against tokens after the change."""
    drawing = _lines(content, "tokens after the changed one", "‖δ logits‖ / ε (log axis)")
    drawing.update_yaxes(type="log", tickformat=".0e", nticks=8)
    reading = (
        "A line that falls says that the model forgets a change of one embedding, a level one that it keeps it; bands "
        "are 95% intervals over prompts. Two lines apart show a difference of these weights on these texts; they show "
        "neither that the architecture is the cause nor which model answers better."
    )
    return [Figure("Growth of a change over tokens", drawing, reading)]


def depth(content: dict[str, Any]) -> list[Figure]:
    """Cumulative log growth against blocks."""
    drawing = _lines(content, "residual blocks passed", "growth of the fastest direction (nats)")
    drawing.update_xaxes(dtick=1)
    reading = (
        "A rising line says that each block stretches some direction of the residual stream; bands are 95% intervals "
        "over prompts. Models of unequal depth compare by slope, not by end; growth in depth does not "
        "show that outputs diverge over tokens."
    )
    return [Figure("Growth of directions over depth", drawing, reading)]


def closed_loop(content: dict[str, Any]) -> list[Figure]:
    """Agreement of the decoded tokens against ε."""
    drawing = _lines(content, "ε on the last prompt token's embedding (log axis)", "new tokens that agree (fraction)")
    drawing.update_xaxes(type="log", dtick=1, tickformat=".0e")
    drawing.update_yaxes(range=[-0.03, 1.05])
    reading = (
        "Agreement of 1 says that greedy decoding did not notice a change of this size, lower values that feedback "
        "carried it on although the open loop may forget it; bands are 95% intervals over prompts. A text that differs "
        "is not shown to be a worse one."
    )
    return [Figure("Decoding after a change of the prompt", drawing, reading)]


def _lines(content: dict[str, Any], x_title: str, y_title: str) -> Any:
    panels = Panels(1, 1, [""])
    for index, curve in enumerate(content["series"]["curves"]):
        colour, marker = LOOKS[index % len(LOOKS)]
        name = f"{curve['model']} ({'recurrent' if curve['recurrent'] else 'attention'})"
        if None not in curve["low"]:
            panels.figure.add_scatter(
                x=[*curve["x"], *curve["x"][::-1]], y=[*curve["high"], *curve["low"][::-1]], fill="toself",
                fillcolor=colour, opacity=0.15, line={"width": 0}, mode="lines", hoverinfo="skip", showlegend=False,
                legendgroup=name,
            )  # fmt: skip
        panels.figure.add_scatter(
            x=curve["x"],
            y=curve["mean"],
            name=name,
            legendgroup=name,
            mode="lines+markers",
            line={"color": colour, "dash": "solid" if curve["recurrent"] else "dash", "width": 2},
            marker={"symbol": marker, "size": 8, "maxdisplayed": 12},
            hovertemplate=f"{name}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
        )
    panels.figure.update_layout(height=460)
    return panels.dress(x_title, [y_title])
