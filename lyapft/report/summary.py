"""The closing table of a command."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lyapft.records import Record
from lyapft.report.cells import labels, ordered
from lyapft.report.columns import errors, summary_columns
from lyapft.report.tables import as_text


def summary_table(cells: Sequence[tuple[Path, Record]], width: int | None = None) -> str:
    """The closing table of a study as plain text: a row per cell, then the error of each failed cell.

    Args:
        cells: folder and record of every cell of one study, at any stage, as `records.load_study` gives them.
        width: columns of the terminal (None asks it); a wider table is cut into blocks that repeat the cells' names.
    """
    if not cells:
        return "no cells"
    shown = ordered([record for _, record in cells])
    names = labels(shown)
    columns = summary_columns(shown, names)
    if len({record.get("role") for record in shown}) == 1:  # nothing to tell apart: save the width
        columns = [column for column in columns if column.title != "role"]
    text = as_text(columns, width or shutil.get_terminal_size((120, 24)).columns)
    failures = [f"✗ {name}: {' '.join(message.split())[:300]}" for name, message in errors(shown, names)]
    return "\n".join([text, *failures])
