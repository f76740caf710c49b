"""One self-contained HTML page from a study: it opens without a network, and text from records is always escaped."""

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from plotly.offline import get_plotlyjs

from lyapft.divergence import SPIKE_POINTS, is_spike
from lyapft.errors import InputError
from lyapft.records import divergence_entry
from lyapft.report import columns, experiments, figures, stability
from lyapft.report.cells import COUNTERPARTS, Study, choice, read
from lyapft.report.drawing import Figure
from lyapft.report.exports import CELLS_FILE, DETAIL
from lyapft.report.tables import as_html
from lyapft.report.verdict_tables import caption, text_columns
from lyapft.verdict import Section, Verdict
from lyapft.verdict.words import EMULATED_MEANS

MOST_ERRORS = 100
CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1320px; margin: 0 auto; padding: 24px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; }
h2 { font-size: 19px; margin: 38px 0 8px; border-top: 1px solid #ccc; padding-top: 18px; }
h3 { font-size: 15.5px; margin: 16px 0 2px; } .verdict ul { padding-left: 20px; margin: 4px 0 10px; max-width: 1050px; }
.verdict li { margin: 4px 0; } .verdict summary { margin: 12px 0 4px; }
.sub { color: #555; margin: 0 0 16px; }
ul.findings { padding-left: 20px; margin: 8px 0; } ul.findings li, ul.errors li { margin: 4px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: #444; padding-top: 8px; max-width: 1150px; }
th, td { padding: 4px 5px; text-align: right; white-space: nowrap; }
thead th { white-space: normal; line-height: 1.25; border-bottom: 1px solid #555; vertical-align: bottom; }
thead th.group { border-bottom: 1px solid #bbb; text-align: center; }
tbody tr { border-bottom: 1px solid #e6e6e6; } tbody th { font-weight: 500; }
tbody th, th.name { text-align: left; position: sticky; left: 0; background: #fff; }
tbody tr:nth-child(even), tbody tr:nth-child(even) th { background: #f7f7f7; }
th.text, td.text { text-align: left; }
.quiet { color: #6b6b6b; } .bad { font-weight: 700; color: #8a1c00; } .spike { font-weight: 700; }
figure { margin: 0; } figcaption { color: #333; max-width: 1000px; margin: 4px 0 0; }
code { font-size: 12.5px; background: #f2f2f2; padding: 1px 4px; overflow-wrap: anywhere; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0; }
dt { font-weight: 600; } dd { margin: 0; }
summary { cursor: pointer; font-weight: 600; margin: 34px 0 8px; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""

TERMS = {
    "loss": "mean training cross-entropy over the last tenth of the steps, in nats per target token",
    "score": "fraction of items answered right, the same items at every shot count and in every cell",
    "λ_max": "largest finite-time Lyapunov exponent of the recurrent states, mean over real tokens, in nats per token; "
    "in the table the largest of all layers and training steps; n/a for models without a recurrent state",
    "margin": "−λ_max: how fast the slowest direction of the state forgets; 1/margin is its memory in tokens",
    "tokens/s": f"median over training steps after warm-up. {EMULATED_MEANS}",
    "divergence": "mean over tasks and shot counts of |score − counterpart's score|, in percentage points, paired: "
    "same seed, data order and initial weights",
    "fp32 full": "counterpart: full precision, all weights trained",
    "fp32 same peft": "counterpart: full precision, the same peft; what is left is the effect of the format",
    "self, missing": "the cell is that counterpart itself; the counterpart failed or is not there",
    "answers flipped": "share of the paired items whose chosen answer differs; gained: right here only, lost: right in "
    "the counterpart only",
}


def render(study: Study, verdict: Verdict, written: str | None = None) -> str:
    """The whole page.

    Args:
        study: what `load_study` found.
        verdict: what `judge` made of the same records.
        written: the moment to print below the title; None is now.
    """
    written = written or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    part = replace(study, cells=study.shown)
    table = as_html(
        columns.summary_columns([cell.record for cell in part.cells], [cell.label for cell in part.cells]),
        "Scores are fractions right; λ_max and margin in nats per token; divergences are mean absolute differences in "
        "percentage points. A dash: not there (yet).",
    )
    shown = drawings(figures.score_figures(part), "scores") + _signed(part)
    training = stability.cards(part) + drawings(figures.training_figures(part), "training")
    for index, content in enumerate(study.experiments, start=1):
        try:
            training += drawings(experiments.figures(content), f"{content['name']}-{index}")
        except InputError as error:
            training += f'<p class="sub">{html.escape(str(error))}</p>'
    return document(
        f"Study {study.name}",
        f"{_subtitle(study)} · written {written}",
        f"{_verdict(verdict)}\n<h2>Findings</h2>{_findings(study)}\n<h2>Cells</h2>\n{_excerpt(study)}{table}\n"
        f"{_errors(study)}\n{shown}{training}\n{_not_recurrent(part)}\n{_provenance(part)}\n{_terms()}\n",
    )


def _excerpt(study: Study) -> str:
    """Which cells the rest of the page shows, where it does not show all."""
    if len(study.shown) == len(study.cells):
        return ""
    kinds = len({cell.kind for cell in study.shown})
    return (
        f'<p class="sub">From here on {len(study.shown):,} of {len(study.cells):,} cells: those of the {kinds:,} kinds '
        "that lie furthest from full precision in any cell. Verdict and findings are of all cells, and so is "
        f'<a href="{CELLS_FILE}">{CELLS_FILE}</a>, a row per cell.</p>\n'
    )


def document(title: str, subtitle: str, body: str) -> str:
    """One HTML file that opens without a network; `body` is HTML, the other texts are not."""
    title = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style><script>{get_plotlyjs()}</script></head><body>\n"
        f'<h1>{title}</h1><p class="sub">{html.escape(subtitle)}</p>\n{body}</body></html>\n'
    )


def _verdict(verdict: Verdict) -> str:
    """One page of sentences, all others folded away, the recipes that they rest on, and the other tables folded."""
    detail = f"<details><summary>{DETAIL}</summary>{_sentences(verdict.sections)}</details>"
    shown = {name: as_html(text_columns(verdict, name), html.escape(caption(verdict, name))) for name in verdict.tables}
    folded = "".join(
        f"<details><summary>Table: {name}</summary>{table}</details>"
        for name, table in shown.items()
        if name != "recipes"
    )
    said = f"{_sentences(verdict.page)}{detail}"
    return f'<section class="verdict"><h2>Verdict</h2>{said}{shown.get("recipes", "")}{folded}</section>'


def _sentences(sections: Sequence[Section]) -> str:
    return "".join(
        f"<h3>{html.escape(section.title)}</h3><ul>"
        + "".join(f"<li>{html.escape(line)}</li>" for line in section.lines)
        + "</ul>"
        for section in sections
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
    spikes = sum(is_spike(score["signed_points"]) for score in scores)
    seeds = {pair[0].record.get("seed") for pair in pairs}
    honest = " One seed: no interval, noise is not ruled out." if len(seeds) == 1 else ""
    return (
        f"Divergence from {COUNTERPARTS[counterpart]}: largest mean {entry['mean_abs_points']:.2f} points "
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
        f"λ_max is below 0 in {below} of {len(values)} cells with a recurrent state (every finite Mamba weight has "
        f"that); the smallest margin is {columns.number(-value, '.3g')} nats/token ({cell.label})."
    )


def _errors(study: Study) -> str:
    found = columns.errors([cell.record for cell in study.cells], [cell.label for cell in study.cells])
    if not found:
        return ""
    items = "".join(
        f"<li>✗ {html.escape(name)}<br><code>{html.escape(message)}</code></li>"
        for name, message in found[:MOST_ERRORS]
    )
    if more := len(found) - MOST_ERRORS:
        items += f"<li>and {more:,} more, in {CELLS_FILE}</li>" * (more > 0)
    return f'<h2>Cells that did not end well</h2><ul class="errors">{items}</ul>'


def _signed(study: Study) -> str:
    rows = columns.divergence_columns(study)
    if not rows:
        return ""
    grain = figures.points_per_answer(study)
    coarse = f"Here one answer is worth {grain:.2f} points, so a single changed answer is one. "
    caption = (
        f"Cell minus counterpart in percentage points; ▲ ▼ mark spikes, differences above {SPIKE_POINTS:g} point. "
        f"{coarse if grain > SPIKE_POINTS else ''}A mark says where to look, not that the difference would come again "
        "with another seed; flipped answers show changes that cancel in a score."
    )
    return f"<h2>Divergence of every score, signed</h2>\n{as_html(rows, caption)}"


def drawings(found: Sequence[Figure], name: str) -> str:
    """Figures as HTML, named by `name` and their number."""
    return "".join(_figure(figure, f"{name}-{index}") for index, figure in enumerate(found, start=1))


def _figure(figure: Figure, name: str) -> str:
    """A heading, the drawing and its sentence; a fixed name keeps the page the same when nothing changed."""
    options = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    drawing = figure.drawing.to_html(full_html=False, include_plotlyjs=False, config=options, div_id=name)
    title, reading = html.escape(figure.title), html.escape(figure.reading)
    return f"<h2>{title}</h2><figure>{drawing}<figcaption>{reading}</figcaption></figure>\n"


def _not_recurrent(study: Study) -> str:
    reasons = figures.not_recurrent(study)
    return f'<p class="sub">No λ for {html.escape("; ".join(reasons))}.</p>' if reasons else ""


def _provenance(study: Study) -> str:
    table = as_html(
        columns.provenance_columns(study), "From each cell's record.json, which holds the whole configuration."
    )
    return f"<details><summary>How each cell ran</summary>{table}</details>"


def _terms() -> str:
    rows = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in TERMS.items())
    return f"<h2>Terms</h2><dl>{rows}</dl>"
