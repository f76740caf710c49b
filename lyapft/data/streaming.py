"""Data larger than memory: rows are read, tokenised and shuffled a window at a time, and never held beyond it.

A window is what the next `shuffle_buffer` examples make: an ordinary data set in memory, packed if wanted, whose order
the seed, the pass and the window's number give. So a place in the data is a few numbers (`Place`): the window is read
again and its rows that were given are passed over. Several processes draw the same rows in the same order, and each
takes its share of the batches, as `batches.Order` has it.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from lyapft.data.batches import TokenDataset, nothing_left, pad_id, shuffled, token_rows
from lyapft.data.examples import Example
from lyapft.data.files import Row
from lyapft.data.packing import pack
from lyapft.data.readers import BEGINS, Reader
from lyapft.data.sources import ENOUGH, Table
from lyapft.errors import InputError

Batch = dict[str, Tensor]
COUNTED = ("rows", "rows_dropped", "rows_truncated", "rows_bad", "tokens", "target_tokens")
# what asks a process to end
ASKED = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}


@dataclass(frozen=True)
class Place:
    """Where in the data one is, between two items (rows, or packs).

    Attributes:
        passes: that are over.
        window: its number in this pass. given: of its items.
        examples: and rows, read: of this pass before this window; good examples, their rows, and rows with bad ones.
        reader: the state of the reader where the window begins; None at the very beginning.
        counts: of all passes, before this window: COUNTED.
    """

    passes: int = 0
    window: int = 0
    given: int = 0
    examples: int = 0
    rows: int = 0
    read: int = 0
    reader: dict[str, Any] | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))


@dataclass(frozen=True)
class Window:
    """A part of a pass: its rows, where it begins, where the next one does, and whether it is the last."""

    rows: TokenDataset
    place: Place
    behind: Place
    last: bool


@dataclass
class Stream:
    """The rows of a table for ever, a window at a time.

    Args:
        table: whose `shuffle_buffer` is the size of a window.
        content: its fingerprint.
        start: where a pass begins: behind what is kept from training.
    Attributes:
        counts: COUNTED, of what the training has read so far, all passes.
    """

    table: Table
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    content: str
    packing: bool = False
    start: Place = field(default_factory=Place)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))

    def split(self, held_out: int) -> tuple["Stream", TokenDataset | None]:
        """All but the rows of the first `held_out` examples, and those; nothing where none are held out.

        Raises:
            InputError: there are no more than those.
        """
        if not held_out:
            return self, None
        reader, rows = self._opened(self.start)
        first = replace(self, packing=False)._next(reader, rows, self.start, held_out)
        if first.last or not len(first.rows) or next(rows, None) is None:
            raise InputError(f"trainer.validation_rows={held_out} leaves nothing of {self.table.name} to train on")
        fresh = replace(first.behind, window=0, counts=self.start.counts)
        return replace(self, start=fresh), first.rows

    def windows(self, place: Place) -> Iterator[Window]:
        """Windows from the one of a place on, pass after pass.

        Raises:
            InputError: a pass without a row; too many bad rows, or a file that cannot be read.
        """
        while True:
            reader, rows = self._opened(place)
            last = False
            while not last:
                window = self._next(reader, rows, place, self.table.shuffle_buffer)
                place, last = window.behind, window.last
                if len(window.rows):
                    yield window
            if place.rows == self.start.rows:
                counts = place.counts
                raise nothing_left(self.table.name, self.max_length, counts["rows_dropped"], counts["rows_bad"])
            place = replace(self.start, passes=place.passes + 1, counts=place.counts)

    def batches(self, batch_size: int, steps: int, seed: int) -> "StreamedBatches":
        """`steps` batches, as those of rows in memory; see there."""
        return StreamedBatches(self, batch_size, steps, seed)

    def record(self) -> dict[str, Any]:
        """What a cell's record says of its data: of what was read so far, in all passes."""
        return {"name": self.table.name, "hash": self.content, "streamed": True} | self.counts

    def _opened(self, place: Place) -> tuple[Reader, Iterator[Row]]:
        reader = self.table.reader()
        if place.reader is not None:
            reader.load_state_dict(place.reader)
        return reader, iter(reader)

    def _next(self, reader: Reader, rows: Iterator[Row], place: Place, size: int) -> Window:
        """The window of the next `size` examples."""
        limit = self.table.reader_limit
        wanted = size if limit is None else min(size, limit - place.examples)
        examples, read = good_examples(self.table, rows, wanted, place.read)
        lost = {"rows_dropped": 0, "rows_truncated": 0}
        kept = token_rows(examples, self.tokenizer, self.max_length, self.table.packed, lost)
        data = TokenDataset.of(
            kept, name=self.table.name, hash=self.content, pad_id=pad_id(self.tokenizer), first=place.rows
        )
        more = {"rows": len(data), "tokens": len(data.ids), "target_tokens": data.target_tokens}
        more |= lost | {"rows_bad": read - len(examples)}
        behind = replace(
            place,
            window=place.window + 1,
            given=0,
            examples=place.examples + len(examples),
            rows=place.rows + len(data),
            read=place.read + read,
            reader=reader.state_dict(),
            counts={key: place.counts[key] + more[key] for key in COUNTED},
        )
        last = len(examples) < size
        bad, total = behind.read - behind.examples, behind.read
        if last or total >= ENOUGH:
            self.table.report(bad, total, first=None)
        return Window(pack(data, self.max_length) if self.packing else data, place, behind, last)


