"""Curves over training steps: loss, and the stability of the recurrent state."""

import html
import math
from collections.abc import Sequence

from lyapft.report.cells import Cell, Study
from lyapft.report.drawing import Figure, Panels, facets_of, style_key, styles, thin

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
