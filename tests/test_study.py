"""A study killed at any moment goes on where it was, and cells beside one another give what they give alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lyapft import cell, records, report
from lyapft.plan import file
from tests.test_cell import SMALL, prepared

ROOT = Path(__file__).parent.parent
SWEEP = ("-m", *SMALL, "task.shots=[0]", "precision=fp32", "peft=none", "seed=0,1,2,3")


def command(runs: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *SWEEP, f"runs={runs}", *more]


def finished(runs: Path) -> list[Path]:
    return [path for path in runs.glob("default/*/record.json") if records.load(path.parent)["status"] == "ok"]


def test_a_sweep_killed_without_warning_is_continued_by_the_same_command(tmp_path):
    """Two cells at a time, all of it killed at once when the first is done; then one at a time, to the end."""
    more = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    sweep = subprocess.Popen(
        command(tmp_path, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not finished(tmp_path) and time.monotonic() < deadline:
        assert sweep.poll() is None
        time.sleep(0.05)
    os.killpg(sweep.pid, signal.SIGKILL)
    assert sweep.wait(timeout=30) == -signal.SIGKILL

    done = {path: path.read_bytes() for path in finished(tmp_path)}
    assert 1 <= len(done) < 4
    planned = file.load(tmp_path / "default")
    assert len(planned) == 4
    report.write(tmp_path / "default")
    assert "not run" in (tmp_path / "default" / "verdict.md").read_text()

    again = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=180, check=False)
    assert again.returncode == 0, again.stderr
    assert "4 planned: 4 ok" in again.stdout
    assert {path: path.read_bytes() for path in done} == done
    assert "Nothing is missing" in (tmp_path / "default" / "verdict.md").read_text()

    # the one that ran beside others, in a worker, is to the last bit what this process makes of it
    beside = records.load(next(iter(done)).parent)
    alone = cell.ensure(
        prepared(tmp_path / "alone", "task.shots=[0]", "precision=fp32", "peft=none", f"seed={beside['seed']}")
    )
    assert alone["id"] == beside["id"]
    assert alone["training"] == beside["training"]
    assert alone["scores"] == beside["scores"]


def test_a_cell_goes_on_while_another_process_makes_its_reference(tmp_path, monkeypatch):
    """It waits for the reference when it is done itself, not before."""
    order: list[str] = []
    one = prepared(tmp_path, "task.shots=[0]", "peft=none")
    (reference,) = {twin.id: twin for twin in cell._references(one).values() if twin is not None}.values()
    execute = cell.execute
    monkeypatch.setattr(cell, "execute", lambda c, *rest: (order.append(c.id), execute(c, *rest)))
    monkeypatch.setattr(cell, "is_elsewhere", lambda c: c.id == reference.id)

    def elsewhere(twin: cell.Cell) -> records.Record:
        order.append("waits")
        return cell.ensure(twin)

    monkeypatch.setattr(cell, "_awaited", elsewhere)
    record = cell.ensure(one)
    assert order[:2] == [one.id, "waits"]
    assert {entry["status"] for entry in record["divergence"]} == {"ok"}


def test_a_reference_whose_maker_was_cut_off_is_made_by_who_waited_and_one_that_failed_is_not(tmp_path, monkeypatch):
    one = prepared(tmp_path, "task.shots=[0]", "peft=none")
    reference = next(twin for twin in cell._references(one).values() if twin is not None)
    made = []
    monkeypatch.setattr(cell, "ensure", lambda twin: made.append(twin) or {})
    cell._awaited(reference)  # no record, and nobody at work on it
    assert made == [reference]
    for status in records.STATUSES:
        records.save(reference.folder, cell.summary.stub(reference) | {"status": status})
        cell._awaited(reference)
        (reference.folder / records.RECORD).unlink()
    assert len(made) == 1 + len(records.CUT_OFF)
