"""One stability card per cell of a study: how far from the edge, how long the memory, in which layer and format."""

from typing import Any

from lyapft.report.cells import Cell, Study, read
from lyapft.report.columns import ABSENT, number
from lyapft.report.tables import Column, as_html
from lyapft.verdict.rounding import origin_of

ZONE = "neutral_"  # and a format: of a record's stability
CERTIFICATE = "rounding of the state, largest"
SHADOW = "shadow: format against float32"
CAPTION = (
    "Worst values of the whole training. Neutral zone: share of (token, channel) pairs whose decay rounds to exactly 1 "
    "in that format, ● where the recurrence ran in it. A smaller margin says that a cell sits closer to the edge, not "
    "that it is less accurate: λ does not certify accuracy. Rounding: what the certificate promises at "
    "most and what was measured. Shadow: the same weights and batches in float32 beside the "
    "cell's format; a KL far below the loss says that the format alone changes little at a step. A dash: "
    "not measured; a Transformer has no recurrent state, so its card holds the shadow alone."
)


def cards(study: Study) -> str:
    """The cards as one table, a row per cell with a measured stability or shadow; empty where there is none."""
    cells = [cell for cell in study.cells if _measured(cell)]
    if not cells:
        return ""
    return f"<h2>Stability cards</h2>\n{as_html(columns(study, cells), CAPTION)}"


def _measured(cell: Cell) -> bool:
    """A Transformer has no state to measure; a shadow it may have."""
    return isinstance(read(cell.record, "stability", "lambda_max"), int | float) or bool(cell.record.get("shadow"))


def columns(study: Study, cells: list[Cell]) -> list[Column]:
    """Columns of the cards, in the order of the cells."""
    found = [cell.record.get("stability") or {} for cell in cells]

    def numbers(key: str, shown: str) -> list[str]:
        return [number(one.get(key), shown) for one in found]

    formats = dict.fromkeys(key.removeprefix(ZONE) for one in found for key in one if key.startswith(ZONE))
    zones = [Column("neutral zone", name, [_zone(one, name) for one in found]) for name in formats]
    return [
        Column("", "cell", [cell.label for cell in cells], numeric=False),
        Column("", "margin (nats/token)", numbers("margin", ".3g")),
        Column("", "memory (tokens)", numbers("memory", ",.1f")),
        Column("", "gain", numbers("gain", ",.1f")),
        Column("", "worst layer", [_worst_layer(one) for one in found], numeric=False),
        *zones,
        *_certificate(study, cells),
        *_shadow(cells),
    ]


def _certificate(study: Study, cells: list[Cell]) -> list[Column]:
    """Largest promised and measured rounding of the state, where the experiment ran on any cell of the study."""
    rows = [row for one in study.experiments if one["name"] == "certificate" for row in one["rows"]]
    largest = {
        (row["model"], key): max(float(other[key]) for other in rows if other["model"] == row["model"])
        for row in rows
        for key in ("promised", "measured")
    }
    if not any((cell.record["name"], "promised") in largest for cell in cells):
        return []
    return [
        Column(CERTIFICATE, key, [number(largest.get((cell.record["name"], key)), ".2e") for cell in cells])
        for key in ("promised", "measured")
    ]


def _shadow(cells: list[Cell]) -> list[Column]:
    """What the shadow probe measured, where one ran in any cell."""
    if not any(cell.record.get("shadow") for cell in cells):
        return []
    made = [
        Column(SHADOW, title, [number(read(cell.record, "shadow", key), shown) for cell in cells])
        for title, key, shown in (
            ("mean KL (nats/token)", "kl_mean", ".2e"),
            ("least top-1 agreement", "top1_min", ".3f"),
            ("largest deviation of a block", "deviation_max", ".2e"),
        )
    ]
    names = [_origin(cell) for cell in cells]
    return [*made, Column(SHADOW, "most of it arises in", names, numeric=False)]


def _origin(cell: Cell) -> str:
    """The block in which most of the format's deviation arises."""
    found = origin_of(cell.record)
    return ABSENT if found is None else f"{found.block} (overflow)" if found.overflowed else found.block


def _worst_layer(stability: dict[str, Any]) -> str:
    layers = [layer for layer in stability.get("layers") or [] if isinstance(layer.get("margin"), int | float)]
    return min(layers, key=lambda layer: float(layer["margin"]))["layer"] if layers else ABSENT


def _zone(stability: dict[str, Any], name: str) -> str:
    share = stability.get(ZONE + name)
    mark = " ●" if stability.get("scan_format") == name else ""
    return ABSENT if share is None else f"{float(share):.2%}{mark}"
