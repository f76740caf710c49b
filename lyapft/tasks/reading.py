"""Rows of published evaluation sets, from local files (csv, jsonl) or by name through `datasets`."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lyapft.errors import InputError


def existing(path: str, kind: str) -> Path:
    """`path` as a Path, when it is there and a `kind` ("file" or "folder").

    Raises:
        InputError: nothing there, or the other kind of thing.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(
            f"task.path={path}: no such {kind}. Give an existing one, or task.path=null to load the data set by name."
        )
    if found.is_dir() != (kind == "folder"):
        other = "a folder" if found.is_dir() else "a file"
        raise InputError(f"task.path={path} is {other}; this task reads a {kind}. Point task.path at the {kind}.")
    return found


def read_text(path: Path) -> str:
    """The UTF-8 text of a file that is not empty.

    Raises:
        InputError: unreadable, not UTF-8, or empty.
    """
    try:
        # Without a byte order mark, and with the line ends inside quoted fields as they are.
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty. Give a file with at least one row.")
    return text


def read_jsonl(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank; every object has the named keys.

    Raises:
        InputError: a line is no JSON object, or lacks a column (expected and found are named).
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: invalid JSON ({error.msg}, column {error.colno}). One JSON object per line."
            ) from None
        except RecursionError:
            raise InputError(f"{path}, line {number}: nested too deep. One JSON object per line.") from None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number}: expected a JSON object, found {type(row).__name__}. One JSON object per line."
            )
        require_columns(row, columns, f"{path}, line {number}")
        rows.append((number, row))
    return rows


def require_columns(row: dict[str, Any], columns: tuple[str, ...], where: str) -> None:
    """Raise InputError unless the row has all the columns."""
    if missing := [column for column in columns if column not in row]:
        raise InputError(
            f"{where}: column {', '.join(missing)} is missing. "
            f"Expected {', '.join(columns)}; found {', '.join(row) or 'none'}."
        )


def read_csv(path: Path, width: int) -> list[tuple[int, list[str]]]:
    """(line number, fields) of a CSV file without a header; every row has `width` fields, newlines allowed in quotes.

    Raises:
        InputError: not CSV, or a row with another number of fields.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    rows: list[tuple[int, list[str]]] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if len(fields) != width:
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, expected {width}. "
                    "Quote fields that contain commas."
                )
            rows.append((reader.line_num, fields))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: invalid CSV ({error}).") from None
    return rows


def load_by_name(dataset: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """All rows of one split of a data set on the hub (or in the local cache of `datasets`).

    Raises:
        InputError: the hub cannot be reached and nothing is cached, or it has no such data set.
    """
    import datasets

    with _no_retries_when_unreachable() as reachable:
        try:
            return [dict(row) for row in datasets.load_dataset(dataset, config, split=split)]
        except Exception as error:  # the hub client raises a dozen unrelated types, all of which mean this
            why = (
                "" if reachable else " (the hub cannot be reached from here and the data set is not in the local cache)"
            )
            named = ", ".join([dataset, *([f"configuration {config}"] if config else []), f"split {split}"])
            raise InputError(
                f"data set {named} could not be loaded by name{why}: "
                f"{type(error).__name__}. Give local files with task.path=…, or run once with a network."
            ) from error


@contextmanager
def _no_retries_when_unreachable() -> Iterator[bool]:
    """Put the hub client into its offline mode while the hub is silent: to fail takes a second, not half a minute."""
    import datasets
    import huggingface_hub
    from huggingface_hub.utils import get_session

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        reachable = True
    except Exception:  # noqa: BLE001 - any failure to connect; the types differ between versions of the client
        reachable = False
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield reachable
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
