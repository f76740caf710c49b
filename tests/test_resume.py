"""A training that is cut off anywhere ends bitwise as if it had not been."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
from itertools import count, product
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import SoftFileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from lyapft import cell, records, tasks
from lyapft.cell import state, summary
from lyapft.probes import StepRecorder
from lyapft.resume import CheckpointFiles, Interrupted, Signals
from lyapft.resume import signals as signals_module
from lyapft.resume.files import CorruptCheckpoint
from lyapft.resume.tree import pack, unpack
from tests.test_cell import prepared, same_weights

numbers_of_machines = count()
OF_THE_MACHINE = r"step_s|tokens_per_s|shadow_s|cpu_percent|memory_.*"  # columns that say nothing of the training
EVENTS = ("guard_actions", "nonfinite", "scaler_skips", "alerts")  # of a record
ALPACA = Path(__file__).parent / "fixtures" / "alpaca.jsonl"
NEVER = ["reference=off", "trainer.steps=6", "trainer.checkpoint_every_s=0"]
HOW = {
    "fp32": ["precision=fp32"],
    "accumulated": ["precision=bf16", "trainer.accumulate=2"],
    "scaled": ["precision=fp16", "precision.growth_interval=2"],
    "full": ["precision=fp32", "peft=none"],
    "half": ["precision=fp16_true"],
    "half bf16": ["precision=bf16_true"],
    "dropout": ["model=llama_tiny", "precision=fp32", "peft.dropout=0.3"],
    "adalora": ["precision=fp32", "peft=adalora"],
    "sdt": ["precision=fp32", "peft=sdt", "peft.warmup_steps=2"],
    "lora_plus": ["precision=fp32", "peft=lora_plus"],
    "state": ["precision=fp32", "peft=initial_state"],
    "rolled back": [
        "precision=fp32",
        "guard=rollback",
        "guard.every=1",
        "+guard.rules.high={metric: loss, above: 8.0}",
    ],
    "skipped": ["precision=bf16", "guard=skip", "guard.skip_steps=1", "+guard.rules.high={metric: loss, above: 10.0}"],
    "pissa": ["precision=bf16_true_unpinned", "peft=pissa"],  # whose base weights depend on the seed's adapters
}
GUARDED = ("rolled back", "skipped")  # before and between the cuts
MORE_HOW = {  # with HOW every peft and every precision that a CPU has; the campaign of kills runs them all
    "scaled in half": ["precision=fp16_true", "peft=dora", "precision.growth_interval=2"],
    "dora": ["precision=fp16", "peft=dora"],
    "rslora": ["precision=fp16_true", "peft=rslora"],
    "lora_all": ["model=mamba2_tiny", "precision=bf16_true_unpinned", "peft=lora_all"],
    "vera": ["precision=bf16", "peft=vera"],
    "ia3": ["model=pythia_tiny", "precision=bf16_true", "peft=ia3"],
    "bitfit": ["precision=fp16", "peft=bitfit"],
    "state_offset": ["precision=bf16_true_unpinned", "peft=state_offset"],
    "state in half": ["precision=fp16_true", "peft=initial_state"],
    "sdt in half": ["precision=bf16_true", "peft=sdt", "peft.warmup_steps=2"],
    "adalora in half": ["precision=fp16", "peft=adalora"],
    "full in half": ["precision=fp16_true", "peft=none"],
    "full unpinned": ["precision=bf16_true_unpinned", "peft=none"],
    "packed": ["precision=bf16", "data.packing=true", "trainer.accumulate=2"],
    "all probes": ["precision=bf16", "probe=all", "guard=skip"],
    "streamed": [
        "data=alpaca",
        f"data.path={ALPACA}",
        "data.streaming=true",
        "data.shuffle_buffer=5",
        "data.workers=1",
    ],
    "rollback that waits": ["precision=fp16", "guard=rollback"],
}


def cut(monkeypatch, one: cell.Cell, step: int, number: int) -> int | str:
    """Run a cell that gets a signal; how it ended."""

    def kill(_, trainer, *__):
        if trainer.global_step == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(StepRecorder, "on_before_optimizer_step", kill)
        try:
            cell.ensure(one)
        except KeyboardInterrupt:
            return "Ctrl-C"
        except SystemExit as stop:
            return stop.code
    return "done"


def steps(one: cell.Cell) -> pd.DataFrame:
    """The step series, without what a clock or the machine says."""
    series = pd.read_parquet(one.folder / records.STEPS)
    return series[[name for name in series if not re.fullmatch(OF_THE_MACHINE, name)]]


def same(a: cell.Cell, b: cell.Cell) -> None:
    assert same_weights(a.folder, b.folder)
    pd.testing.assert_frame_equal(steps(a), steps(b), check_exact=True)
    pd.testing.assert_frame_equal(*[pd.read_parquet(c.folder / records.ITEMS) for c in (a, b)], check_exact=True)
    first, second = (records.load(c.folder) for c in (a, b))
    for part in ("scores", "training", "stability", "peft", "kernels", "precision", *EVENTS):
        assert first.get(part) == second.get(part), part


def test_every_peft_and_precision_is_resumed_somewhere(root):
    asked = {override for how in (HOW | MORE_HOW).values() for override in how}
    for group, elsewhere in (("peft", "lora"), ("precision", "tf32")):  # by default; on CUDA
        choices = {path.stem for path in (root / "conf" / group).glob("*.yaml")} - {elsewhere}
        assert choices <= {override.removeprefix(f"{group}=") for override in asked}


@pytest.mark.parametrize("how", HOW)
def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path, monkeypatch, how):
    whole, torn = (prepared(tmp_path / name, *NEVER, *HOW[how]) for name in ("whole", "torn"))
    assert cell.ensure(whole)["status"] == "ok"
    assert cut(monkeypatch, torn, 1, signal.SIGTERM) == 128 + signal.SIGTERM
    assert records.load(torn.folder)["status"] == "interrupted"
    assert cut(monkeypatch, torn, 4, signal.SIGUSR1) == 128 + signal.SIGUSR1
    record = cell.ensure(torn)
    assert record["status"] == "ok", record["error"]
    assert record["resumed"]["at_steps"] == [2, 5]
    assert record["resumed"]["environments"] == []
    same(whole, torn)
    assert bool(record.get("guard_actions")) == (how in GUARDED)
    assert not list(torn.folder.glob("checkpoint*"))


def test_going_on_in_another_environment_is_warned_of_and_recorded(tmp_path, monkeypatch, caplog):
    one = prepared(tmp_path, *NEVER)
    describe, places = summary.describe, {}
    monkeypatch.setattr(summary, "describe", lambda *given: describe(*given) | places)
    for place, step in (("here", 1), ("here", 2), ("there", 4)):
        places |= {"cpu": place, "python": str(step)}  # which Python it is can change no number
        cut(monkeypatch, one, step, signal.SIGTERM)
    assert caplog.text.count("another environment than before (cpu here is now there)") == 1
    places |= {"torch": "3.0", "python": "3"}
    record = cell.ensure(one)
    assert re.search(r"step 5 in another environment than before \(torch \S+ is now 3.0\)", caplog.text)
    assert record["resumed"]["at_steps"] == [2, 3, 5]
    kept = [(one["to_step"], one["cpu"], one["torch"]) for one in record["resumed"]["environments"]]
    assert kept == [(3, "here", torch.__version__), (5, "there", torch.__version__)]
    assert record["environment"]["torch"] == "3.0"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_that_was_cut_off_costs_no_training(tmp_path, monkeypatch, number):
    whole, torn = (prepared(tmp_path / name, "reference=off") for name in ("whole", "torn"))
    assert cell.ensure(whole)["status"] == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "evaluate", lambda *_, **__: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            cell.ensure(torn)
    trained = []
    monkeypatch.setattr(StepRecorder, "on_train_batch_end", lambda *_: trained.append(1))
    assert cell.ensure(torn)["status"] == "ok"
    assert not trained
    same(whole, torn)
    tables = [pd.read_parquet(c.folder / records.STABILITY) for c in (whole, torn)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, monkeypatch, caplog):
    whole, torn = (prepared(tmp_path / name, *NEVER) for name in ("whole", "torn"))
    assert cell.ensure(whole)["status"] == "ok"
    cut(monkeypatch, torn, 4, signal.SIGTERM)
    newest = torn.folder / "checkpoint.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1  # one bit of a tensor: the file is still well formed
    newest.write_bytes(content)
    record = cell.ensure(torn)
    assert "checksum differs" in caplog.text
    assert record["resumed"]["at_steps"] == [4]
    same(whole, torn)


def test_a_checkpoint_of_another_cell_is_passed_over_with_a_warning(tmp_path, monkeypatch, caplog):
    whole, torn = (prepared(tmp_path / name, *NEVER, "seed=1") for name in ("whole", "torn"))
    assert cell.ensure(whole)["status"] == "ok"
    other = prepared(tmp_path, *NEVER)
    cut(monkeypatch, other, 4, signal.SIGTERM)
    torn.folder.mkdir(parents=True)
    for path in other.folder.glob("checkpoint*"):
        shutil.copy(path, torn.folder)
    assert cell.ensure(torn)["resumed"]["at_steps"] == []
    assert caplog.text.count(f"is the checkpoint of another cell ({other.id}, not {torn.id})") == 2
    same(whole, torn)


def test_two_damaged_checkpoints_mean_a_new_start(tmp_path, monkeypatch):
    whole, torn = (prepared(tmp_path / name, *NEVER) for name in ("whole", "torn"))
    assert cell.ensure(whole)["status"] == "ok"
    cut(monkeypatch, torn, 4, signal.SIGTERM)
    for path in torn.folder.glob("checkpoint*"):
        path.write_bytes(path.read_bytes()[:100])
    assert cell.ensure(torn)["resumed"]["at_steps"] == []
    same(whole, torn)


def test_a_checkpoint_holds_what_trains_and_no_more(tmp_path, monkeypatch):
    torn = prepared(tmp_path, *NEVER)
    cut(monkeypatch, torn, 2, signal.SIGTERM)
    files = CheckpointFiles(torn.folder, torn.id)
    state = files.load_checkpoint(files.newest)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)


def test_a_first_signal_waits_and_a_second_does_not(monkeypatch):
    monkeypatch.setattr(signals_module, "SAME_S", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.caught == signal.SIGTERM
            with pytest.raises(Interrupted):
                signals.heed()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGUSR1)
            with pytest.raises(Interrupted):  # kept, should nobody have seen it
                signals.heed()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGTERM) == before


def step(*numbers: int, then=lambda: None) -> None:
    """What a training does in whose step these signals come."""
    with Signals() as signals, signals.deferred():
        for number in numbers:
            os.kill(os.getpid(), number)
        then()


def test_one_wish_to_stop_may_come_twice():
    """Ctrl-C reaches a process from the terminal and from torchrun; SIGTERM from SLURM and a container's runtime."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background has none
    try:
        with pytest.raises(KeyboardInterrupt):  # by Python's own handler, which had it before
            step(signal.SIGINT, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)
    with Signals():
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # while the record of the first is being written


