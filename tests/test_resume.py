"""A training that is cut off anywhere ends bitwise as if it had not been."""

import os
import signal

import pandas as pd
import pytest

from lyapft import cell, records
from tests.test_cell import prepared, same_weights

CLOCKS = ["step_s", "tokens_per_s"]  # readings of a clock, not of the training
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
    "rollback": ["precision=fp32", "guard=rollback"],
}


def cut(monkeypatch, one: cell.Cell, step: int, number: int) -> int | str:
    """Run a cell that gets a signal; how it ended."""

    def kill(_, trainer, *__):
        if trainer.global_step == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(cell.StepRecorder, "on_before_optimizer_step", kill)
        try:
            cell.ensure(one)
        except KeyboardInterrupt:
            return "Ctrl-C"
        except SystemExit as stop:
            return stop.code
    return "done"


def same(a: cell.Cell, b: cell.Cell) -> None:
    assert same_weights(a.folder, b.folder)
    series = [pd.read_parquet(c.folder / records.STEPS).drop(columns=CLOCKS) for c in (a, b)]
    pd.testing.assert_frame_equal(*series, check_exact=True)
    pd.testing.assert_frame_equal(*[pd.read_parquet(c.folder / records.ITEMS) for c in (a, b)], check_exact=True)
    first, second = (records.load(c.folder) for c in (a, b))
    for part in ("scores", "training", "stability", "peft", "kernels", "precision"):
        assert first.get(part) == second.get(part), part


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
    same(whole, torn)
    assert not list(torn.folder.glob("checkpoint*"))
