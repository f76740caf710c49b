"""Users' own data: instructions (Alpaca), conversations (ShareGPT, OpenHermes), plain text.

A source is read and checked whole when its fingerprint or examples are first asked for, before any weight is loaded.
JSON is parsed by `files`, since only so an error can name its line; rows then live in a `datasets.Dataset`, as those of
a data set on the hub do.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from lyapft.data.examples import Example, Segment, digest
from lyapft.data.files import Row, check_columns, local_files, read_json, read_text
from lyapft.data.hub import load_rows
from lyapft.errors import InputError

log = logging.getLogger(__name__)
PIECE = 10_000  # characters of plain text tokenised at once


@dataclass
class Table(ABC):
    """Rows with named columns, from a local file or folder or a data set's name.

    Args:
        path: where the rows are.
        max_bad_fraction: share of rows with missing, null or non-string fields that stops the run; fewer are left out.
        limit: use the first N good rows only.
        split: of a data set on the hub.
    Raises:
        InputError: from `examples` and `fingerprint`, whatever is wrong with the input.
    """

    name: str
    path: str | None = None
    max_length: int = 512
    packing: bool = False
    max_bad_fraction: float = 0.01
    limit: int | None = None
    split: str = "train"
    packed: bool = field(default=False, init=False)
    ordered: bool = field(default=False, init=False)

    columns: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[tuple[str, ...]] = (".json", ".jsonl")

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise InputError(f"data.max_bad_fraction={self.max_bad_fraction} must lie between 0 and 1")

    @abstractmethod
    def fault(self, row: Row) -> str | None:
        """What is wrong with a row's fields, or None."""

    @abstractmethod
    def segments(self, row: Row) -> tuple[Segment, ...]:
        """A good row as text."""

    def used(self, row: Row) -> Row:
        """What of a good row is kept."""
        return {column: row.get(column) for column in self.columns}

    def read(self, file: Path) -> list[Row]:
        """The rows of one local file."""
        return read_json(file)

    @cached_property
    def _checked(self) -> tuple[Dataset, int]:
        """The good rows (with `row`, their number from 1) and the number of bad ones."""
        rows = self._rows()
        check_columns(f"data.path={self.path}", rows, self.columns)
        faults = {number: fault for number, row in enumerate(rows, 1) if (fault := self.fault(row))}
        if faults:
            self._report(faults, len(rows))
        good = [{"row": number, **self.used(row)} for number, row in enumerate(rows, 1) if number not in faults]
        if not good:
            raise InputError(f"data.path={self.path}: no usable row")
        return Dataset.from_list(good[: self.limit]), len(faults)

    def _report(self, faults: dict[int, str], total: int) -> None:
        first, fault = next(iter(faults.items()))
        share = len(faults) / total
        message = (
            f"data.path={self.path}: {len(faults)} of {total} rows ({share:.1%}) have missing, null or non-string "
            f"fields; the first is row {first} ({fault})"
        )
        if share > self.max_bad_fraction:
            allow = math.ceil(share * 100) / 100
            raise InputError(f"{message}. Mend them, or leave them out with data.max_bad_fraction={allow:g}")
        log.warning("%s; they are left out", message)

    def _rows(self) -> list[Row]:
        if self.path is None:
            raise InputError(f"data={self.name} needs data.path=FILE, a folder of files, or a data set's name")
        files = local_files(self.path, self.suffixes)
        if files is None:
            return load_rows(self.path, self.split)
        return [row for file in files for row in self.read(file)]

    @property
    def rows_bad(self) -> int:
        """Rows that were left out."""
        return self._checked[1]

    def examples(self) -> Iterator[Example]:
        """Every good row."""
        row: Any
        for row in self._checked[0]:
            yield Example(f"row {row['row']}", self.segments(row))

    def fingerprint(self) -> str:
        """SHA-256 of the rows' text as it is used."""
        return digest(self.examples())


def _not_string(row: Row, column: str) -> str | None:
    """What a field is if it is not a string."""
    value = row.get(column)
    if isinstance(value, str):
        return None
    return f"{column} is {'missing' if column not in row else 'null' if value is None else type(value).__name__}"


class Alpaca(Table):
    """Instructions, `{instruction, input, output}`: the input may be empty, the loss is on the output."""

    columns = ("instruction", "input", "output")

    def fault(self, row: Row) -> str | None:
        return next((fault for column in self.columns if (fault := _not_string(row, column))), None)

    def segments(self, row: Row) -> tuple[Segment, ...]:
        context = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        prompt = f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"
        return Segment(prompt, target=False), Segment(row["output"], target=True, end=True)


class Sharegpt(Table):
    """Conversations of several turns, `{conversations: [{from, value}, …]}`; the loss is on every assistant turn."""

    columns = ("conversations",)
    assistants: ClassVar[tuple[str, ...]] = ("gpt", "assistant", "chatgpt")
    speakers: ClassVar[dict[str, str]] = {"human": "User", "user": "User", "system": "System"}

    def fault(self, row: Row) -> str | None:
        turns = row.get("conversations")
        if not isinstance(turns, list) or not turns:
            return "conversations is not a list of turns"
        for number, turn in enumerate(turns, 1):
            if not isinstance(turn, dict):
                return f"turn {number} is no object"
            if fault := _not_string(turn, "from") or _not_string(turn, "value"):
                return f"turn {number}: {fault}"
            if turn["from"] not in self.assistants and turn["from"] not in self.speakers:
                return f"turn {number}: from={turn['from']!r} is unknown"
        return None

    def used(self, row: Row) -> Row:
        """Speaker and text of each turn: other keys may hold anything."""
        return {"conversations": [{key: turn[key] for key in ("from", "value")} for turn in row["conversations"]]}

    def segments(self, row: Row) -> tuple[Segment, ...]:
        segments: list[Segment] = []
        for turn in row["conversations"]:
            gap = "\n\n" if segments else ""
            if turn["from"] in self.assistants:
                segments.append(Segment(f"{gap}Assistant:", target=False))
                segments.append(Segment(f" {turn['value']}", target=True, end=True))
            else:
                segments.append(Segment(f"{gap}{self.speakers[turn['from']]}: {turn['value']}", target=False))
        return tuple(segments)


@dataclass
class TextFile(Table):
    """Plain text, joined and cut into blocks; the loss is on every token. A data set by name has a column `text`."""

    columns: ClassVar[tuple[str, ...]] = ("text",)
    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.packed = True

    def fault(self, row: Row) -> str | None:
        return _not_string(row, "text")

    def segments(self, row: Row) -> tuple[Segment, ...]:
        # whole lines to a piece, so that no word is cut in two
        pieces = [""]
        for line in row["text"].splitlines(keepends=True):
            if len(pieces[-1]) > PIECE:
                pieces.append("")
            pieces[-1] += line
        return tuple(Segment(piece, target=True, end=i == len(pieces) - 1) for i, piece in enumerate(pieces))

    def read(self, file: Path) -> list[Row]:
        return [{"text": read_text(file)}]
