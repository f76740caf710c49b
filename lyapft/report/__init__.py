"""Reports of a study, made from its records alone: one HTML page, the verdict's tables, a table for the terminal.

`python -m lyapft.report runs/STUDY [--output FILE] [--margin POINTS] [--speed-weight W] [--memory-weight W]`
"""

from pathlib import Path

from lyapft import records
from lyapft.errors import InputError
from lyapft.plan import file
from lyapft.report import exports
from lyapft.report.cells import Study, load_study
from lyapft.report.page import render
from lyapft.report.summary import summary_table
from lyapft.verdict import Settings, judge

__all__ = ["DEFAULT_NAME", "Study", "load_study", "summary_table", "write"]

DEFAULT_NAME = "report.html"


def write(
    study: Path, output: Path | None = None, settings: Settings | None = None, found: Study | None = None
) -> Path:
    """Write the page of a study, and the verdict's files beside it; works at any moment of the study.

    Args:
        study: folder of a study, runs/STUDY.
        output: the page; None is `report.html` in the study's folder.
        settings: margin, risk and cost weights of the verdict.
        found: what `load_study` found, where that has been called already.
    Returns:
        Where the page is.
    Raises:
        InputError: no such folder, no record in it, or `output` cannot be written.
    """
    found = found or load_study(study)
    items = {str(cell.record["id"]): cell.items for cell in found.cells if cell.items is not None}
    finished = [cell.record for cell in found.cells]
    verdict = judge(finished, items, settings, file.outstanding(file.load(study), finished))
    page = render(found, verdict)
    target = output or study / DEFAULT_NAME
    if target.is_dir():
        raise InputError(f"{target} is a folder: give the file to write, such as {target / DEFAULT_NAME}")
    try:
        records.write_atomically(target, lambda path: _write_text(path, page))
        exports.write(target.parent, verdict, found.cells)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}): give another place with --output") from None
    return target


def _write_text(path: Path, page: str) -> None:
    path.write_text(page, encoding="utf-8")
