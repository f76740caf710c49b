"""One cell over several processes gives the numbers of one process, and goes on where it was cut off."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyapft import cell, launch, records
from lyapft.data.batches import Order
from tests.test_cell import SMALL, prepared, same_weights
from tests.test_cli import ROOT

CLOCKS = ["step_s", "tokens_per_s", "shadow_s"]
TWO = ["reference=off", "trainer.steps=4", "trainer.accumulate=2", "task.shots=[0,2]"]


# -- the launch


def test_the_launch_is_read_from_the_environment():
    srun = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_PROCID": "4"}
    assert launch.found(srun) == launch.Launch("srun", 4, 6, 3)
    assert launch.found({"WORLD_SIZE": "2", "RANK": "1"}) == launch.Launch("torchrun", 1, 2, 2)
    for alone in ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"SLURM_NTASKS": "6"}, srun | {"SLURM_NTASKS": "1"}):
        assert launch.found(alone) == launch.Launch()


def test_micro_batches_are_shared_evenly_or_not_at_all():
    two = launch.Launch("torchrun", 0, 2, 2)
    assert launch.faults(two, 4, 6) == launch.faults(launch.Launch(), 1, 24) == []
    (fault,) = launch.faults(two, 1, 24)
    assert "trainer.accumulate=2 trainer.batch_size=12" in fault
    assert launch.faults(launch.Launch("srun", 0, 3, 2), 3, 8)


def test_how_many_processes_is_part_of_the_identity_and_one_is_not(tmp_path, monkeypatch):
    alone = prepared(tmp_path, *TWO)
    assert "ranks" not in alone.science["runs_as"]
    monkeypatch.setattr(launch, "found", lambda environment=None: launch.Launch("torchrun", 1, 2, 2))
    both = prepared(tmp_path, *TWO)
    assert both.science["runs_as"] == alone.science["runs_as"] | {"ranks": 2}
    assert both.id != alone.id


# -- rows


@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    steps=st.integers(1, 8),
    ranks=st.integers(1, 5),
    each=st.integers(1, 3),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_the_processes_together_draw_what_one_would(rows, batch_size, steps, ranks, each, shuffle, data):
    accumulate = ranks * each
    whole = list(Order(rows, batch_size, steps * accumulate, 3, shuffle))
    shares = [Order(rows, batch_size, steps * accumulate, 3, shuffle, rank, ranks) for rank in range(ranks)]
    drawn = [list(share) for share in shares]
    for step in range(steps):
        one = whole[step * accumulate : (step + 1) * accumulate]
        several = [batch for own in drawn for batch in own[step * each : (step + 1) * each]]
        assert sorted(several) == sorted(one)
    for share, own in zip(shares, drawn, strict=True):
        share.first = data.draw(st.integers(0, len(own)))
        assert list(share) == own[share.first :]


# -- a training


def environment(rank: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {key: str(value) for key, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}


def one_rank(rank: int, port: int, arguments: list[str], cut: int | None) -> None:
    """The entry point as torchrun starts it; the second process alone gets a signal at step `cut`."""
    os.environ.update(environment(rank, port))
    sys.argv = ["train.py", *arguments]

    def kill(_, trainer, *__):
        if trainer.global_step == cut:
            os.kill(os.getpid(), signal.SIGTERM)

    if rank == 1 and cut is not None:
        cell.StepRecorder.on_before_optimizer_step = kill
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def started(arguments: list[str], cut: int | None = None) -> list[int | None]:
    """The exit codes of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=one_rank, args=(rank, port, arguments, cut)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for process in processes:
        process.kill()
    return [process.exitcode for process in processes]


def only(folder: Path) -> tuple[Path, records.Record]:
    (found,) = records.load_study(folder / "default")
    return found


def same(a: Path, b: Path) -> None:
    series = [pd.read_parquet(folder / records.STEPS).drop(columns=CLOCKS, errors="ignore") for folder in (a, b)]
    pd.testing.assert_frame_equal(*series, check_exact=True, check_like=True)
    for name in (records.STABILITY, records.ITEMS):
        if (a / name).exists() or (b / name).exists():
            pd.testing.assert_frame_equal(*[pd.read_parquet(f / name) for f in (a, b)], check_exact=True)
    assert same_weights(a, b)
    first, second = (records.load(folder) for folder in (a, b))
    for part in ("scores", "training", "stability", "peft", "kernels", "guard_actions"):
        assert first.get(part) == second.get(part), part


@pytest.mark.parametrize("how", [["precision=fp32", "probe=[lyapunov,shadow]", "guard=rollback"], ["precision=fp16"]])
def test_two_processes_give_the_numbers_of_one_exactly(tmp_path, how):
    """A sum of two is the same in either order, so nothing is lost to rounding: every loss, weight, λ and score."""
    one = prepared(tmp_path / "one", *TWO, *how)
    assert cell.ensure(one)["status"] == "ok"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "train.py"), *SMALL, *TWO, *how, f"runs={tmp_path / 'two'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    folder, record = only(tmp_path / "two")
    assert record["status"] == "ok"
    assert record["config"]["runs_as"]["ranks"] == 2
    same(one.folder, folder)


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_the_command_goes_on(tmp_path):
    dropout = [*SMALL, *TWO, "model=llama_tiny", "precision=fp32", "peft.dropout=0.3"]  # each has its own random state
    assert started([*dropout, f"runs={tmp_path / 'whole'}"]) == [0, 0]
    torn = [*dropout, f"runs={tmp_path / 'torn'}"]
    assert started(torn, cut=1) == [128 + signal.SIGTERM] * 2
    assert only(tmp_path / "torn")[1]["status"] == "interrupted"
    assert started(torn) == [0, 0]
    record = only(tmp_path / "torn")[1]
    assert record["resumed"]["at_steps"] == [2]
    same(only(tmp_path / "whole")[0], only(tmp_path / "torn")[0])
