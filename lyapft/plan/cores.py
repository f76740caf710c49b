"""How many CPU threads a cell gets where several run beside one another."""

import os
from collections.abc import Mapping
from typing import Any


def threads_per_cell(wanted: int | None, launcher: Mapping[str, Any]) -> int:
    """The threads that `environment.resolve_threads` will find in a worker of a launcher.

    joblib gives each worker cores // n_jobs through OMP_NUM_THREADS, unless that is set already.

    Args:
        wanted: `threads` of the config. launcher: Hydra's launcher node; without `n_jobs` one cell runs at a time.
    """
    if wanted is not None:
        return wanted
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    if "n_jobs" in launcher:
        return max(1, _joblib_cores() // jobs_of(launcher))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs_of(launcher: Mapping[str, Any]) -> int:
    """Cells that run at a time; joblib counts -1 as every core, -2 as all but one."""
    jobs = int(launcher.get("n_jobs") or 1)
    return jobs if jobs > 0 else max(1, _joblib_cores() + 1 + jobs)


def _joblib_cores() -> int:
    from joblib import cpu_count  # type: ignore[import-untyped]  # it knows of the limits of containers too

    return int(cpu_count())
