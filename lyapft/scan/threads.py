"""Runs a compiled kernel over a range of independent tasks on as many threads as torch is told to use.

Kernels release the interpreter lock, so plain Python threads do: no second OpenMP runtime spins beside torch's, a
forked process starts its own, and nothing is compiled for a threading layer. Which thread runs a task changes no
result.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


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
    parts = max(1, min(torch.get_num_threads(), tasks))
    bounds = [tasks * i // parts for i in range(parts + 1)]
    if parts == 1:
        return kernel(0, tasks, 0)
    pool = _workers(parts - 1)
    others = [pool.submit(kernel, bounds[i], bounds[i + 1], i) for i in range(1, parts)]
    try:
        kernel(0, bounds[1], 0)
    finally:
        for future in others:
            future.result()


def worker_count(tasks: int) -> int:
    """How many workers `run` will use, for scratch memory of each."""
    return max(1, min(torch.get_num_threads(), tasks))
