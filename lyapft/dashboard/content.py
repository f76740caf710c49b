"""What a dashboard shows of a record: plain values, tables and charts; pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lyapft.records import Record, costs, divergence_entry

ANSWERS = ("flip_rate", "kl", "nll_gold")  # of a summary: of the chosen answers, and in nats of all of them
ITEM_COLUMNS = ("task", "subset", "item", "shots", "gold", "choice", "correct", "nll_gold")


@dataclass(frozen=True)
class Chart:
    """One of W&B's own charts, drawn from a table of the run: no chart has to be registered with an account."""

    name: str
    kind: str  # line or bar
    table: str
    x: str
    y: str
    title: str
    options: dict[str, str] = field(default_factory=dict)


CHARTS = (
    Chart("score", "line", "scores", "shots", "value", "score against shots", {"stroke": "series"}),
    Chart("divergence", "bar", "divergence", "score", "signed_points", "points from full-precision fine-tuning"),
    Chart(
        "divergence_same_peft", "bar", "divergence_same_peft", "score", "signed_points", "points from fp32, same peft"
    ),
    Chart("flip_rate", "bar", "answers", "counterpart", "flip_rate", "share of answers that flipped"),
    Chart("margin", "bar", "layers", "layer", "margin", "margin by layer, nats per token"),
)


def tables(record: Record, items: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """The tables of a run, those with rows: `items` (the answer to each item), `scores`, `layers`; of the divergence
    `divergence` (from full precision and all weights), `divergence_same_peft`, and `answers` (flips, KL, ΔNLL).

    >>> list(tables({"scores": [{"task": "mmlu", "shots": 5, "metric": "acc", "value": 0.5, "n": 9}]}, None))
    ['scores']
    """
    layers = (record.get("stability") or {}).get("layers") or []
    scores = [
        score | {"series": score["task"] if score["metric"] == "acc" else f"{score['task']} {score['metric']}"}
        for score in record.get("scores") or []
    ]
    found = {
        "items": pd.DataFrame() if items is None else items[[name for name in ITEM_COLUMNS if name in items]],
        "scores": _columns(
            scores, ("series", "task", "shots", "metric", "value", "stderr", "chance", "n", "beyond_trained_length")
        ),
        "divergence": _points(record, "paper"),
        "divergence_same_peft": _points(record, "precision_only"),
        "answers": pd.DataFrame(
            [{"counterpart": entry["counterpart"]} | answers(entry) for entry in _compared(record) if answers(entry)]
        ),
        "layers": _columns(layers, ("layer", "lambda_max", "margin", "norm_bound")),
    }
    return {name: table.astype(object).where(table.notna(), None) for name, table in found.items() if len(table)}


def answers(entry: Mapping[str, Any]) -> dict[str, float | int]:
    """How the answers of a cell differ from one counterpart's: counts of items, a share, and nats.

    >>> answers({"flips": {"n": 8, "flipped": 2, "gained": 1, "lost": 0}, "answer_shift": {"n": 8, "kl": 0.1}})
    {'n': 8, 'flipped': 2, 'gained': 1, 'lost': 0, 'flip_rate': 0.25, 'kl': 0.1}
    """
    flips, shift = entry.get("flips") or {}, entry.get("answer_shift") or {}
    found = {name: flips[name] for name in ("n", "flipped", "gained", "lost") if name in flips}
    found |= {"flip_rate": flips["flipped"] / flips["n"]} if flips.get("n") else {}
    return found | {name: shift[name] for name in ("kl", "nll_gold") if shift.get("n") and name in shift}


def _compared(record: Record) -> list[dict[str, Any]]:
    return [entry for entry in record.get("divergence") or [] if entry.get("status") == "ok"]


def _points(record: Record, counterpart: str) -> pd.DataFrame:
    """Signed divergence of every score from one counterpart, in points."""
    entry = divergence_entry(record, counterpart) or {}
    return pd.DataFrame(
        [
            {"score": f"{one['task']} {one['shots']}-shot", "signed_points": one["signed_points"]}
            for one in entry.get("per_score") or []
        ]
    )


def _columns(rows: list[dict[str, Any]], names: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame([{name: row.get(name) for name in names} for row in rows])


def charts(found: Mapping[str, pd.DataFrame]) -> list[Chart]:
    """The charts whose table is there."""
    return [chart for chart in CHARTS if chart.table in found]


def summary(record: Record) -> dict[str, Any]:
    """A record's results as flat names and plain values; what the cell has not got is left out.

    >>> summary({"status": "ok", "scores": [{"task": "mmlu", "shots": 5, "value": 0.5}]})
    {'status': 'ok', 'score/mmlu/5-shot': 0.5}
    """
    flat: dict[str, Any] = {"status": record["status"], "error": (record.get("error") or {}).get("message")}
    parts = {"training": record.get("training"), "cost": costs(record), "shadow": record.get("shadow")}
    for part, values in parts.items():
        flat |= {f"{part}/{name}": value for name, value in (values or {}).items()}
    flat |= {"halvings": len(record["oom"])} if record.get("oom") else {}
    for name, value in (record.get("stability") or {}).items():
        if name == "layers":
            flat |= {
                f"stability/{layer['layer']}/{key}": layer[key] for layer in value for key in ("lambda_max", "margin")
            }
        else:
            flat[f"stability/{name}"] = value
    for score in record.get("scores") or []:
        other = "" if score.get("metric", "acc") == "acc" else f"/{score['metric']}"
        flat[f"score/{score['task']}/{score['shots']}-shot{other}"] = score["value"]
    for entry in record.get("divergence") or []:
        flat[f"divergence/{entry['counterpart']}/status"] = entry["status"]
        flat[f"divergence/{entry['counterpart']}/mean_abs_points"] = entry.get("mean_abs_points")
        for score in entry.get("per_score") or []:
            name = f"divergence/{entry['counterpart']}/{score['task']}/{score['shots']}-shot"
            flat[name] = score["signed_points"]
        for name, value in answers(entry).items():
            if name in ANSWERS:
                flat[f"divergence/{entry['counterpart']}/{name}"] = value
    return {name: value for name, value in flat.items() if isinstance(value, str) or _finite(value)}


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
