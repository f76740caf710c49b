"""What goes wrong around a cell: a clear message, an exit code that is not 0, and every record that was there before.

Full and read-only file systems are real ones, mounted for a child process alone (Linux, user namespaces).
"""

import contextlib
import ctypes
import errno
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import wandb

from lyapft import cell, records
from lyapft.cell import execution
from lyapft.cell.state import log_file
from lyapft.resume import files as resume_files
from tests.campaigns.kills import child, ended
from tests.test_cell import prepared
from tests.test_cli import ROOT, SMALL, typed  # noqa: F401 - a fixture
from tests.test_config import composed

ALONE = (*SMALL, "reference=off")
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # of unshare(2)
NOT_ALLOWED = 77


def command(*arguments: str) -> int:
    """Exit code of `python train.py …`."""
    sys.argv = ["train.py", *ALONE, *arguments]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    raise AssertionError("train.py ends by an exit code")


def own_mounts() -> None:
    """From here on mounts are this process's own; whoever is not root becomes it in a namespace of users."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if user == 0 and not libc.unshare(NEW_MOUNTS):
        mount("--make-rprivate", "/")
        return
    if libc.unshare(NEW_USER | NEW_MOUNTS):  # not where a library has started threads in the fork
        os._exit(NOT_ALLOWED)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def inside(tmp_path: Path, work: Callable[[], int]) -> tuple[int, str]:
    """Exit code and output of a fork that works in `tmp_path` and may mount; skips where the system forbids that."""
    printed = tmp_path / "printed"

    def all_of_it() -> None:
        os.chdir(tmp_path)
        with printed.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
        own_mounts()
        raise SystemExit(work())

    code = ended(child(all_of_it), 120)
    if code == NOT_ALLOWED:
        pytest.skip("this system gives users no namespaces of their own")
    assert code is not None, printed.read_text()
    return code, printed.read_text()


def statuses(runs: Path) -> list[str]:
    return sorted(records.load(path.parent)["status"] for path in runs.glob("*/*/record.json"))


# -- folders


def test_a_full_disk_is_named_and_every_record_stays_whole(tmp_path):
    def work():
        Path("disk").mkdir()
        mount("-t", "tmpfs", "-o", "size=9m", "none", "disk")
        assert command("runs=disk") == 0
        (first,) = Path("disk").glob("*/*/record.json")
        before = first.read_bytes()
        with contextlib.suppress(OSError), Path("disk/filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        os.truncate("disk/filler", os.path.getsize("disk/filler") - 65536)  # room to begin in
        code = command("runs=disk", "seed=1")
        assert first.read_bytes() == before
        assert "ok" in statuses(Path("disk"))  # and the other one can be read
        Path("disk/filler").unlink()
        assert command("runs=disk", "seed=1") == 0
        return code

    code, printed = inside(tmp_path, work)
    assert code == 1, printed
    assert "no space left" in printed
    assert "the same command then continues" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("stage", ["train", "_score"])
def test_a_disk_that_is_full_to_the_last_byte_is_named_once(tmp_path, monkeypatch, stage):
    """Then no line of the cell's own log can be written either."""
    go_on = getattr(execution, stage)

    def fill() -> None:
        with contextlib.suppress(OSError), Path("disk/filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))

    def work():
        Path("disk").mkdir()
        mount("-t", "tmpfs", "-o", "size=9m", "none", "disk")
        monkeypatch.setattr(execution, stage, lambda *arguments: (fill(), go_on(*arguments))[1])
        code = command("runs=disk")
        assert statuses(Path("disk")) == ["running"]
        monkeypatch.setattr(execution, stage, go_on)
        Path("disk/filler").unlink()
        assert command("runs=disk") == 0
        return code

    code, printed = inside(tmp_path, work)
    assert code == 1, printed
    assert "no space left" in printed
    assert "the same command then continues" in printed
    said = printed.count("cell.log lacks lines: [Errno 28] No space left on device")
    assert said == 1 or (stage == "_score" and said == 0)  # its last page may have room for the last lines
    assert "Traceback" not in printed
    assert "Logging error" not in printed


def test_a_log_that_cannot_be_written_says_so_once_and_no_secret(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "canary" * 4)
    with log_file(tmp_path / "cell.log"):
        handler = logging.getLogger().handlers[-1]
        handler.stream.close()
        handler.stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 - the handler closes it
        for _ in range(3):
            logging.getLogger("lyapft").error("%s and %s", "canary" * 4, "x" * 9999)
    printed = capsys.readouterr().err
    assert printed.count("cell.log lacks lines: [Errno 28]") == 1
    assert "canary" not in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("before", [False, True])
def test_a_read_only_folder_is_named_and_what_is_in_it_stays(tmp_path, before):
    def work():
        Path("disk").mkdir()
        if before:
            assert command("runs=disk") == 0
        content = {path: path.read_bytes() for path in Path("disk").rglob("*") if path.is_file()}
        mount("--bind", "disk", "disk")
        mount("-o", "remount,bind,ro", "disk", "disk")
        code = command("runs=disk", "seed=1")
        assert content == {path: path.read_bytes() for path in Path("disk").rglob("*") if path.is_file()}
        return code

    code, printed = inside(tmp_path, work)
    assert code == 1, printed
    assert "runs=disk cannot be made or written" in printed
    assert "Traceback" not in printed


def test_a_folder_that_becomes_read_only_is_named(typed, monkeypatch):  # noqa: F811
    fit = execution.train

    def late(*arguments):
        def refuse(path, _):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.setattr(records, "write_atomically", refuse)
        monkeypatch.setattr(resume_files, "write_atomically", refuse)
        return fit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(execution, "train", late)
        code, printed = typed(*ALONE)
    assert code == 1
    assert "cannot be written (Read-only file system): set runs=FOLDER" in printed
    assert "Traceback" not in printed
    assert statuses(Path("runs")) == ["running"]  # whole, and taken up by the same command
    monkeypatch.undo()


# -- processes


def test_nothing_needs_shared_memory(tmp_path):
    """Launchers may: without it joblib says so and runs the cells of a sweep one after the other."""

    def work():
        mount("-t", "tmpfs", "-o", "size=4k", "none", "/dev/shm")
        Path("/dev/shm/full").write_bytes(bytes(4096))
        return command()

    code, printed = inside(tmp_path, work)
    assert code == 0, printed
    assert statuses(tmp_path / "runs") == ["ok"]


@pytest.mark.parametrize("pages", [0, 7, 14])
def test_readers_without_shared_memory_are_named_or_need_none(tmp_path, pages):
    """Semaphores take ten pages of it, and batches, which need more than there is, none."""
    path = ROOT / "tests" / "fixtures" / "alpaca.jsonl"

    def work():
        mount("-t", "tmpfs", "-o", f"size={4 * (pages + 1)}k", "none", "/dev/shm")
        Path("/dev/shm/full").write_bytes(bytes(4096))
        streamed = ("data.streaming=true", "data.shuffle_buffer=5", "data.workers=1", "data.max_length=256")
        return command("data=alpaca", f"data.path={path}", *streamed, "trainer.batch_size=32")

    code, printed = inside(tmp_path, work)
    assert "Traceback" not in printed
    assert "Exception ignored" not in printed
    if pages < 10:
        assert code == 1, printed
        assert "data.workers=1 needs shared memory, and /dev/shm has no room (No space left on device)" in printed
        assert "data.workers=0" in printed
        assert "--shm-size" in printed
        assert "runs=FOLDER" not in printed
    else:
        assert code == 0, printed


def test_cells_in_threads_of_one_process_are_refused():
    refused = pytest.raises(cell.CellFailed, match=r"share the random numbers .*backend=loky")
    with ThreadPoolExecutor(1) as pool, refused:
        pool.submit(cell.run, composed()).result()


# -- inputs


def examples(path: Path) -> str:
    rows = [{"instruction": "Add.", "input": f"{i} 2", "output": str(i + 2)} for i in range(32)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return f"data.path={path}"


def test_data_deleted_in_a_training_are_missed_by_the_cells_that_come_after_it(typed, tmp_path, monkeypatch):  # noqa: F811
    path, fit = tmp_path / "alpaca.json", execution.train
    sweep = ["-m", *ALONE, "seed=0,1", "data=alpaca", examples(path)]
    monkeypatch.setattr(execution, "train", lambda *arguments: (path.unlink(), fit(*arguments))[1])
    code, printed = typed(*sweep)
    assert code == 1
    assert f"data.path={path} does not exist" in printed
    assert "Traceback" not in printed
    assert statuses(Path("runs")) == ["ok"]  # its rows were read and checked before
    monkeypatch.setattr(execution, "train", fit)
    examples(path)
    assert typed(*sweep)[0] == 0
    assert statuses(Path("runs")) == ["ok", "ok"]


def test_weights_deleted_between_the_check_and_the_training_are_named(tmp_path):
    shipped, folder = ROOT / "lyapft" / "checkpoints" / "mamba_tiny", tmp_path / "model"
    shutil.copytree(shipped, folder)
    one = prepared(tmp_path / "runs", "reference=off", f"model.path={folder}")
    (folder / "model.safetensors").unlink()
    record = cell.ensure(one)
    assert record["status"] == "failed"
    assert str(folder) in record["error"]["message"]
    assert record["error"]["type"] == "InputError"
    shutil.copy(shipped / "model.safetensors", folder)
    assert cell.ensure(one)["status"] == "ok"


# -- dashboards


def test_an_unreachable_dashboard_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    for name, value in {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # the port of `discard`: nobody listens
        "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "2",  # by itself W&B tries for a minute and a half
    }.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # which has read the environment once and for all, if an earlier test used it
    record = cell.ensure(prepared(tmp_path, "reference=off", "logger=wandb"))
    wandb.teardown()
    assert record["status"] == "failed"
    assert "W&B could not start a run in mode online" in record["error"]["message"]
    assert "WANDB_MODE=offline" in record["error"]["message"]
    assert "training" not in record
