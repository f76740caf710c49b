"""The folders that this process writes by a lease, which it may lose without noticing.

Where a file system shares no locks between machines, a process that stood still for longer than its lease (SIGSTOP, a
paused machine, a disk that hung) wakes up beside the one that has taken its cell over. So whatever puts a record, a
table, a checkpoint or weights into such a folder asks here right before, and a training ends at the next step: the
former holder replaces nothing any more. Its log, and what W&B writes by itself, go on until then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import SoftFileLease

LOOKS, PAUSE_S = 3, 0.1  # who asks whether a lease has run out moves its file aside for a moment
_leases: dict[Path, SoftFileLease] = {}


class LostLeaseError(Exception):
    """Another process may be at work in a folder that was this one's; the message names it."""


@contextmanager
def held(folder: Path, lease: SoftFileLease) -> Iterator[None]:
    """This process writes into the folder meanwhile, as long as the lease, which it has acquired, is its own.

    Args:
        lease: of all threads (`thread_local=False`): any of them may write.
    """
    _leases[folder] = lease
    try:
        yield
    finally:
        del _leases[folder]


def is_lost(folder: Path) -> bool:
    """Whether the heartbeat of the folder's lease has found it lost; costs no reading. A folder without one is not."""
    lease = _leases.get(folder)
    return lease is not None and lease.compromise is not None


def check(folder: Path) -> None:
    """Return if this process may write into the folder; one that it has no lease of, it may.

    Raises:
        LostLeaseError: the lease is no longer its own.
    """
    lease = _leases.get(folder)
    if lease is None:
        return
    for look in range(LOOKS):
        time.sleep(PAUSE_S if look else 0.0)
        owner = lease.owner
        if owner is not None and owner.token == lease.token and lease.compromise is None:
            return
    if owner is None:
        now = "is gone: another process may have taken it over and be done"
    elif owner.token == lease.token:
        now = "could not be renewed in time"
    else:
        now = f"was taken over by process {owner.pid} on {owner.hostname}, while this one stood still for longer"
    raise LostLeaseError(f"the lease of {lease.lease_duration:g} s {now}; stopped without writing anything more")
