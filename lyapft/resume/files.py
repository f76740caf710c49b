"""The checkpoint of a cell on disk: one rolling file and the one before it, each whole or absent, and checked."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lyapft.errors import NOT_JSON, InputError
from lyapft.records import flush, write_atomically
from lyapft.resume import tree

log = logging.getLogger(__name__)
STATE, CELL, CHECKSUM = "state", "cell", "sha256"  # metadata of the file


class CorruptCheckpoint(InputError):
    """A checkpoint that is not what was written, or was written by another cell."""


class CheckpointFiles(CheckpointIO):
    """Lightning's checkpoints as safetensors, tensors beside JSON: no pickle is written or read.

    A new checkpoint is written as the next and flushed to disk; then the newest becomes the one before, and the next
    the newest. At every moment one of the three is whole, and one that is found damaged is put aside: it never takes
    the place of a good one.

    Args:
        cell: id of the cell; the checkpoint of another one is as good as none.
    Attributes:
        newest, before: their paths.
    """

    def __init__(self, folder: Path, cell: str) -> None:
        self.cell = cell
        names = ("checkpoint", "checkpoint.before", "checkpoint.next", "checkpoint.damaged")
        self.newest, self.before, self._next, self._damaged = (folder / f"{name}.safetensors" for name in names)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint and let the others move on.

        Raises:
            OSError: it could not be written; the earlier ones are as they were.
            TypeError: something in it that is neither a number nor text nor a tensor.
        """
        text, tensors = tree.pack(checkpoint)
        metadata = {STATE: text, CELL: self.cell, CHECKSUM: checksum(self.cell, text, tensors)}
        write_atomically(self._next, lambda temporary: save_file(tensors, temporary, metadata))
        if self.newest.exists():
            os.replace(self.newest, self.before)
        os.replace(self._next, self.newest)
        flush(self.newest.parent)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint.

        Raises:
            CorruptCheckpoint: it is not what was written, or another cell wrote it.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            text, cell = metadata[STATE], metadata[CELL]
            if checksum(cell, text, tensors) != metadata[CHECKSUM]:
                raise CorruptCheckpoint(f"{path} is damaged: its checksum differs")
            if cell != self.cell:
                raise CorruptCheckpoint(f"{path} is the checkpoint of another cell ({cell}, not {self.cell})")
            return tree.unpack(text, tensors)
        except (SafetensorError, LookupError, TypeError, *NOT_JSON, OSError) as error:
            if isinstance(error, CorruptCheckpoint):
                raise
            raise CorruptCheckpoint(f"{path} cannot be read: {error}") from None

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole; one that is not is named in a warning and put aside.

        The next is the newest where a process died before it had moved on.
        """
        for path in (self._next, self.newest, self.before):
            if not path.exists():
                continue
            try:
                self.load_checkpoint(path)
            except CorruptCheckpoint as error:
                log.warning("%s; going on from the one before, or anew", error)
                os.replace(path, self._damaged)
                continue
            return path
        return None

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove one file."""
        Path(path).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove every file: the cell is done."""
        for path in (self.newest, self.before, self._next, self._damaged):
            path.unlink(missing_ok=True)


def checksum(cell: str, text: str, tensors: dict[str, Tensor]) -> str:
    """Of all that a checkpoint holds."""
    return tree.digest(f"{cell}\n{text}", tensors)
