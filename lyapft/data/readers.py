"""Rows of files one after the other, from any place on: what need not fit in memory.

A reader is iterated, and told or asked where it is by `load_state_dict` and `state_dict`, as a streamed data set of the
hub is (`datasets.IterableDataset`). A file's own part of that is a position: bytes and lines of a text, rows of a
Parquet file.
"""

import hashlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
from pyarrow import ArrowException

from lyapft.data.files import Row, parse_line
from lyapft.errors import InputError

PIECE = 10_000  # characters of plain text tokenised at once
BEGINS, ENDS = "lyapft:begins", "lyapft:ends"  # of a piece: whether its text does; no column is called so
LONGEST = 16 * 2**20  # bytes of a line that are held
AT_ONCE = 1024  # rows of a Parquet file in memory
Position = Sequence[int]  # bytes and lines, or rows, that were read of a file
START: Position = (0, 0)
Stamp = tuple[int, int, int]  # bytes, time of change in ns, inode


class Reader(Protocol):
    """Rows in the data's own order."""

    def __iter__(self) -> Iterator[Row]:
        """Those that come after the loaded state, or all."""

    def state_dict(self) -> dict[str, Any]:
        """The place behind the row that was given last, as numbers and text."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration start there."""


class Files:
    """The rows of local files, one file after the other.

    Args:
        files: in their order.
        read: the rows of one file behind a position, each with the position behind it.
        known: their stamps when their content was looked at; a row of any other content is never given.
    Raises:
        InputError: when iterated, from `read`; or a file has changed since.
    """

    def __init__(
        self,
        files: Sequence[Path],
        read: Callable[[Path, Position], Iterator[tuple[Row, Position]]],
        known: Sequence[Stamp],
    ) -> None:
        self.files, self.read, self.known = files, read, known
        self._file, self._position = 0, START

    def __iter__(self) -> Iterator[Row]:
        while self._file < len(self.files):
            yield from self._rows(self.files[self._file], self.known[self._file])
            self._file, self._position = self._file + 1, START

    def _rows(self, path: Path, known: Stamp) -> Iterator[Row]:
        """Of one file, asked before each row and at the end, where lines may be missing, whether it is the same."""
        _check(path, known)
        try:
            for row, position in self.read(path, self._position):
                _check(path, known)
                self._position = position
                yield row
        except (InputError, OSError) as error:
            _check(path, known)  # what is wrong may have come with the change
            raise _readable(path, error) from None
        _check(path, known)

    def state_dict(self) -> dict[str, Any]:
        """File and position."""
        return {"file": self._file, "position": list(self._position)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._file, self._position = state_dict["file"], state_dict["position"]


def read_rows(path: Path, position: Position) -> Iterator[tuple[Row, Position]]:
    """The rows of a Parquet file, by its suffix, or of JSON lines.

    Raises:
        InputError: neither of the two, or damaged.
    """
    read = _parquet if path.suffix == ".parquet" else _json_lines
    return read(path, position)


def read_pieces(path: Path, position: Position) -> Iterator[tuple[Row, Position]]:
    """A text in pieces of some `PIECE` characters, whole lines each, with `BEGINS` and `ENDS`.

    Raises:
        InputError: not UTF-8.
    """
    size, piece, begins = path.stat().st_size, "", not position[0]
    for line, behind in _lines(path, position):
        piece += _decoded(path, line, behind[1]).replace("\r\n", "\n").replace("\r", "\n")
        ends = behind[0] == size
        if len(piece) > PIECE or ends:
            yield {"text": piece, BEGINS: begins, ENDS: ends}, behind
            piece, begins = "", False


def _json_lines(path: Path, position: Position) -> Iterator[tuple[Row, Position]]:
    if _first_byte(path) == b"[":
        raise InputError(
            f"{path} is one JSON list, which has to be read whole: make it JSON lines, one object per line, or set "
            "data.streaming=false"
        )
    for line, behind in _lines(path, position):
        text, number = _decoded(path, line, behind[1]), behind[1]
        if text.strip():
            yield parse_line(path, text, number), behind


def _first_byte(path: Path) -> bytes:
    """That is not blank, nor of a byte order mark."""
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        return next((found[:1] for block in iter(partial(file.read, 2**16), b"") if (found := block.lstrip())), b"")


def _lines(path: Path, position: Position) -> Iterator[tuple[bytes, Position]]:
    offset, number = position
    with path.open("rb") as file:
        file.seek(offset)
        while line := file.readline(LONGEST + 1):
            offset, number = offset + len(line), number + 1
            if len(line) > LONGEST:
                raise InputError(
                    f"{path}, line {number}, is longer than the {LONGEST} bytes of which a streamed line may be: break "
                    "it, or set data.streaming=false"
                )
            yield line, (offset, number)


def _decoded(path: Path, line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number}, byte {error.start}: not UTF-8 text; convert the file first") from None


def _parquet(path: Path, position: Position) -> Iterator[tuple[Row, Position]]:
    done = position[0]
    try:
        with pq.ParquetFile(path) as file:
            groups, before = list(range(file.num_row_groups)), 0
            while groups and before + (rows := file.metadata.row_group(groups[0]).num_rows) <= done:
                before += rows
                groups.pop(0)
            batches = file.iter_batches(AT_ONCE, row_groups=groups)
            rows_left = islice((row for batch in batches for row in batch.to_pylist()), done - before, None)
            for row in rows_left:
                done += 1
                yield row, (done, done)
    except (ArrowException, OSError, ValueError) as error:  # what Arrow says of other bytes than it expects
        raise InputError(f"{path} is no Parquet file, or a damaged one: {error}") from None


def content(files: Sequence[Path], known: Sequence[Stamp]) -> str:
    """SHA-256 over the bytes of files, in their order.

    Args:
        known: their stamps, taken before.
    Raises:
        InputError: a file that cannot be read.
    """
    digests = [_digest(file, stamped) for file, stamped in zip(files, known, strict=True)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def stamp(path: Path) -> Stamp:
    """What tells a file from one that was changed, or put in its place: size, time of change and inode.

    Raises:
        InputError: it is empty or cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise _readable(path, error) from None
    if not found.st_size:
        raise InputError(f"{path} is empty")
    return found.st_size, found.st_mtime_ns, found.st_ino


def _check(path: Path, known: Stamp) -> None:
    try:
        same = stamp(path) == known
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"{path} has changed while the cell trained on it: leave the file alone and start again; with other "
            "content it is another cell"
        )


def _readable(path: Path, error: InputError | OSError) -> InputError:
    return error if isinstance(error, InputError) else InputError(f"{path} cannot be read: {error.strerror}")


@cache
def _digest(path: Path, known: Stamp) -> str:
    """Of one file; asked once per process, as every cell of a sweep asks."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _readable(path, error) from None
