"""One cell over several processes gives the numbers of one process, and goes on where it was cut off."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lyapft import admission, cell, launch, records, study
from lyapft.data.batches import Order
from lyapft.errors import InputError
from lyapft.probes import StepRecorder
from tests.test_cell import SMALL, prepared, same_weights
from tests.test_cli import ROOT
from tests.tolerances import TOL

CLOCKS = ["step_s", "tokens_per_s", "shadow_s"]
TENSOR = ["trainer=tensor", "trainer.tensor_parallel_size=2"]
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
    assert launch.faults(two, 4, 6, "fp16") == launch.faults(launch.Launch(), 1, 24, "fp16_true") == []
    (fault,) = launch.faults(two, 1, 24, "bf16")
    assert "trainer.accumulate=2 trainer.batch_size=12" in fault
    assert launch.faults(launch.Launch("srun", 0, 3, 2), 3, 8, "bf16")
    fsdp, full, sdt = (OmegaConf.create(node) for node in ({"strategy": "fsdp"}, {"name": "none"}, {"name": "sdt"}))
    assert not launch.sharding_faults(two, fsdp, full, "bf16", ["lyapunov"], None)
    assert len(launch.sharding_faults(launch.Launch(), fsdp, sdt, "fp16", ["shadow"], "rollback")) == 5
    assert "precision=fp16" in launch.faults(two, 2, 12, "fp16_true")[0]
    four = launch.Launch("torchrun", 0, 4, 4)
    assert not launch.faults(four, 2, 12, "bf16", together=2)
    assert "4 processes that are 2 copies: use a multiple of 2" in launch.faults(four, 3, 12, "bf16", together=2)[0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["model=mamba_tiny"], "no tensor-parallel plan for mamba models: the projections of a recurrence"),
        (["trainer.tensor_parallel_size=3"], "num_attention_heads=4 is no multiple of 3"),
        (["trainer.tensor_parallel_size=1"], "needs trainer.tensor_parallel_size of 2 or more, not 1"),
        (["trainer.tensor_parallel_size=4"], "needs a multiple of that many processes on each machine, not 2"),
        (["peft=dora", "peft.dropout=0.1"], "is not tested with peft=dora.*peft.dropout=0"),
        (["precision=fp16"], "is not tested with precision=fp16"),
        (["trainer.accumulate=1", "trainer.strategy=fsdp"], "trainer.accumulate=1 micro-batches"),
    ],
)
def test_what_cannot_be_split_into_layers_says_why(tmp_path, monkeypatch, asked, message):
    monkeypatch.setattr(launch, "found", lambda environment=None: launch.Launch("torchrun", 0, 2, 2))
    split = [*TWO, "model=llama_tiny", *TENSOR]
    sound = prepared(tmp_path, *split)
    assert sound.science["trainer"]["tensor_parallel_size"] == 2
    assert "tensor_parallel_size" not in prepared(tmp_path, *TWO).science["trainer"]
    with pytest.raises(InputError, match=f"(?s){message}"):
        prepared(tmp_path, *split, *asked)


def test_how_many_processes_is_part_of_the_identity_and_one_is_not(tmp_path, monkeypatch):
    alone = prepared(tmp_path, *TWO)
    assert "ranks" not in alone.science["runs_as"]
    monkeypatch.setattr(launch, "found", lambda environment=None: launch.Launch("torchrun", 1, 2, 2))
    both = prepared(tmp_path, *TWO)
    assert both.science["runs_as"] == alone.science["runs_as"] | {"ranks": 2}
    assert both.id != alone.id


def test_an_evaluation_is_one_process(monkeypatch):
    evaluation, one_cell = OmegaConf.create({"run": "r"}), OmegaConf.create({"trainer": {}})
    assert not admission.lone_faults(evaluation)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "python evaluate.py" in admission.lone_faults(evaluation)[0]
    assert not admission.lone_faults(one_cell)


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


# -- trainings

ALPACA = ROOT / "tests" / "fixtures" / "alpaca.jsonl"
STREAMED = ["data=alpaca", f"data.path={ALPACA}", "data.streaming=true", "data.shuffle_buffer=5"]
ALIKE = {  # a sum of two is the same in either order, so nothing is lost to rounding
    "watched": ["precision=fp32", "probe=[lyapunov,shadow]", "guard=rollback"],
    "scaled": ["precision=fp16"],
    "adalora": ["precision=fp32", "peft=adalora"],
    "sdt": ["precision=fp32", "peft=sdt", "peft.warmup_steps=2"],
    "full": ["precision=bf16", "peft=none"],
    "four": ["precision=fp32", "trainer.accumulate=4"],  # each process adds up two: another order
    "streamed": [
        "precision=fp32",
        "data=alpaca",
        f"data.path={ALPACA}",
        "data.streaming=true",
        "data.shuffle_buffer=5",
    ],
    "sharded": ["precision=bf16", "peft=none"],  # the norm of the gradient is a sum of parts
    "sharded lora": ["precision=fp32", "peft=lora"],
    "tensor": ["model=pythia_tiny", "precision=fp32", "peft=none", "trainer.learning_rate=1e-4"],
    "tensor lora": ["model=llama_tiny", "precision=fp32", "peft=lora"],
}
SHARDED = ("sharded lora", "sharded torn", "sharded resumed")
SPLIT = ("tensor lora", "tensor torn", "tensor resumed")
ROUNDED = ("four", "sharded", "sharded lora", "tensor", "tensor lora")
FSDP = "trainer.strategy=fsdp"
DROPOUT = ["model=llama_tiny", "precision=fp32", "peft.dropout=0.3"]  # random numbers of each process's own
COMMANDS = {
    **ALIKE,
    "sharded": [*ALIKE["sharded"], FSDP],
    "sharded lora": [*ALIKE["sharded lora"], FSDP],
    "sharded torn": [*ALIKE["sharded lora"], FSDP],
    "sharded resumed": [*ALIKE["sharded lora"], FSDP],
    "tensor": [*ALIKE["tensor"], *TENSOR],
    "tensor lora": [*ALIKE["tensor lora"], *TENSOR],
    "tensor torn": [*ALIKE["tensor lora"], *TENSOR],
    "tensor resumed": [*ALIKE["tensor lora"], *TENSOR],
    "whole": DROPOUT,
    "torn": DROPOUT,
    "resumed": DROPOUT,
    "lost": [],
}
UNDER_SRUN = ("sdt", "full")
SRUN = {"SLURM_STEP_ID": "0", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1", "SLURM_NODELIST": "host"}


def one_rank(rank: int, ports: list[int], runs: str, queue: multiprocessing.Queue) -> None:
    """The entry point as torchrun or srun starts it, for each of the commands: the imports are paid once."""
    torchrun = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    srun = SRUN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}
    for port, (name, how) in zip(ports, COMMANDS.items(), strict=True):
        for key in (*torchrun, *srun):
            os.environ.pop(key, None)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | (
            srun if name in UNDER_SRUN else torchrun
        )
        sys.argv = ["train.py", *SMALL, *TWO, *how, f"runs={runs}/{name.replace('resumed', 'torn')}"]
        with pytest.MonkeyPatch.context() as patch:
            if name != "watched":  # one report is enough
                patch.setattr(study, "_show", lambda folder: 0)
            if name.endswith(("torn", "lost")) and rank == 1:
                number = signal.SIGKILL if name == "lost" else signal.SIGTERM
                patch.setattr(StepRecorder, "on_before_optimizer_step", partial(kill, number))
            try:
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            except SystemExit as stop:
                queue.put((name, rank, stop.code))


def kill(number: int, trainer, *_) -> None:
    if trainer.global_step == 1:
        os.kill(os.getpid(), number)


@pytest.fixture(scope="session")
def two(tmp_path_factory) -> tuple[Path, dict[tuple[str, int], int]]:
    """The folders of all commands, and how each ended in each process; one for all workers of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own below that of the session
        shared = shared.parent
    runs, ends = shared / "two", shared / "two.json"
    with FileLock(shared / "two.lock"):
        if not ends.exists():
            runs.mkdir()
            ends.write_text(json.dumps(run_all(runs)))
    return runs, {(name, rank): code for name, rank, code in json.loads(ends.read_text())}


