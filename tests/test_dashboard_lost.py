"""W&B that fails while a cell runs: the cell goes on, its record is whole and names what the W&B run lacks."""

import gc
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from lyapft import cell, dashboard, records
from lyapft.dashboard.runs import BROKEN, END, NOT_UPLOADED, LiveRun
from tests.test_cell import prepared, same_weights
from tests.test_dashboard import finished, node, stub, wandb_content

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning's own use
    # wandb's own, of a process and of folders that it can no longer close
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]
WANDB = ("reference=off", "logger=wandb", "logger.mode=offline")
NUMBERS = "numbers from step 3 on, perhaps the last before it"
RESULTS = "tables, charts and summary"


@pytest.fixture(autouse=True)
def _no_leftovers_in_other_tests() -> Iterator[None]:
    yield
    gc.collect()


def kill_service() -> None:
    """End wandb's service process, as a machine short of memory would."""
    found = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("wandb-core")]
    assert found, "wandb has no process of its own: this test needs another way"
    killed = {process.pid for process in found}
    for process in found:
        process.kill()
    for own in [o for o in gc.get_objects() if type(o) is subprocess.Popen and o.pid in killed]:
        own.wait(10)  # by wandb's own handle, which otherwise warns of a running process when it is collected
    time.sleep(0.2)  # until the broken connection is noticed


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the service killed just before a step's numbers are handed over, once."""
    log_metrics = LiveRun.log_metrics

    def at(step: int) -> None:
        left = [step]

        def log(self: LiveRun, metrics: Mapping[str, float], step: int | None = None) -> None:
            if step in left:
                left.clear()
                kill_service()
            log_metrics(self, metrics, step)

        monkeypatch.setattr(LiveRun, "log_metrics", log)

    return at


def test_a_cell_outlives_the_service_process(
    tmp_path: Path, killing: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    killing(3)
    lost, plain = prepared(tmp_path / "a", *WANDB), prepared(tmp_path / "b", "reference=off")
    record = cell.ensure(lost)
    assert record["status"] == "ok"
    assert record["dashboard"].keys() == {"run", "lacks", "error"}
    assert (record["dashboard"]["run"], record["dashboard"]["lacks"]) == (BROKEN, [NUMBERS, RESULTS])
    assert "ConnectionResetError" in record["dashboard"]["error"]
    assert records.load(lost.folder) == record  # a record of a cell that is done
    assert "W&B takes no more numbers from step 3 on" in caplog.text

    other = cell.ensure(plain)
    assert "dashboard" not in other
    assert record["scores"] == other["scores"]
    assert same_weights(lost.folder, plain.folder)
    series = [pd.read_parquet(one.folder / records.STEPS) for one in (lost, plain)]
    assert series[0]["loss"].tolist() == series[1]["loss"].tolist()
    assert len(series[0]) == 4

    later = prepared(tmp_path / "a", *WANDB, "seed=1")  # in the same process, which had lost its service
    assert "dashboard" not in cell.ensure(later)
    assert [row["loss"] for row in wandb_content(later.folder)["history"] if "loss" in row]

    assert dashboard.push(lost.study, "offline", "p") == [lost.folder.name]  # a whole run of the record


def test_alerts_and_results_that_come_too_late_are_named(tmp_path: Path) -> None:
    loggers = dashboard.build_loggers(node("wandb", mode="offline", project="p"), stub(), tmp_path)
    kill_service()
    dashboard.alert(loggers, "lyapft: edge", "step 7: margin is 0.01")
    lost = dashboard.finish(loggers, finished(stub()))
    assert lost is not None
    assert lost["run"] == BROKEN
    assert lost["lacks"] == ["the alert 'lyapft: edge' (step 7: margin is 0.01)", RESULTS]


def test_an_upload_that_does_not_end_is_left_to_wandb_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that went away: what was written lies in the run's folder, as after any offline run."""
    loggers = dashboard.build_loggers(node("wandb", mode="offline", project="p"), stub(), tmp_path)
    (run,) = loggers
    assert isinstance(run, LiveRun)
    finish = run.experiment.finish

    def late(**arguments: Any) -> None:
        finish(**arguments)
        raise TimeoutError("Timed out waiting for the run to finish")

    monkeypatch.setattr(run.experiment, "finish", late)
    lost = dashboard.finish(loggers, finished(stub()))
    assert lost == {
        "run": NOT_UPLOADED,
        "lacks": [END],
        "error": "TimeoutError: Timed out waiting for the run to finish",
    }
    assert wandb_content(tmp_path)["summary"]["score/skills_new/3-shot"] == 0.75
