"""One cell over several processes: the first one leads as if it were alone, the others train what it calls them for.

Locks, records, checkpoints and scores are the first one's. It calls the others by the identity of a cell, which they
have found for themselves from the same config: processes that disagree about anything that can change a number stop.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hydra.errors import CompactHydraException
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from lyapft import config, ranks, rates
from lyapft.cell import summary
from lyapft.cell.preparation import Cell, prepare
from lyapft.errors import InputError
from lyapft.halving import Halvings
from lyapft.module import TrainingStopped
from lyapft.peft import LivenessError
from lyapft.records import Record
from lyapft.resume import Interrupted, Signals

log = logging.getLogger(__name__)
AGREED = (TrainingStopped, LivenessError)  # decided by numbers that all processes share
_away: list[str] = []  # the cell that the others were called for and have not come back from


class LostProcess(CompactHydraException):
    """Another process of this cell has ended, and this one cannot go on alone."""


@contextmanager
def crew() -> Iterator[bool]:
    """Meet the other processes, if there are any; gives whether this one leads. They are dismissed at the end."""
    _away.clear()
    with ranks.joined():
        try:
            yield ranks.leads()
        finally:
            if ranks.leads() and not _away:
                with suppress(RuntimeError):  # a signal that ends this process has ended the others too
                    ranks.from_first(None)


def call(cell: Cell) -> None:
    """Have every process train this cell; the others hear of it here, and are back after `together`.

    Raises:
        RuntimeError: they were lost in an earlier cell.
    """
    if not ranks.many() or not ranks.leads():
        return
    if _away:
        raise RuntimeError(f"the other processes were lost in {_away[0]}; the same command continues the study")
    _away.append(cell.id)
    ranks.from_first(cell.id)


@contextmanager
def together() -> Iterator[None]:
    """What all processes enter, and leave by its end or by an error that is the same on all of them."""
    try:
        with _connected():
            yield
    except AGREED:
        _away.clear()
        raise
    _away.clear()


@contextmanager
def _connected() -> Iterator[None]:
    """Say what it means that a connection broke."""
    try:
        yield
    except RuntimeError as error:
        if "by peer" not in str(error):  # what gloo says of a process that is gone
            raise
        raise LostProcess(
            "another process of this cell has ended (it says why); the same command goes on from the last checkpoint"
        ) from error


def follow(cfg: DictConfig, execute: Callable[[Cell, Record, list[Logger], Signals, Halvings], None]) -> None:
    """Train what the first process calls for, until it needs no more.

    Raises:
        InputError: it trains a cell that this process does not know.
    """
    logging.getLogger("lyapft").setLevel(logging.WARNING)  # the first one says it
    cfg = config.settled(rates.applied(cfg)).copy()
    cfg.trainer.progress = False
    cell = prepare(cfg)
    known = {one.id: one for one in _kin(cell)}
    while (wanted := _heard()) is not None:
        if wanted not in known:
            raise InputError(
                f"process {ranks.rank()} finds no cell {wanted} in its config, which the first process trains: start "
                "all of them with the same command, code, inputs and threads"
            )
        with Signals() as signals:
            try:
                execute(known[wanted], summary.stub(known[wanted]), [], signals, Halvings([]))
            except AGREED as error:
                log.debug("%s: %s", wanted, error)
            except Interrupted as error:
                raise error.leave() from None


def _heard() -> str | None:
    nothing: str | None = None
    with _connected():
        return ranks.from_first(nothing)


def _kin(cell: Cell) -> Iterator[Cell]:
    """A cell, its references and its reruns."""
    yield cell
    if cell.config.reference == "auto":
        for twin in config.reference_configs(cell.config).values():
            yield prepare(twin, role="reference", like=cell)
    for twin in config.noise_floor_configs(cell.config, cell.threads).values():
        yield prepare(twin, role="rerun", like=cell)
