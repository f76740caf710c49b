"""Reading users' files, with errors that name the file, the line and what to do."""

import json
import re
from pathlib import Path
from typing import Any

from lyapft.errors import InputError

Row = dict[str, Any]
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def local_files(path: str, suffixes: tuple[str, ...]) -> list[Path] | None:
    """The files that a path means: itself, or those of a fitting suffix in a folder; None for a data set's name.

    Raises:
        InputError: no such file, or a folder without a fitting one.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        found = sorted(p for p in given.iterdir() if p.suffix in suffixes)
        if not found:
            raise InputError(f"data.path={path}: the folder has no {' or '.join(suffixes)} file")
        return found
    if given.exists():
        return [given]
    if HUB_NAME.fullmatch(path) and given.suffix not in suffixes:
        return None
    raise InputError(f"data.path={path} does not exist; relative paths start at {Path.cwd()}")


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        InputError: it is empty, or not UTF-8, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, byte {error.start}: not UTF-8 text; convert the file first") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def read_json(path: Path) -> list[Row]:
    """The rows of a JSON list, or of JSON lines.

    Raises:
        InputError: the file is empty, holds invalid JSON (named by its line), or something else than objects.
    """
    text = read_text(path)
    rows = _parse(path, text, 1) if text.lstrip().startswith("[") else _parse_lines(path, text)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} holds no rows")
    for number, row in enumerate(rows, 1):
        _check_object(f"{path}, row {number}", row)
    return rows


def parse_line(path: Path, line: str, number: int) -> Row:
    """The row of one line of a file of JSON lines.

    Raises:
        InputError: invalid JSON, or something else than an object.
    """
    row: Row = _parse(path, line.rstrip("\n"), number)
    _check_object(f"{path}, line {number}", row)
    return row


def _check_object(where: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with named fields, found {row!r:.60}")


def _parse_lines(path: Path, text: str) -> list[Any]:
    # not splitlines(): JSON strings may hold other line separators of Unicode as they are
    return [_parse(path, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {first_line + error.lineno - 1}, column {error.colno}: invalid JSON ({error.msg}); "
            f"expected one JSON list of objects, or one object per line"
        ) from None
    except RecursionError:
        raise InputError(f"{path}, line {first_line}: JSON that is nested too deep to be rows") from None


def check_columns(where: str, rows: list[Row], expected: tuple[str, ...]) -> None:
    """Refuse rows of which none has an expected column.

    Raises:
        InputError: names the columns that are expected and those that were found.
    """
    found = list(dict.fromkeys(key for row in rows for key in row))
    if missing := [column for column in expected if column not in found]:
        raise InputError(
            f"{where}: no column {', '.join(missing)}; expected {', '.join(expected)}, found "
            f"{', '.join(found) or 'none'}: rename the columns or choose another data="
        )
