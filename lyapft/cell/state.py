"""The state of the process while a cell runs, put back afterwards: many cells share one process."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lightning as L
import torch
import transformers
from filelock import FileLock, SoftFileLease, Timeout

from lyapft import holding, precision, secrets
from lyapft.cell.preparation import Cell
from lyapft.environment import keep_freed_memory
from lyapft.records import LOCKS

log = logging.getLogger(__name__)


LEASE_S = 60.0  # without a sign of life for so long, a process on another machine is taken for dead


@contextmanager
def only_one(cell: Cell) -> Iterator[None]:
    """No other process works on this cell meanwhile, on this machine or on one that shares the folder.

    The system frees the lock of a process that died. Where a file system does not share locks between machines, the
    lease holds: a file whose time of change its holder renews. Nothing is written in the cell's folder once it is lost
    (`holding`).
    """
    with ExitStack() as held:
        locks = _locks(cell)
        for lock in locks:
            try:
                held.enter_context(lock.acquire(timeout=0))
            except Timeout:
                log.info("waiting for another process that runs %s", cell.folder.name)
                held.enter_context(lock.acquire())
        held.enter_context(holding.held(cell.folder, locks[1]))
        yield


def is_elsewhere(cell: Cell) -> bool:
    """Whether another process is at work on this cell."""
    with ExitStack() as held:
        try:
            for lock in _locks(cell):
                held.enter_context(lock.acquire(timeout=0))
        except Timeout:
            return True
    return False


def _locks(cell: Cell) -> tuple[FileLock, SoftFileLease]:
    folder = cell.study / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(folder / f"{cell.id}.lease", lease_duration=LEASE_S, thread_local=False)
    return FileLock(folder / f"{cell.id}.lock"), lease


@contextmanager
def clean_state(cell: Cell) -> Iterator[precision.Precision]:
    """Seeds, threads, precision flags as this cell wants them; put back afterwards, so that cells share a process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    keep_freed_memory()
    L.seed_everything(cell.config.seed, workers=True, verbose=False)
    try:
        with warnings.catch_warnings(), precision.build(cell.config.precision, cell.device) as strategy:
            _quiet_libraries()
            yield strategy
    finally:
        torch.set_num_threads(threads)


def _quiet_libraries() -> None:
    """Only warnings of Lightning and transformers, and none about their own inner workings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # a cell is one process; where several share one, the launcher has started them
    warnings.filterwarnings("ignore", message=r"The `srun` command is available")
    warnings.filterwarnings("ignore", message=r".*does not have many workers")  # tokens are in memory already
    warnings.filterwarnings(
        "ignore", message=r".*lr_scheduler.step\(\)` before `optimizer.step"
    )  # the first step was skipped


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Everything that is logged meanwhile also goes to this file, with the tracebacks that the console is spared."""
    handler = secrets.LogFile(path, encoding="utf-8")
    handler.setFormatter(secrets.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("lyapft")
    level = ours.level
    ours.setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        yield
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
        handler.close()
