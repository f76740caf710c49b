"""The verdict as files: Markdown to read, CSV and Parquet to compute with, LaTeX to print."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from lyapft import containment, records
from lyapft.records import accuracies, divergence_entry
from lyapft.report.cells import COUNTERPARTS, Cell, read
from lyapft.report.latex import as_latex, as_lists
from lyapft.report.tables import Column
from lyapft.report.verdict_tables import caption, text_columns
from lyapft.verdict import Section, Verdict

MARKDOWN, LATEX = "verdict.md", "verdict.tex"
DETAIL = "In detail"  # heading of the sentences that the page has no room for
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a text begins that a spreadsheet would run
# What Markdown reads as more than text: marks, a bracket that could begin a link (an interval alone is none), an
# underscore that is not within a word; and what opens a block.
INTERVAL = r"[−+]?\d[^\[\]]*\](?![\[(:])"
MARKS = re.compile(rf"[\\`*|~]|\[(?!{INTERVAL})|(?<![^\W_])_|_(?![^\W_])")
OPENS = re.compile(r"^(\d*)([#>+=.)-])")
CELLS_FILE = f"{records.TABLES}/cells.parquet"
PLAIN = ("id", "name", "status", "role", "seed", "replicate")
NUMBERS = (
    ("training", "loss_mean_last_10pct"),
    ("training", "skipped_steps"),
    ("stability", "lambda_max"),
    ("stability", "margin"),
    ("cost", "tokens_per_s"),
    ("cost", "peak_bytes"),
    ("cost", "wall_s"),
)


def write(folder: Path, verdict: Verdict, cells: Sequence[Cell] = ()) -> list[Path]:
    """Write `verdict.md`, its page as `verdict.tex`, and in `tables/` each table as CSV, Parquet and LaTeX.

    CSV and Parquet hold one number per column in full precision; Markdown and LaTeX the text of the page. In CSV, text
    that a spreadsheet would run as a formula begins with an apostrophe; Parquet has it as it is. All cells, also those
    of a large study that the page does not show, are in `tables/cells.parquet`. Returns the files.
    """
    containment.check(folder, [folder / records.TABLES])
    columns = {name: text_columns(verdict, name) for name in verdict.tables}
    written = [_write_text(folder / MARKDOWN, as_markdown(verdict, columns))]
    written.append(_write_text(folder / LATEX, as_lists(verdict.page)))
    if cells:
        written.append(_write(folder / CELLS_FILE, partial(cell_table(cells).to_parquet, index=False)))
    for name, table in verdict.tables.items():
        home = folder / records.TABLES / name
        written.append(_write(home.with_suffix(".csv"), partial(_without_formulas(table).to_csv, index=False)))
        written.append(_write(home.with_suffix(".parquet"), partial(table.to_parquet, index=False)))
        text = as_latex(columns[name], caption(verdict, name), name)
        written.append(_write_text(home.with_suffix(".tex"), text))
    return written


def cell_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """A row per cell: what it is, how it ended, its numbers; a column per score."""
    found = [cell.record for cell in cells]
    groups = ("model", "data", "task", "precision", "peft")
    columns: dict[str, list[object]] = {name: [record.get(name) for record in found] for name in PLAIN}
    columns |= {group: [read(record, "choices", group) for record in found] for group in groups}
    parts = {part: [record.get(part) or {} for record in found] for part, _ in NUMBERS}
    columns |= {f"{part}_{name}": [one.get(name) for one in parts[part]] for part, name in NUMBERS}
    columns["emulated"] = [bool(read(record, "precision", "emulated")) for record in found]
    columns["memory_ran_out"] = [bool(record.get("oom")) for record in found]
    columns["error"] = [read(record, "error", "message") for record in found]
    for kind in COUNTERPARTS:
        entries = [divergence_entry(record, kind) or {} for record in found]
        columns[f"divergence_{kind}_points"] = [entry.get("mean_abs_points") for entry in entries]
    scores = [{(str(s["task"]), int(s["shots"])): s["value"] for s in accuracies(record)} for record in found]
    for task, shots in dict.fromkeys(key for own in scores for key in own):
        columns[f"{task}_{shots}_shot"] = [own.get((task, shots)) for own in scores]
    return pd.DataFrame({"cell": [cell.label for cell in cells]} | columns)


def _write(path: Path, save: Callable[[Path], object]) -> Path:
    def saved(temporary: Path) -> None:
        save(temporary)

    records.write_atomically(path, saved)
    return path


def _write_text(path: Path, text: str) -> Path:
    return _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def as_markdown(verdict: Verdict, columns: Mapping[str, Sequence[Column]] | None = None) -> str:
    """One page of sentences, then all the others, then every table.

    Args:
        columns: of text, by table, where they have been made already.
    """
    columns = columns or {name: text_columns(verdict, name) for name in verdict.tables}
    parts = [f"# Verdict on the study {_escaped(verdict.study)}", *_sentences(verdict.page, "##")]
    parts += [f"## {DETAIL}", *_sentences(verdict.sections, "###")]
    for name, own in columns.items():
        parts += [f"## Table: {name}", caption(verdict, name), _markdown_table(own)]
    return "\n\n".join(parts) + "\n"


def _sentences(sections: Sequence[Section], mark: str) -> list[str]:
    """Headings and lists."""
    return [
        part
        for section in sections
        for part in (f"{mark} {_escaped(section.title)}", "\n".join(f"- {_item(line)}" for line in section.lines))
    ]


def _markdown_table(columns: Sequence[Column]) -> str:
    heads = [f"{column.group}: {column.title}" if column.group else column.title for column in columns]
    rules = ["---:" if column.numeric else "---" for column in columns]
    rows = [[column.cells[i] for column in columns] for i in range(len(columns[0].cells))]
    texts = [[_escaped(cell) for cell in row] for row in (heads, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (texts[0], rules, *texts[1:]))


def _without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts a spreadsheet shows; numbers, also negative ones, are none."""

    def shown(cell: object) -> object:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell

    texts = table.select_dtypes(["object", "string"])
    return table.assign(**{str(name): texts[name].map(shown) for name in texts}).rename(columns=shown)


def _item(text: str) -> str:
    """The same as an item of a list, within which a heading, a quotation, a rule or another list could begin.

    >>> _item("# 1. x"), _item("1. x")
    ('\\\\# 1. x', '1\\\\. x')
    """
    return OPENS.sub(r"\1\\\2", _escaped(text))


def _escaped(text: str) -> str:
    """A text on one line that Markdown shows as it is: neither links, images and tags nor emphasis and table rules.

    >>> _escaped("![x](http://a/b.png) of lora_all | <b>")
    '!\\\\[x](http://a/b.png) of lora_all \\\\| &lt;b>'
    >>> _escaped("0.12 [−0.30, +0.54], [1](http://a)")
    '0.12 [−0.30, +0.54], \\\\[1](http://a)'
    """
    flat = " ".join(text.split())
    return MARKS.sub(r"\\\g<0>", flat).replace("&", "&amp;").replace("<", "&lt;")