def test_what_a_launcher_waits_for_is_handed_on_once_the_cell_has_ended():
    """submitit puts its job back into the queue by SIGUSR2, and ends the process wherever it is."""
    heard = []

    def requeue(number, frame):
        heard.append(number)
        sys.exit(-1)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        finished = []
        with pytest.raises(SystemExit) as stop:
            step(signal.SIGUSR2, then=lambda: finished.append(not heard))
        assert (heard, finished, stop.value.code) == ([signal.SIGUSR2], [True], -1)
        assert signal.getsignal(signal.SIGUSR2) is requeue
        with pytest.raises(ZeroDivisionError):  # what ends a cell otherwise is none of the launcher's
            step(then=lambda: 1 / 0)
        assert heard == [signal.SIGUSR2]
        with pytest.raises(SystemExit):  # SLURM's preemption sends both at once
            step(signal.SIGTERM, signal.SIGUSR2)
        assert heard == [signal.SIGUSR2] * 2
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_that_waits_when_a_step_fails_still_ends_the_process():
    def fail() -> None:
        raise ZeroDivisionError

    def cell_that_records_what_broke() -> None:
        with Signals() as signals, contextlib.suppress(ZeroDivisionError), signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            fail()

    with pytest.raises(SystemExit) as stop:
        cell_that_records_what_broke()
    assert stop.value.code == 128 + signal.SIGTERM


