"""Signals that ask a process to end: during training they only raise a flag, and the step is finished first."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

log = logging.getLogger(__name__)
CAUGHT = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Ctrl-C; kill and most schedulers; SLURM's --signal
# where a launcher waits for it: submitit puts its job back into SLURM's queue by it, and ends the process
LAUNCHERS = tuple(getattr(signal, name) for name in ("SIGUSR2",) if hasattr(signal, name))
SAME_S = (
    1.0  # one wish to stop comes several times: from the terminal and torchrun, from SLURM and a container's runtime
)


class Interrupted(BaseException):
    """A signal ended the work; like KeyboardInterrupt it is no error that a library may swallow."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        super().__init__(f"stopped by {self.name}; the same command continues the study")
        self.number = number

    def leave(self) -> BaseException:
        """What the process ends with: 128 + the number of the signal as its exit code, as shells have it."""
        return KeyboardInterrupt() if self.number == signal.SIGINT else SystemExit(128 + self.number)


class Signals:
    """Handlers of Ctrl-C, SIGTERM and SIGUSR1 while a cell runs; the earlier ones come back afterwards.

    Inside `deferred` a first signal only sets `caught`, and whoever is inside ends at the next good moment. A second
    one, `SAME_S` later, or one outside, raises `Interrupted` at once. A signal that ended the cell is handed on to the
    function that had it before: a launcher's, or the `Signals` of the cell whose reference this is. Other threads than
    the main one cannot have handlers: there a signal does what it did before.

    Attributes:
        caught: the number of the signal that waits to be heeded, or None.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._since = -math.inf  # when it came
        self._ended_by: int | None = None
        self._deferring = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            had = {number: signal.getsignal(number) for number in (*CAUGHT, *LAUNCHERS)}
            self._earlier = {number: had[number] for number in had if number in CAUGHT or callable(had[number])}
            self.install()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        earlier, self._earlier = self._earlier, {}
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.caught is not None and self._ended_by is None and error is None:  # it ended before that was heeded
            if not callable(earlier.get(self.caught)):
                raise Interrupted(self.caught).leave()
            earlier[self.caught](self.caught, None)
        if error is not None and self._ended_by is not None and callable(earlier.get(self._ended_by)):
            earlier[self._ended_by](self._ended_by, None)

    def install(self) -> None:
        """Take the signals, also back from who took them meanwhile (Lightning does)."""
        for number in self._earlier:
            signal.signal(number, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal waits in `caught` meanwhile; one that nobody heeded is raised at the end."""
        self.heed()
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.heed()

    def heed(self) -> None:
        """End here if a signal waits.

        Raises:
            Interrupted: one does.
        """
        if self.caught is not None:
            number, self.caught = self.caught, None
            self._ended_by = number
            raise Interrupted(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._since < SAME_S:
            if number in LAUNCHERS:  # of two at once the one that a launcher waits for: it puts the job back
                self.caught = number
                self._ended_by = None if self._ended_by is None else number
            return
        at_once = not self._deferring or self.caught is not None
        # kept also then: Python drops what is raised while it clears a weak reference
        self.caught, self._since = number, now
        if at_once:
            self._ended_by = number
            raise Interrupted(number)
        log.warning("%s: stopping after this step; once more stops at once", signal.Signals(number).name)
