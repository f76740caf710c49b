"""Schemas and atomic input/output of records, step series and per-item scores.

A run folder holds `record.json` (what happened), `steps.parquet` (one row per step), `items.parquet` (one row per
scored item), `stability.parquet` (the recurrence at the end of the training), `cell.log` and the trained tensors as
safetensors. A finished record is never overwritten.
"""

import errno
import io
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lyapft import holding
from lyapft.errors import NOT_JSON, InputError

SCHEMA_VERSION = 1
RECORD, STEPS, ITEMS, LOG = "record.json", "steps.parquet", "items.parquet", "cell.log"
LOCKS, TABLES = ".locks", "tables"  # folders of a study
STABILITY = "stability.parquet"
EXPERIMENTS = "experiments"  # folder of a study with the records of its experiments
STATUSES = ("ok", "nonfinite", "loss_scale_underflow", "stopped_by_guard", "oom", "interrupted", "failed", "running")
# of a folder that cannot be flushed: Windows opens none, some file systems have no such call, some may not be read
KEEPS_NAMES = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EBADF, errno.ENOTSUP)
# outcomes of the cell itself: running it again would say the same
FINAL = ("ok", "nonfinite", "loss_scale_underflow", "stopped_by_guard")
CUT_OFF = ("running", "interrupted")  # of a cell that nobody is at work on: it had no outcome yet
KINDS: dict[type, tuple[str, ...]] = {  # of a record's parts, for whoever reads it without asking
    str: ("id", "name", "study", "status", "role", "created"),
    dict: (
        "config", "choices", "environment", "files", "error", "model", "data", "peft", "precision", "training", "cost",
        "stability", "shadow", "validation", "kernels", "resumed",
    ),
    list: ("scores", "divergence", "oom", "alerts"),
}  # fmt: skip
NUMBER_OR_NONE = (int, float, type(None))  # a union in a loop over a million scores would be made a million times
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}")  # names that `write_atomically` gives to what is not whole yet

Record = dict[str, Any]
log = logging.getLogger(__name__)


def now() -> str:
    """The present moment, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def folders(study: Path) -> list[Path]:
    """The folders of a study that hold no cell."""
    return [study / name for name in (LOCKS, EXPERIMENTS, TABLES)]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to disk, then move it into place.

    A reader sees the old file or the new one, never half of either.

    Raises:
        LostLeaseError: the folder is another process's by now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        flush(temporary)
        holding.check(path.parent)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Have a file on disk, or the names in a folder, before anything that relies on them is written.

    Raises:
        OSError: the disk does not take it.
    """
    try:
        place = os.open(path, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
    except OSError as error:
        if not path.is_dir() or error.errno not in KEEPS_NAMES:
            raise


def is_final(record: Record | None) -> bool:
    """Whether the cell of this record is done and must not run again."""
    return record is not None and record.get("status") in FINAL


def save(folder: Path, record: Record) -> None:
    """Write `record.json`; a number that is not finite becomes null, as JSON has no other word for it.

    Raises:
        FileExistsError: the folder already holds the record of a finished cell.
        ValueError: an unknown status.
    """
    if record["status"] not in STATUSES:
        raise ValueError(f"status {record['status']!r} is not one of {', '.join(STATUSES)}")
    if (folder / RECORD).exists() and is_final(load(folder)):
        raise FileExistsError(f"{folder / RECORD} is a finished record and is never overwritten")
    save_json(folder / RECORD, record)


def save_divergence(folder: Path, entries: list[dict[str, Any]]) -> Record:
    """Complete a finished record by comparisons that could not be made when it was written; nothing else changes."""
    record = load(folder) | {"divergence": entries}
    save_json(folder / RECORD, record)
    return record


def save_dashboard(folder: Path, lost: dict[str, Any]) -> None:
    """Say in a record that was written what its W&B run lacks; nothing else changes."""
    save_json(folder / RECORD, load(folder) | {"dashboard": lost})


def save_json(path: Path, content: Any) -> None:
    """Write JSON atomically, numbers that are not finite as null."""
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: cast(None, temporary.write_text(text, encoding="utf-8")))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class NoRecord(InputError):
    """A folder without a record."""


def load(folder: Path | str, decode: Callable[[str], Any] = json.loads) -> Record:
    """Read `record.json` of a run folder.

    Args:
        decode: of its text, where a reader of many records has a quicker way.
    Raises:
        InputError: no record there (`NoRecord`), not JSON, or of another schema version.
    """
    path = os.path.join(folder, RECORD)  # a study has many: a Path, text mode or a buffer takes twice as long
    try:
        with open(path, "rb", buffering=0) as file:
            record = decode(file.read().decode("utf-8"))
    except FileNotFoundError:
        raise NoRecord(f"{folder} holds no {RECORD}: give the folder of a run, runs/STUDY/CELL") from None
    except NOT_JSON as error:
        raise InputError(
            f"{path} is not a readable record ({error}): delete the folder and run the cell again"
        ) from None
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {version!r}; this lyapft reads {SCHEMA_VERSION}")
    if wrong := _misfit(record):
        raise InputError(f"{path} is not a whole record: {wrong}. Delete the folder and run the cell again")
    return cast(Record, record)