def test_a_signal_for_nobody_is_left_alone():
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    with Signals():
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


numbers = st.floats() | st.integers() | st.booleans() | st.none() | st.text()
trees = st.recursive(
    numbers,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(trees)
def test_a_state_keeps_every_bit_and_type(tree):
    assert repr(unpack(*pack(tree))) == repr(tree)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8])
def test_tensors_keep_format_and_shape(tmp_path, dtype):
    files = CheckpointFiles(tmp_path, "1f")
    base = torch.arange(6).to(dtype)
    state = {"scalar": base[3], "view": base[:2], "empty": base[:0], "matrix": base.view(2, 3).T}
    files.save_checkpoint(state, files.newest)
    found = files.load_checkpoint(files.latest())
    for name, tensor in state.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_what_could_run_code_is_neither_written_nor_read(tmp_path):
    files = CheckpointFiles(tmp_path, "1f")
    with pytest.raises(TypeError, match=r"state\['hook'\] is a function"):
        files.save_checkpoint({"hook": same}, files.newest)
    torch.save({"hook": 1}, files.newest)
    with pytest.raises(CorruptCheckpoint):
        files.load_checkpoint(files.newest)
    assert files.latest() is None


def test_the_one_before_is_there_at_every_moment(tmp_path, monkeypatch):
    files = CheckpointFiles(tmp_path, "1f")
    files.save_checkpoint({"n": 1}, files.newest)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            files.save_checkpoint({"n": 2}, files.newest)
    assert files.load_checkpoint(files.latest()) == {"n": 1}
    files.save_checkpoint({"n": 3}, files.newest)
    assert files.load_checkpoint(files.before) == {"n": 1}
    assert files.load_checkpoint(files.newest) == {"n": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.safetensors", "checkpoint.before.safetensors"}


def save_until(files: CheckpointFiles, n: int, renames: int) -> bool:
    """Save a checkpoint in a process that dies after so many renames; whether the new one was whole by then."""
    rename, left = os.replace, iter(range(renames))

    def or_die(source, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", or_die)
        files.save_checkpoint({"n": n}, files.newest)
    return renames > 0


@pytest.mark.parametrize("damaged", [(), ("newest",), ("before",), ("newest", "before")], ids=str)
@pytest.mark.parametrize("seen", [True, False], ids=["seen by an attempt", "unseen"])
def test_wherever_a_save_is_cut_off_the_newest_whole_checkpoint_is_found(tmp_path, damaged, seen):
    """Twice in a row, after any damage to what was there."""
    for number, renames in enumerate(product(range(4), repeat=2)):
        files = CheckpointFiles(tmp_path / str(number), "1f")
        files.newest.parent.mkdir()
        for n in (1, 2):
            files.save_checkpoint({"n": n}, files.newest)
        for name in damaged:
            path = getattr(files, name)
            path.write_bytes(path.read_bytes()[:-1])
        whole = max((n for n, name in ((1, "before"), (2, "newest")) if name not in damaged), default=None)
        for n, until in zip((3, 4), renames, strict=True):
            if seen:
                assert (files.latest() is not None) == (whole is not None)
            whole = n if save_until(files, n, until) else whole
            found = files.latest()
            assert (None if found is None else files.load_checkpoint(found)["n"]) == whole, (renames, n)
        files.remove()
        assert not list(files.newest.parent.glob("checkpoint*"))


def test_a_full_disk_is_named_whoever_met_it_and_the_cell_goes_on_later(tmp_path, monkeypatch):
    one = prepared(tmp_path, *NEVER)

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("lyapft.resume.files.save_file", full)
        record = cell.ensure(one)
    assert record["status"] == "failed"
    assert "no space left" in record["error"]["message"]
    assert records.load(one.folder)["error"] == record["error"]
    assert cell.ensure(one)["status"] == "ok"


def test_what_a_killed_process_had_half_written_is_removed(tmp_path):
    one = prepared(tmp_path, "reference=off")
    one.folder.mkdir(parents=True)
    half = one.folder / f".record.json.{'0' * 32}"
    half.write_text("{")
    assert cell.ensure(one)["status"] == "ok"
    assert not half.exists()


def test_a_cell_is_elsewhere_while_another_holds_it_also_where_locks_are_not_shared(tmp_path, monkeypatch):
    one = prepared(tmp_path, "reference=off")
    monkeypatch.setattr(state, "FileLock", lambda path: SoftFileLock(f"{path}.{next(numbers_of_machines)}"))
    assert not state.is_elsewhere(one)
    with state.only_one(one):
        assert state.is_elsewhere(one)
    assert not state.is_elsewhere(one)