def good_examples(table: Table, rows: Iterator[Row], wanted: int, before: int = 0) -> tuple[list[Example], int]:
    """The next examples of a table, so many as are wanted or left, and how many rows were read for them.

    Args:
        before: rows of the pass that were read before these: an example is named by its row.
    """
    good: list[Example] = []
    read = 0
    while len(good) < wanted and (row := next(rows, None)) is not None:
        read += 1
        if table.fault(row) is None:
            good.append(Example(f"row {before + read}", table.segments(row), bool(row.get(BEGINS, True))))
    return good, read


class StreamedBatches:
    """Batches of a stream, which Lightning can stop between two of them and take up there."""

    def __init__(self, stream: Stream, batch_size: int, steps: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        """
        Args:
            steps: batches in all, a multiple of `ranks`.
        """
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.steps, self.rank, self.ranks = steps // ranks, rank, ranks
        self.first, self.place = 0, stream.start  # where the next iteration begins
        self.drawn, self.reached = 0, stream.start  # where the last one is

    def __len__(self) -> int:
        return self.steps

    def share(self, rank: int, ranks: int) -> "StreamedBatches":
        """What one of several processes takes of these batches."""
        return StreamedBatches(self.stream, self.batch_size, self.steps, self.seed, rank, ranks)

    def __iter__(self) -> Iterator[Batch]:
        self.drawn, self.reached = self.first, self.place
        with _held_back():  # so that none reaches a process before it is `_undisturbed`
            rounds = iter(self._loader(_Rounds(self)))
        for made in rounds:
            if isinstance(made, InputError):
                raise made
            batch, self.reached, self.stream.counts = made
            self.drawn += 1
            yield {name: torch.as_tensor(value) for name, value in batch.items()}

    def _loader(self, rounds: "_Rounds") -> Iterable[Any]:
        workers = self.stream.table.workers
        if not workers:
            return rounds
        _check_room(workers)
        generator = torch.Generator().manual_seed(self.seed)  # or the global one would be drawn from
        return DataLoader(
            rounds,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_undisturbed,
            generator=generator,
        )

    def state_dict(self) -> dict[str, Any]:
        """Batches given so far, and where in the data the next one begins."""
        return {"drawn": self.drawn, "place": asdict(self.reached), "counts": self.stream.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin there; its length stays that of the whole."""
        self.first, self.place, self.stream.counts = state["drawn"], Place(**state["place"]), state["counts"]


class _Rounds(IterableDataset[Any]):
    """One process's batches, each with the place behind it and what had been read then; an `InputError` as the last.

    A round is a batch of every process. Where processes of its own read ahead for one, each makes every n-th of its
    batches; they are asked in turn, which puts them in order again.
    """

    def __init__(self, of: StreamedBatches) -> None:
        self.of = of

    def __iter__(self) -> Iterator[tuple[Mapping[str, Any], Place, dict[str, int]] | InputError]:
        worker = get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        of, items = self.of, self._items()
        try:
            for number in range(of.steps - of.first):
                batches = [list(islice(items, of.batch_size)) for _ in range(of.ranks)]
                if number % workers == own:
                    last, given, _ = batches[-1][-1]
                    batch = last.rows.collate([window.rows[index] for window, _, index in batches[of.rank]])
                    # from a worker as arrays, through a pipe: tensors need shared memory, and hang where it is full
                    made = batch if worker is None else {name: value.numpy() for name, value in batch.items()}
                    yield made, replace(last.place, given=given), last.behind.counts
        except InputError as error:  # as a value: a worker would wrap it in its traceback
            yield error

    def _items(self) -> Iterator[tuple[Window, int, int]]:
        """Window, how many of its items are given with this one, and which it is."""
        skipped = self.of.place.given
        for window in self.of.stream.windows(replace(self.of.place, given=0)):
            place = window.place
            # a window that holds everything has the order of the same rows in memory
            part = (place.window,) if place.window else ()
            order = shuffled(len(window.rows), self.of.seed, place.passes, *part)
            for given, index in enumerate(order[skipped:], skipped + 1):
                yield window, given, index
            skipped = 0


def _check_room(workers: int) -> None:
    """The semaphores by which a DataLoader speaks with its workers, made and dropped: one that lacked some would say
    so by the error of its own clean-up.

    Raises:
        InputError: the system has no room for them.
    """
    try:
        queues: list[Any] = [torch.multiprocessing.Queue() for _ in range(workers + 1)]
        torch.multiprocessing.Event()
    except OSError as error:
        raise InputError(
            f"data.workers={workers} needs shared memory, and /dev/shm has no room ({error.strerror}): set "
            "data.workers=0, free some there, or give the container more (docker run --shm-size=1g)"
        ) from None
    for queue in queues:
        queue.close()


def _as_it_is(made: Any) -> Any:
    return made


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals wait meanwhile, and in the processes that are started until they know what to do with them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _undisturbed(worker: int) -> None:
    """In a process that reads ahead: leave signals to the training, which finishes its step first.

    Terminals and launchers send them to every process; a reader that ended by one would end the training with an error.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)


def _end_when_told() -> None:
    """Of SIGTERM, heed the one that the training itself sends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
