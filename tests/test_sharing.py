"""Several processes on one study: the work is shared, none of it is done twice, and the dead are no obstacle."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from filelock import SoftFileLock

from lyapft import cell, records
from lyapft.cell import state, summary
from tests.campaigns.kills import child, ended
from tests.test_cell import prepared
from tests.test_failures import command


def test_two_sweeps_share_the_cells_of_a_study(tmp_path, monkeypatch):
    """Whichever comes to a cell that the other one runs goes on, and comes back to it."""
    monkeypatch.chdir(tmp_path)
    outputs = [tmp_path / name for name in ("first", "second")]

    def sweep(output: Path) -> None:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
        raise SystemExit(command("runs=runs", "seed=0,1", "-m"))

    both = [child(lambda output=output: sweep(output)) for output in outputs]
    assert [ended(pid, 120) for pid in both] == [0, 0], [output.read_text() for output in outputs]
    printed = "".join(output.read_text() for output in outputs)
    assert printed.count(": training mamba_tiny") == 2
    assert [record["status"] for _, record in records.load_study(tmp_path / "runs" / "default")] == ["ok"] * 2


def awaited(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def holder(one: cell.Cell) -> int:
    """A process that has begun a cell and does not come to its end."""

    def hold() -> None:
        with state.only_one(one):
            records.save(one.folder, summary.stub(one))
            time.sleep(60)

    pid = child(hold)
    awaited(one.folder / records.RECORD)
    assert state.is_elsewhere(one)
    return pid


def killed_holder(one: cell.Cell) -> None:
    """A process that was killed while it held a cell."""
    pid = holder(one)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid, 10) == -signal.SIGKILL
    assert list((one.study / ".locks").glob("*.lease"))  # it had no time to let go


def test_the_cell_of_a_process_that_died_here_is_free_at_once(tmp_path):
    one = prepared(tmp_path, "reference=off")
    killed_holder(one)
    assert not state.is_elsewhere(one)


def test_the_cell_of_a_process_that_died_elsewhere_is_free_when_its_lease_ends(tmp_path, monkeypatch):
    """On a machine whose locks are not seen here, and whose processes cannot be asked after."""
    one, here, lease_s = prepared(tmp_path, "reference=off"), os.getpid(), 1.0
    monkeypatch.setattr(state, "LEASE_S", lease_s)
    monkeypatch.setattr(state, "FileLock", lambda path: SoftFileLock(f"{path}.{os.getpid()}"))
    name = socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: name if os.getpid() == here else "elsewhere")
    killed_holder(one)
    assert state.is_elsewhere(one)
    started = time.monotonic()
    with state.only_one(one):
        assert lease_s / 2 < time.monotonic() - started < 20 * lease_s


def test_the_survivor_makes_the_reference_that_a_dead_process_had_begun(tmp_path):
    one = prepared(tmp_path, "task.shots=[0]", "peft=none")
    reference = next(twin for twin in cell._references(one).values() if twin is not None)
    pid = holder(reference)

    def dies() -> None:
        awaited(one.folder / records.ITEMS)
        os.kill(pid, signal.SIGKILL)
        ended(pid, 10)

    thread = threading.Thread(target=dies)
    thread.start()
    record = cell.ensure(one)  # done itself, it waits for the reference
    thread.join()
    assert (record["status"], {entry["status"] for entry in record["divergence"]}) == ("ok", {"ok"})
    assert records.load(reference.folder)["status"] == "ok"
