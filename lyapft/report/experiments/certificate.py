"""Promised against measured rounding, a point for each state that was drawn."""

from typing import Any

from lyapft.report.drawing import Figure, Panels
from lyapft.report.experiments.compared import LOOKS

LEAST = 1e-12  # nothing smaller has a place on the log axes


def figures(content: dict[str, Any]) -> list[Figure]:
    """One panel: all models and layers, with the line where promise and measurement agree."""
    panels = Panels(1, 1, [""])
    shown = content["series"]["points"]
    models = list(dict.fromkeys(one["model"] for one in shown))
    values = [value for one in shown for key in ("promised", "measured") for value in one[key] if value > LEAST]
    if values:
        ends = [min(values) / 2, max(values) * 2]
        panels.figure.add_scatter(
            x=ends, y=ends, mode="lines", name="promised = measured", line={"color": "#777", "dash": "dash"}
        )
    for one in shown:
        colour, marker = LOOKS[models.index(one["model"]) % len(LOOKS)]
        pairs = [pair for pair in zip(one["measured"], one["promised"], strict=True) if min(pair) > LEAST]
        first = one is next(other for other in shown if other["model"] == one["model"])
        panels.figure.add_scatter(
            x=[pair[0] for pair in pairs],
            y=[pair[1] for pair in pairs],
            mode="markers",
            name=f"{one['model']} ({one['format']})",
            legendgroup=one["model"],
            showlegend=first,
            marker={"symbol": f"{marker}-open", "size": 6, "color": colour, "line": {"width": 1.2}},
            hovertemplate=f"{one['layer']}<br>measured %{{x:.2e}}, promised %{{y:.2e}}<extra></extra>",
        )
    panels.figure.update_xaxes(type="log", tickformat=".0e")
    panels.figure.update_yaxes(type="log", tickformat=".0e")
    panels.figure.update_layout(height=520)
    drawing = panels.dress("measured |x̂ − x|, largest over tokens and prompts (log axis)", ["promised (log axis)"])
    reading = (
        "No point may lie below the line: there the certificate would be wrong. Points near it are promises of use, "
        "points far above it say that the worst case did not happen; a rank correlation near 1 (table) says that the "
        "certificate finds the states that rounding hurts most. It bounds the recurrent state, not the logits or the "
        "answers."
    )
    return [Figure("Rounding of the recurrent state: promised against measured", drawing, reading)]
