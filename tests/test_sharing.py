"""Several processes on one study: the work is shared, none of it is done twice, and the dead are no obstacle."""

import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from filelock import SoftFileLock

from lyapft import cell, records, tasks
from lyapft.cell import state, summary
from lyapft.probes import StepRecorder
from tests.campaigns.kills import child, ended
from tests.test_cell import prepared
from tests.test_failures import command

machines = count()


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


LEASE_S = 0.6
MOMENTS = {  # of a cell, and how often it saves
    "a step that saves": (StepRecorder, "on_train_batch_end", 0.0),
    "a step that does not": (StepRecorder, "on_train_batch_end", 3600.0),
    "the evaluation": (tasks, "evaluate", 3600.0),
    "the comparison": (cell, "_divergence", 3600.0),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> cell.Cell:
    one = prepared(tmp_path_factory.mktemp("whole"), "reference=off", "trainer.steps=6")
    assert cell.ensure(one)["status"] == "ok"
    return one


def content(one: cell.Cell) -> dict[Path, tuple[int, bytes]]:
    """When each file of a cell was written, and what; its log, to which both may append, left out."""
    files = (path for path in one.folder.rglob("*") if path.is_file() and path.name != records.LOG)
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("moment", MOMENTS)
def test_who_stood_still_beyond_its_lease_leaves_the_cell_to_who_took_it_over(
    tmp_path, monkeypatch, caplog, whole, moment
):
    where, name, every_s = MOMENTS[moment]
    one = prepared(tmp_path, "reference=off", "trainer.steps=6", f"trainer.checkpoint_every_s={every_s}")
    assert one.id == whole.id
    monkeypatch.setattr(state, "LEASE_S", LEASE_S)
    monkeypatch.setattr(state, "FileLock", lambda path: SoftFileLock(f"{path}.{next(machines)}"))
    calls, left = [], {}
    original = getattr(where, name)

    def stand_still(*arguments, **settings):
        calls.append(name)
        if len(calls) == (3 if where is StepRecorder else 1):
            shutil.rmtree(one.folder)
            shutil.copytree(whole.folder, one.folder)
            (lease,) = (one.study / ".locks").glob("*.lease")
            marker = lease.with_suffix(".other")
            marker.write_text(re.sub("token=.*", "token=another", lease.read_text().replace("host=", "host=not-")))
            marker.replace(lease)
            left.update(content(one))
            time.sleep(2 * LEASE_S / 3 + 0.1)  # two beats of the heart
        return original(*arguments, **settings)

    monkeypatch.setattr(where, name, stand_still)
    record = cell.ensure(one)
    assert record == records.load(whole.folder)
    assert content(one) == left
    assert len(calls) == (3 if where is StepRecorder else 1)
    assert f"was taken over by process {os.getpid()} on not-" in caplog.text


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