def run_all(runs: Path) -> list[tuple[str, int, int]]:
    """Every command on two processes: its name, the rank, and what the process ended with."""
    with ExitStack() as free:
        sockets = [free.enter_context(socket.socket()) for _ in COMMANDS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [spawn.Process(target=one_rank, args=(rank, ports, str(runs), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return [queue.get(timeout=120) for _ in range(2 * len(COMMANDS) - 1)]  # one process is lost
    finally:
        for process in processes:
            process.kill()


def folder_of(runs: Path) -> Path:
    ((folder, _),) = records.load_study(runs / "default")
    return folder


def same(a: Path, b: Path, **tolerance: float) -> None:
    series = [pd.read_parquet(folder / records.STEPS).drop(columns=CLOCKS, errors="ignore") for folder in (a, b)]
    exact = tolerance or {"check_exact": True}
    pd.testing.assert_frame_equal(*series, check_like=True, **exact)
    for name in (records.STABILITY, records.ITEMS):
        if (a / name).exists() or (b / name).exists():
            pd.testing.assert_frame_equal(*[pd.read_parquet(f / name) for f in (a, b)], **exact)
    if not tolerance:  # AdamW divides a gradient by its size: the rounding of one that is nearly 0 moves its weight
        assert same_weights(a, b)
    first, second = (records.load(folder) for folder in (a, b))
    for part in ("scores", "kernels", "guard_actions", *(() if tolerance else ("training", "stability", "peft"))):
        assert first.get(part) == second.get(part), part


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_give_the_numbers_of_one(two, tmp_path, name):
    """Every loss, weight, λ and score: to the bit where each process has one micro-batch of a step."""
    runs, ended = two
    assert ended[name, 0] == ended[name, 1] == 0
    alone = prepared(tmp_path, *TWO, *ALIKE[name])
    assert cell.ensure(alone)["status"] == "ok"
    folder = folder_of(runs / name)
    assert records.load(folder)["config"]["runs_as"]["ranks"] == 2
    same(alone.folder, folder, **(TOL[torch.float32] if name in ROUNDED else {}))


@pytest.mark.parametrize(("whole", "torn", "resumed"), [("whole", "torn", "resumed"), SHARDED, SPLIT])
def test_a_signal_to_one_process_stops_both_after_the_same_step_and_the_command_goes_on(two, whole, torn, resumed):
    runs, ended = two
    assert ended[torn, 0] == ended[torn, 1] == 128 + signal.SIGTERM
    assert ended[whole, 0] == ended[resumed, 0] == ended[resumed, 1] == 0
    assert records.load(folder_of(runs / torn))["resumed"]["at_steps"] == [2]
    same(folder_of(runs / whole), folder_of(runs / torn))


def test_a_process_that_is_killed_ends_the_others_with_its_checkpoint_kept(two):
    runs, ended = two
    assert ended["lost", 0] == 1
    record = records.load(folder_of(runs / "lost"))
    assert record["status"] == "failed"
    assert "another process of this cell has ended" in record["error"]["message"]