def _misfit(record: Record) -> str | None:
    """The first part of a record that is there, but of another kind than every reader expects."""
    for kind, names in KINDS.items():
        for name in names:
            if (part := record.get(name)) is not None and not isinstance(part, kind):
                return f"{name} is a {type(part).__name__}, expected a {kind.__name__}"
    for name in (name for name in KINDS[list] if record.get(name)):
        if not all(isinstance(entry, dict) for entry in record[name]):
            return f"{name} has an entry that is no object"
    for score in record.get("scores") or ():
        text, shots, value = score.get("task"), score.get("shots"), score.get("value", "none")
        if not (isinstance(text, str) and isinstance(shots, int) and isinstance(value, NUMBER_OR_NONE)):
            return f"a score of {text!r} is not task, shots and value"
    return None


def load_study(study: Path) -> list[tuple[Path, Record]]:
    """Every record of a study with its folder, by folder name; one that cannot be read is named in a warning.

    Raises:
        InputError: the folder is missing or holds no record that can be read.
    """
    if not study.is_dir():
        raise InputError(f"{study} is not a folder: give the folder of a study, runs/STUDY")
    found = []
    for path in sorted(study.glob(f"*/{RECORD}")):
        try:
            found.append((path.parent, load(path.parent)))
        except InputError as error:
            log.warning("%s", error)
    if not found:
        raise InputError(f"{study} holds no records (*/{RECORD}): run `python train.py` first, or give runs/STUDY")
    return found


def accuracies(record: Record) -> list[dict[str, Any]]:
    """The scores by which cells are compared: metric `acc`, one per task and number of shots.

    Other metrics (`acc_norm`) stand beside them in the record and are shown, never mixed into a divergence.

    >>> accuracies({"scores": [{"metric": "acc", "value": 0.5}, {"metric": "acc_norm", "value": 0.6}]})
    [{'metric': 'acc', 'value': 0.5}]
    """
    return [score for score in record.get("scores") or [] if score.get("metric", "acc") == "acc"]


def costs(record: Record) -> dict[str, Any]:
    """The costs by which cells are compared: none where memory ran out on the way and a batch went through in parts.

    >>> costs({"cost": {"tokens_per_s": 900.0}, "oom": [{"step": 3, "rows": 4}]})
    {}
    """
    return {} if record.get("oom") else record.get("cost") or {}


def is_seedless(record: Record) -> bool:
    """Whether its seed changes nothing: a pretrained model that is not trained is one cell for all seeds."""
    config = record.get("config") or {}
    steps, init = ((config.get(part) or {}).get(name) for part, name in (("trainer", "steps"), ("model", "init")))
    return bool(steps == 0 and init == "pretrained")


def divergence_entry(record: Record, counterpart: str) -> dict[str, Any] | None:
    """The record's divergence from one kind of counterpart, if it has any entry for it."""
    entries: list[dict[str, Any]] = record.get("divergence") or []
    for entry in entries:  # a large study asks a million times, which a generator would take twice as long for
        if entry.get("counterpart") == counterpart:
            return entry
    return None


class StepSeries:
    """Rows of numbers, one per training step, kept in memory and written whole.

    Writing the whole file each time keeps it a plain Parquet file; 100,000 steps of 20 columns are 16 MB.
    """

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: of the file; None writes none, where another process does.
        """
        self.path = path
        self.rows: list[dict[str, float | int | bool]] = []

    def append(self, row: dict[str, float | int | bool]) -> None:
        """Add the numbers of one step."""
        self.rows.append(row)

    def table(self) -> pd.DataFrame:
        """All rows so far."""
        return pd.DataFrame(self.rows)

    def packed(self) -> NDArray[np.uint8]:
        """All rows so far as the bytes of a Parquet file."""
        return np.frombuffer(self.table().to_parquet(index=False), dtype=np.uint8).copy()

    def unpack(self, packed: NDArray[np.uint8]) -> None:
        """Take up the rows that `packed` gave."""
        frame = pd.read_parquet(io.BytesIO(packed.tobytes()))
        self.rows = cast("list[dict[str, float | int | bool]]", frame.to_dict("records"))

    def flush(self) -> None:
        """Write all rows so far, atomically."""
        if self.rows and self.path is not None:
            frame = self.table()
            write_atomically(self.path, lambda path: frame.to_parquet(path, index=False))


def save_stability(folder: Path, table: pd.DataFrame) -> None:
    """Write the spectrum, sequences and positions of a cell's recurrent layers, atomically."""
    write_atomically(folder / STABILITY, lambda path: table.to_parquet(path, index=False))


def save_items(folder: Path, items: pd.DataFrame) -> None:
    """Write the per-item scores of a cell, atomically."""
    write_atomically(folder / ITEMS, lambda path: items.to_parquet(path, index=False))


def remove_leftovers(folder: Path) -> None:
    """Remove what `write_atomically` had begun below a folder when its process was killed; call it under a lock."""
    for path in folder.glob(".*"):
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
