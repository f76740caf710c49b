"""Runs a compiled kernel over a range of independent tasks on as many threads as torch is told to use.

Kernels release the interpreter lock, so any thread can run them. The threads are those of torch's own OpenMP runtime
where it can be called (`GOMP_parallel`, in libgomp as in libomp): they wait for work by spinning for some milliseconds
after each of torch's operations, and threads of another pool would have to share the cores with them. Elsewhere they
are Python's. Which thread runs a task changes no result.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _openmp() -> Callable[..., None] | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded, if it has one."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if function is not None:
        function.argtypes = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
    return function


_parallel = _openmp()


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < count:
        _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="lyapft-scan"), count
    return _pool


def _forget() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)


def run(tasks: int, kernel: Callable[[int, int, int], None]) -> None:
    """kernel(first, last, worker) over a partition of range(tasks), one contiguous part per
    torch.get_num_threads()."""
    parts = worker_count(tasks)
    if parts == 1:
        return kernel(0, tasks, 0)
    left = iter(range(parts))
    failures: list[BaseException] = []

    def work(_: object = None) -> None:
        try:
            for part in left:  # each part goes to one thread, however many there are
                kernel(tasks * part // parts, tasks * (part + 1) // parts, part)
        except BaseException as failure:  # noqa: BLE001 (none can cross the OpenMP runtime: raised below)
            failures.append(failure)

    if _parallel is not None:
        _parallel(_Body(work), None, parts, 0)
    else:
        others = [_workers(parts - 1).submit(work) for _ in range(1, parts)]
        work()
        for future in others:
            future.result()
    if failures:
        raise failures[0]


def worker_count(tasks: int) -> int:
    """How many workers `run` will use, for scratch memory of each."""
    return max(1, min(torch.get_num_threads(), tasks))
