"""Users' own data: instructions (Alpaca), conversations (ShareGPT, OpenHermes), plain text.

A source is read and checked whole when its fingerprint or examples are first asked for, before any weight is loaded.
JSON is parsed by `files`, since only so an error can name its line; rows then live in a `datasets.Dataset`, as those of
a data set on the hub do. With `streaming` its rows are never held: `streaming` reads them as the training needs them.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from lyapft.data.examples import Example, Segment, digest
from lyapft.data.files import Row, check_columns, local_files, read_json, read_text
from lyapft.data.hub import commit_of, load_rows, stream_rows
from lyapft.data.readers import ENDS, PIECE, START, Files, Reader, Stamp, content, read_pieces, read_rows, stamp
from lyapft.errors import InputError

log = logging.getLogger(__name__)
ENOUGH = 1000  # rows of which the share of bad ones says something


@dataclass
class Table(ABC):
    """Rows with named columns, from a local file or folder or a data set's name.

    Args:
        path: where the rows are.
        max_bad_fraction: share of rows with missing, null or non-string fields that stops the run; fewer are left out.
        limit: use the first N good rows only.
        split: of a data set on the hub.
        streaming: never hold all rows; `examples` and `rows_bad` are not asked for then, `reader` is.
        shuffle_buffer: examples that are held, and shuffled among themselves.
        workers: processes that read ahead.
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
    streaming: bool = False
    shuffle_buffer: int = 4096
    workers: int = 0
    packed: bool = field(default=False, init=False)
    ordered: bool = field(default=False, init=False)

    columns: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[tuple[str, ...]] = (".json", ".jsonl", ".parquet")

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.max_bad_fraction <= 1:
            wrong.append(f"data.max_bad_fraction={self.max_bad_fraction} must lie between 0 and 1")
        for key, least in (("shuffle_buffer", 1), ("workers", 0)):
            if (value := getattr(self, key)) < least:
                wrong.append(f"data.{key}={value} must be at least {least}")
        if wrong:
            raise InputError("\n".join(wrong))

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
        return [row for row, _ in read_rows(file, START)] if file.suffix == ".parquet" else read_json(file)

    @cached_property
    def _checked(self) -> tuple[Dataset, int]:
        """The good rows (with `row`, their number from 1) and the number of bad ones."""
        rows = self._rows()
        good = self._usable(rows)
        kept = [{"row": number, **self.used(rows[number - 1])} for number in good[: self.limit]]
        return Dataset.from_list(kept), len(rows) - len(good)

    def _usable(self, rows: list[Row]) -> list[int]:
        """Numbers of the good ones, from 1.

        Raises:
            InputError: a column that none has, too many bad rows, or no good one.
        """
        check_columns(f"data.path={self.path}", rows, self.columns)
        faults = {number: fault for number, row in enumerate(rows, 1) if (fault := self.fault(row))}
        self.report(len(faults), len(rows), next(iter(faults.items()), None))
        if len(faults) == len(rows):
            raise InputError(f"data.path={self.path}: no usable row")
        return [number for number in range(1, len(rows) + 1) if number not in faults]

    def report(self, bad: int, total: int, first: tuple[int, str] | None) -> None:
        """Warn of bad rows among those that were read.

        Args:
            first: number and fault of one of them; without it, nobody is told of a few.
        Raises:
            InputError: there are too many.
        """
        share = bad / total if total else 0.0
        message = (
            f"data.path={self.path}: {bad} of {total} rows ({share:.1%}) have missing, null or non-string fields"
            + (f"; the first is row {first[0]} ({first[1]})" if first else "")
        )
        if share > self.max_bad_fraction:
            allow = math.ceil(share * 100) / 100
            raise InputError(f"{message}. Mend them, or leave them out with data.max_bad_fraction={allow:g}")
        if first:
            log.warning("%s; they are left out", message)

    @cached_property
    def _files(self) -> list[Path] | None:
        if self.path is None:
            raise InputError(f"data={self.name} needs data.path=FILE, a folder of files, or a data set's name")
        return local_files(self.path, self.suffixes)

    def _rows(self) -> list[Row]:
        if self._files is None:
            return load_rows(str(self.path), self.split)
        return [row for file in self._files for row in self.read(file)]

    def reader(self) -> Reader:
        """The rows from the first one on, for `streaming`."""
        if self._files is None:
            return stream_rows(str(self.path), self.split, self._commit)
        return Files(self._files, read_rows, self._stamps)

    @cached_property
    def _stamps(self) -> list[Stamp]:
        """Of the files, before anything of what is streamed is read: kept for every cell that trains on this table."""
        return [stamp(file) for file in self._files or ()]

    @property
    def reader_limit(self) -> int | None:
        """How many good rows of the reader to use."""
        return self.limit

    @cached_property
    def _commit(self) -> str:
        return commit_of(str(self.path))

    @cached_property
    def _content(self) -> str:
        """Of what is streamed, whose first rows are looked at."""
        found = self._commit if self._files is None else content(self._files, self._stamps)
        rows = list(islice(self.reader(), max(ENOUGH, self.shuffle_buffer)))
        self._usable(rows)
        return found

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
        """SHA-256 of the rows' text as it is used; of what is streamed, of the files or the hub's commit."""
        return self._content if self.streaming else digest(self.examples())


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
        last = len(pieces) - 1 if row.get(ENDS, True) else None
        return tuple(Segment(piece, target=True, end=i == last) for i, piece in enumerate(pieces))

    def read(self, file: Path) -> list[Row]:
        return [{"text": read_text(file)}]

    def reader(self) -> Reader:
        """Files in pieces; the first N of them where there is a limit."""
        return super().reader() if self._files is None else Files(self._files[: self.limit], read_pieces, self._stamps)

    @property
    def reader_limit(self) -> int | None:
        """None for files, of which no more are read."""
        return self.limit if self._files is None else None
