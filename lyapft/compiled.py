"""Compiles numba kernels once: on first use, kept on disk, with a message when it takes long enough to wonder."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from numba import njit

_MESSAGE_AFTER_S = 2.0  # reading a kernel from the cache takes less
_lock = threading.Lock()


def jit(function: Callable) -> Any:
    """numba.njit that releases the interpreter lock and keeps its code on disk.

    numba writes beside the source, or, where that is read-only, in the user's cache folder (NUMBA_CACHE_DIR moves
    it); where neither can be written the kernel is compiled anew by each process.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: "no locator available"
        return njit(nogil=True)(function)


helper = njit  # a function that kernels call: compiled with them, never kept on its own
inlined = njit(forceinline=True)  # a helper for inner loops, whose vectors must stay in registers


class Kernel:
    """A kernel that is compiled, or read from disk, for its one signature when first called."""

    def __init__(self, name: str, make: Callable[[], Any], signature: Any) -> None:
        self.name, self._make, self._signature = name, make, signature
        self._ready: Any = None

    def prepare(self) -> Any:
        """The compiled kernel; the first call compiles it."""
        if self._ready is not None:
            return self._ready
        with _lock:
            if self._ready is None:
                kernel = self._make()
                with _announced(self.name):
                    kernel.compile(self._signature)
                kernel.disable_compile()
                self._ready = kernel
        return self._ready


class _announced:
    """Says on standard error that compilation goes on, and how long it took, unless it is over in two seconds."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._start = time.monotonic()
        self._timer = threading.Timer(
            _MESSAGE_AFTER_S, self._say, ["preparing (compiled once, then read from disk) ..."]
        )
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        seconds = time.monotonic() - self._start
        if seconds > _MESSAGE_AFTER_S:
            self._say(f"ready after {seconds:.0f} s")

    def _say(self, text: str) -> None:
        print(f"lyapft: CPU kernel {self._name!r}: {text}", file=sys.stderr, flush=True)
