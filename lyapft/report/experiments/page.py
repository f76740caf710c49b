"""One page per experiment: its figures, its table, its settings."""

import html
from pathlib import Path
from typing import Any

from lyapft import records
from lyapft.report import page
from lyapft.report.experiments import Content, figures
from lyapft.report.tables import Column, as_html


def write(content: Content, target: Path) -> Path:
    """Write the page of an experiment: its figures, its table, its settings. Returns where it is."""
    text = render(content)
    records.write_atomically(target, lambda path: _write_text(path, text))
    return target


def render(content: Content) -> str:
    """The whole page, which opens without a network."""
    settings = {key: value for key, value in content["experiment"].items() if key != "_target_"}
    terms = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in settings.items())
    took = f"{content['created']} · took {content['wall_s']:.0f} s"
    table = as_html(_columns(content["rows"]), "Every number of the record's table; a dash: there is none.")
    return page.document(
        f"Experiment {content['name']}",
        took,
        f"{page.drawings(figures(content), content['name'])}<h2>Numbers</h2>{table}<h2>Settings</h2><dl>{terms}</dl>",
    )


def _columns(rows: list[dict[str, Any]]) -> list[Column]:
    numeric = {key: all(isinstance(row[key], int | float | None) for row in rows) for key in rows[0]}
    return [Column("", key, [_cell(row[key]) for row in rows], numeric[key]) for key in rows[0]]


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
