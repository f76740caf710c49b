"""One self-contained HTML page from a study: it opens without a network, and text from records is always escaped."""

import html
from collections import Counter
from datetime import UTC, datetime

from plotly.offline import get_plotlyjs

from lyapft.divergence import SPIKE_POINTS
from lyapft.report import figures, tables
from lyapft.report.cells import COUNTERPARTS, Study, choice, divergence_entry, read

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1240px; margin: 0 auto; padding: 24px 28px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 19px; margin: 38px 0 8px; border-top: 1px solid #ccc; padding-top: 18px; }
.sub { color: #555; margin: 0 0 16px; } ul.findings { padding-left: 20px; margin: 8px 0; } ul.findings li { margin: 3px 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: #444; padding-top: 8px; max-width: 1150px; }
th, td { padding: 4px 8px; text-align: right; white-space: nowrap; }
thead th { border-bottom: 1px solid #555; vertical-align: bottom; font-weight: 600; }
thead th.group { border-bottom: 1px solid #bbb; text-align: center; } tbody tr { border-bottom: 1px solid #e6e6e6; }
tbody tr:nth-child(even), tbody tr:nth-child(even) th { background: #f7f7f7; }
tbody th, thead th:first-child { text-align: left; font-weight: 500; position: sticky; left: 0; background: #fff; }
.text { text-align: left; } .quiet { color: #767676; } .bad { font-weight: 700; color: #8a1c00; } .spike { font-weight: 700; }
figure { margin: 0; } figcaption { color: #333; max-width: 1000px; margin: 4px 0 0; }
ul.errors li { margin: 4px 0; } code { font-size: 12.5px; background: #f2f2f2; padding: 1px 4px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0; } dt { font-weight: 600; } dd { margin: 0; }
summary { cursor: pointer; font-weight: 600; margin: 34px 0 8px; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""

TERMS = {
    "loss": "mean training cross-entropy over the last tenth of the steps, in nats per target token",
    "score": "fraction of items answered right, the same items at every shot count and in every cell",
    "λ_max": "largest finite-time Lyapunov exponent of a recurrent state, mean over real tokens, in nats per token; the model's is "
    "the largest of its layers; n/a for models without a recurrent state",
    "margin": "−λ_max: how fast the slowest direction of the state forgets; 1/margin is its memory in tokens",
    "divergence": "mean over tasks and shot counts of |score − counterpart's score|, in percentage points, paired: same seed, "
    "data order and initial weights",
    "from fp32 full": "counterpart: full precision, all weights trained",
    "from fp32 same peft": "counterpart: full precision, the same weights trained; what is left is the format's own effect",
    "is it / missing": "the cell is that counterpart itself / the study does not hold the counterpart's record",
    "answers flipped": "share of the paired items whose chosen answer differs; gained: right here only, lost: right there only",
}


def render(study: Study, written: str | None = None) -> str:
    """The whole page.

    Args:
        study: what `load_study` found.
        written: the moment to print below the title; None is now.
    """
    written = written or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    all_records = [cell.record for cell in study.cells]
    names = [cell.label for cell in study.cells]
    table = tables.as_html(
        tables.summary_columns(all_records, names),
        "Scores are fractions right; λ_max and margin in nats per token; divergences are mean absolute differences in "
        "percentage points. A dash: not there (yet).",
    )
    drawings = "".join(_figure(figure) for figure in figures.all_figures(study))
    title = html.escape(f"Study {study.name}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style><script>{get_plotlyjs()}</script></head><body>\n"
        f'<h1>{title}</h1><p class="sub">{html.escape(_subtitle(study))} · written {html.escape(written)}</p>\n'
        f"{_findings(study)}\n<h2>Cells</h2>\n{table}\n{_errors(study)}\n{_spikes(study)}\n{drawings}\n"
        f"{_not_recurrent(study)}\n{_provenance(study)}\n{_terms()}\n</body></html>\n"
    )


def _subtitle(study: Study) -> str:
    counts = Counter(str(cell.record["status"]) for cell in study.cells)
    n = len(study.cells)
    states = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    seeds = len({cell.record.get("seed") for cell in study.cells})
    models = ", ".join(dict.fromkeys(choice(cell.record, "model") for cell in study.cells))
    return f"{n} cell{'s' * (n != 1)} ({states}) · {models} · {seeds} seed{'s' * (seeds != 1)}"


def _findings(study: Study) -> str:
    """What the numbers say, in a few lines, each with its limits."""
    lines = [line for name in COUNTERPARTS if (line := _divergence_line(study, name))]
    if line := _stability_line(study):
        lines.append(line)
    failed = [cell for cell in study.cells if cell.record["status"] not in ("ok", "running")]
    if failed:
        lines.append(f"{len(failed)} cell{'s' * (len(failed) != 1)} did not end well: see the errors below the table.")
    if running := [cell for cell in study.cells if cell.record["status"] == "running"]:
        lines.append(f"{len(running)} still running when this page was written: what they have so far is shown.")
    lines += study.notes
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<ul class="findings">{items}</ul>' if items else ""


def _divergence_line(study: Study, counterpart: str) -> str:
    pairs = [
        (cell, entry)
        for cell in study.cells
        if (entry := divergence_entry(cell.record, counterpart)) and entry.get("status") == "ok"
    ]
    if not pairs:
        return ""
    cell, entry = max(pairs, key=lambda pair: float(pair[1]["mean_abs_points"]))
    scores = [score for _, one in pairs for score in one["per_score"]]
    spikes = sum(score["abs_points"] > SPIKE_POINTS for score in scores)
    seeds = {pair[0].record.get("seed") for pair in pairs}
    honest = " One seed: no interval, so none of this is significant or not." if len(seeds) == 1 else ""
    return (
        f"Divergence from {COUNTERPARTS[counterpart]} fine-tuning: largest mean {entry['mean_abs_points']:.2f} points "
        f"({cell.label}); {spikes} of {len(scores)} scores differ by more than {SPIKE_POINTS:g} point.{honest}"
    )


def _stability_line(study: Study) -> str:
    values = [
        (float(value), cell)
        for cell in study.cells
        if isinstance(value := read(cell.record, "stability", "lambda_max"), int | float)
    ]
    if not values:
        return ""
    value, cell = max(values, key=lambda pair: pair[0])
    below = sum(value < 0 for value, _ in values)
    return (
        f"λ_max is below 0 in {below} of {len(values)} cells with a recurrent state (every finite Mamba weight has that); the "
        f"smallest margin is {tables.number(-value, '.3g')} nats/token ({cell.label})."
    )


def _errors(study: Study) -> str:
    found = tables.errors([cell.record for cell in study.cells], [cell.label for cell in study.cells])
    if not found:
        return ""
    items = "".join(f"<li>✗ {html.escape(name)}<br><code>{html.escape(message)}</code></li>" for name, message in found)
    return f'<h2>Cells that did not end well</h2><ul class="errors">{items}</ul>'


def _spikes(study: Study) -> str:
    columns = tables.divergence_columns(study)
    if not columns:
        return ""
    table = tables.as_html(
        columns,
        f"Cell minus counterpart, percentage points; ▲ ▼ mark spikes, more than {SPIKE_POINTS:g} point. A mark says where to "
        "look, not that the difference would come again with another seed.",
    )
    return f"<h2>Divergence of every score, signed</h2>\n{table}"


def _figure(figure: figures.Figure) -> str:
    options = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    drawing = figure.drawing.to_html(full_html=False, include_plotlyjs=False, config=options)
    title, reading = html.escape(figure.title), html.escape(figure.reading)
    return f"<h2>{title}</h2><figure>{drawing}<figcaption>{reading}</figcaption></figure>\n"


def _not_recurrent(study: Study) -> str:
    reasons = figures.not_recurrent(study)
    return f'<p class="sub">No λ for {html.escape("; ".join(reasons))}.</p>' if reasons else ""


def _provenance(study: Study) -> str:
    table = tables.as_html(tables.provenance_columns(study), "From each cell's record.json, which holds the whole configuration.")
    return f"<details><summary>How each cell ran</summary>{table}</details>"


def _terms() -> str:
    rows = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in TERMS.items())
    return f"<h2>Terms</h2><dl>{rows}</dl>"
