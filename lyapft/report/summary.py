"""The closing table of a command."""

import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence

from lyapft.records import Record
from lyapft.report.cells import labels, ordered
from lyapft.report.columns import errors, summary_columns
from lyapft.report.tables import as_text
from lyapft.verdict.words import EMULATED, EMULATED_MEANS

MOST_CELLS, MOST_ERRORS = 300, 20  # that are printed


def summary_table(all_records: Sequence[Record], width: int | None = None) -> str:
    """The closing table of a study as plain text: a row per cell, then the error of each failed cell.

    Of more than 300 cells the first are shown, and how many there are of each status; of more than 20 errors the first.

    Args:
        all_records: of every cell of one study, at any stage.
        width: columns of the terminal (None asks it); a wider table is cut into blocks that repeat the cells' names.
    """
    if not all_records:
        return "no cells"
    found = ordered(all_records)
    named = dict(zip(map(id, found), labels(found), strict=True))
    shown = found if len(found) <= MOST_CELLS else found[:MOST_CELLS]
    columns = summary_columns(shown, [named[id(record)] for record in shown])
    if len({record.get("role") for record in shown}) == 1:  # nothing to tell apart: save the width
        columns = [column for column in columns if column.title != "role"]
    width = width or shutil.get_terminal_size((120, 24)).columns
    parts = [as_text(columns, width)]
    if len(shown) < len(found):
        counts = Counter(str(record.get("status")) for record in found).most_common()
        states = ", ".join(f"{count:,} {status}" for status, count in counts)
        parts.append(
            f"… the first {len(shown)} of {len(found):,} cells ({states}); "
            "all of them are in tables/cells.parquet beside the report"
        )
    if any(EMULATED in cell for column in columns for cell in column.cells if column.title == "tokens/s"):
        parts.append(textwrap.fill(EMULATED_MEANS, width))
    failed = errors(found, list(named.values()))
    parts += [f"✗ {name}: {' '.join(message.split())[:300]}" for name, message in failed[:MOST_ERRORS]]
    if more := len(failed) - MOST_ERRORS:
        parts += [f"✗ and {more:,} more: their errors are in the report and in each cell's log"] * (more > 0)
    return "\n".join(parts)
