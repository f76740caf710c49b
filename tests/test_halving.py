"""Where memory runs out: half the rows at once from that step on, recorded; nothing of the broken step is left."""

import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MambaForCausalLM

from lyapft import cell, dashboard, ranks, records
from lyapft.halving import Halvings, OutOfMemory, out_of_memory, until_it_fits
from lyapft.module import IGNORED, response_loss
from lyapft.probes import StepRecorder
from lyapft.report.columns import summary_columns
from lyapft.verdict import judge
from tests.test_cell import prepared
from tests.test_resume import cut, same, steps
from tests.test_verdict import STEADY, study
from tests.tolerances import TOL

HALVE = ["reference=off", "trainer.oom=halve", "trainer.steps=6", "precision=fp32", "probe=[lyapunov,shadow]"]
HOW = {
    "whole": ["trainer.batch_size=8"],
    "accumulated": ["trainer.batch_size=4", "trainer.accumulate=2"],
    "scaled": ["trainer.batch_size=8", "precision=fp16"],
    "packed": ["trainer.batch_size=8", "data.packing=true"],
    "penalty": ["trainer.batch_size=8", "peft=adalora"],
}


class Device:
    """Stands in for one that holds so many rows of a training and so many tokens of an evaluation.

    From `step` on a larger forward pass fails; or the backward pass does, after some gradients were added up.
    """

    def __init__(self, monkeypatch, rows=10**9, tokens=10**9, step=1, during="forward"):
        self.rows, self.tokens, self.step, self.during = rows, tokens, step, during
        self.now, self.asked, self.batches = 1, [], 0
        self.hook = None
        forward, started = MambaForCausalLM.forward, StepRecorder.on_train_batch_start

        def limited(model, input_ids=None, **rest):
            training = model.training and torch.is_grad_enabled()
            if training:
                self.asked.append((self.now, len(input_ids)))
            full = training and len(input_ids) > self.rows and self.now >= self.step
            if full and self.during == "backward":
                first = next(p for p in model.parameters() if p.requires_grad)  # the last to get its gradient
                self.hook = first.register_post_accumulate_grad_hook(self.fail)
            elif full or (not training and input_ids.numel() > self.tokens):
                self.fail()
            return forward(model, input_ids=input_ids, **rest)

        def start(recorder, trainer, *rest):
            self.now, self.batches = trainer.global_step + 1, self.batches + 1
            started(recorder, trainer, *rest)

        monkeypatch.setattr(MambaForCausalLM, "forward", limited)
        monkeypatch.setattr(StepRecorder, "on_train_batch_start", start)

    def fail(self, *_):
        if self.hook is not None:
            self.hook.remove()
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 99 bytes")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_shares_of_the_parts_are_the_loss_of_the_whole(rows, at_once, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (rows, 5), generator=generator)
    labels[torch.rand(rows, 5, generator=generator) < 0.4] = IGNORED
    labels[0, 1] = 3  # one at least
    whole = response_loss(logits, labels)
    (expected,) = torch.autograd.grad(whole, logits)
    halvings = Halvings([{"during": "training", "step": 2, "rows": at_once}], rows)
    assert len(halvings.micro_batches({"labels": labels}, 1)) == 1
    parts = halvings.micro_batches({"logits": logits, "labels": labels, "rows": torch.arange(rows)}, 2)
    assert max(len(part["labels"]) for part in parts) <= at_once
    targets = int((labels[:, 1:] != IGNORED).sum())
    shares = sum(response_loss(part["logits"], part["labels"], targets) for part in parts)
    (found,) = torch.autograd.grad(shares, logits)
    torch.testing.assert_close(shares, whole, **TOL[torch.float32])  # both are computed in float32
    torch.testing.assert_close(found, expected, **TOL[torch.float32])


@pytest.mark.parametrize(("how", "during"), [*((how, "forward") for how in HOW), ("accumulated", "backward")])
def test_the_step_is_done_again_in_parts_on_the_same_rows(tmp_path, monkeypatch, how, during):
    whole, halved = (prepared(tmp_path / name, *HALVE, *HOW[how]) for name in ("whole", "halved"))
    assert cell.ensure(whole)["oom"] == []
    device = Device(monkeypatch, rows=3, step=3, during=during)
    record = cell.ensure(halved)
    assert record["status"] == "ok", record["error"]
    widths = [4, 2] if how != "accumulated" else [2]
    assert record["oom"] == [{"during": "training", "step": 3, "rows": n, "accumulate": 8 // n} for n in widths]
    assert record["peft"]["proven_alive"]
    late = [rows for step, rows in device.asked if step > 3]
    assert max(late) <= 3
    found, expected = steps(halved), steps(whole)
    assert found.iloc[:2].equals(expected.iloc[:2])
    assert list(found["tokens"]) == list(expected["tokens"])
    dtype = torch.float16 if how == "scaled" else torch.float32
    for column in ("loss", "grad_norm", "lambda_max"):
        of_step = [torch.tensor(series[column][2], dtype=torch.float64) for series in (found, expected)]
        torch.testing.assert_close(*of_step, **TOL[dtype])


def test_the_result_depends_on_no_clock(tmp_path, monkeypatch):
    """Whatever checkpoint the cell is taken up from, and whoever goes on when it is killed."""
    Device(monkeypatch, rows=2, step=3)
    ends = ["trainer.checkpoint_every_s=0", "trainer.checkpoint_every_s=1000"]
    often, never, torn = (prepared(tmp_path / str(i), *HALVE, *HOW["whole"], ends[i % 2]) for i in range(3))
    assert cell.ensure(often)["resumed"]["at_steps"] == [2]  # the second time, too
    assert cell.ensure(never)["resumed"]["at_steps"] == []
    same(often, never)
    assert cut(monkeypatch, torn, 4, signal.SIGTERM) == 128 + signal.SIGTERM
    with monkeypatch.context() as patch:
        plenty = Device(patch)
        assert cell.ensure(torn)["status"] == "ok"
    assert max(rows for step, rows in plenty.asked if step > 4) == 2
    same(often, torn)


def test_an_evaluation_is_scored_with_less_at_once_and_costs_no_training(tmp_path, monkeypatch):
    whole, halved = (prepared(tmp_path / name, *HALVE, "task.batch_tokens=2048") for name in ("whole", "halved"))
    scores = cell.ensure(whole)["scores"]
    device = Device(monkeypatch, tokens=600)
    record = cell.ensure(halved)
    assert record["oom"] == [{"during": "evaluation", "batch_tokens": n} for n in (1024, 512)]
    assert device.batches == 6
    assert record["scores"] == scores


def test_a_validation_is_done_again_with_less_at_once(tmp_path, monkeypatch):
    asked = [*HALVE, "probe=lyapunov", "trainer.validation_rows=6", "trainer.batch_size=8", "task.batch_tokens=128"]
    whole, halved = (prepared(tmp_path / name, *asked) for name in ("whole", "halved"))
    expected = cell.ensure(whole)
    device = Device(monkeypatch, tokens=128)
    record = cell.ensure(halved)
    assert record["oom"] == [{"during": "validation", "rows": n} for n in (4, 2)]
    assert device.batches == 6
    assert record["validation"] == pytest.approx(expected["validation"], rel=TOL[torch.float32]["rtol"])
    assert record["scores"] == expected["scores"]


def test_a_selection_is_done_again_in_parts_of_the_same_batches(tmp_path, monkeypatch):
    asked = [*HALVE, *HOW["whole"], "peft=sdt", "peft.warmup_steps=3"]
    whole, halved, torn = (prepared(tmp_path / name, *asked) for name in ("whole", "halved", "torn"))
    expected = cell.ensure(whole)
    Device(monkeypatch, rows=4)
    record = cell.ensure(halved)
    entries = [{"during": "selection", "rows": 4, "accumulate": 2}]
    entries.append({"during": "training", "step": 1, "rows": 4, "accumulate": 2})
    assert record["oom"] == entries
    assert record["peft"]["selected"] == expected["peft"]["selected"]
    loss = [torch.tensor(steps(one)["loss"][0]) for one in (whole, halved)]
    torch.testing.assert_close(*loss, **TOL[torch.float32])
    assert cut(monkeypatch, torn, 0, signal.SIGTERM) == 128 + signal.SIGTERM
    assert cell.ensure(torn)["oom"] == entries
    same(halved, torn)


@pytest.mark.parametrize(
    ("override", "limits", "message"),
    [
        ("trainer.oom=stop", {"rows": 2}, "set trainer.oom=halve"),
        ("trainer.oom=halve", {"rows": 0}, "with one row at once"),
        ("trainer.oom=halve", {"tokens": 8}, "with 64 tokens at once"),
        ("trainer.validation_rows=2", {"tokens": 8}, "with one row at once"),
    ],
)
def test_what_does_not_fit_at_all_says_what_to_set(tmp_path, monkeypatch, override, limits, message):
    Device(monkeypatch, **limits)
    one = prepared(tmp_path, *HALVE, *HOW["whole"], "probe=lyapunov", override, "task.batch_tokens=128")
    record = cell.ensure(one)
    assert record["status"] == "oom"
    assert "can't allocate memory" in record["error"]["message"]
    assert message in record["error"]["message"]
    assert records.load(one.folder) == record


def test_what_is_no_lack_of_memory_is_tried_once():
    tried = []

    def broken():
        tried.append(1)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        until_it_fits(broken, Halvings([], 8), save=lambda: None)
    assert tried == [1]
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(OutOfMemory, match="before the first step"):  # nothing that could be halved
        until_it_fits(lambda: bytearray(2**62), Halvings([], 8), save=lambda: None)


def test_what_to_do_where_memory_runs_out_is_no_part_of_a_cells_identity(tmp_path):
    plain, told, other = (prepared(tmp_path, *o) for o in ([], ["trainer.oom=stop"], ["trainer.oom=halve"]))
    assert plain.id == told.id == other.id


@pytest.mark.parametrize(("oom", "processes", "may"), [("auto", 1, True), ("auto", 2, False), ("stop", 1, False)])
def test_several_processes_stop_unless_told_otherwise(tmp_path, monkeypatch, oom, processes, may):
    one = prepared(tmp_path, f"trainer.oom={oom}")
    monkeypatch.setattr(ranks, "count", lambda: processes)
    assert cell._halvings(one, []).allowed == may


def test_its_cost_is_compared_with_no_other(tmp_path):
    def of(verdict):
        return next(row.cost for row in verdict.rows if row.recipe.label.startswith("bf16"))

    made = study({("bf16", "lora"): STEADY})
    before = of(judge(made))
    for record in made:
        if record["seed"] < 2 and record["choices"]["precision"] == "bf16":
            record["oom"] = [{"during": "training", "step": 3, "rows": 4, "accumulate": 2}]
            record["cost"] = {"tokens_per_s": 1.0, "peak_bytes_per_token": 1e9}
    after = of(judge(made))
    assert (before.speed.n, after.speed.n, after.halved) == (8, 6, 2)
    assert after.speed.mean == pytest.approx(before.speed.mean)
    assert after.memory.mean == pytest.approx(before.memory.mean)
    columns = {column.title: column.cells for column in summary_columns(made[-8:], [str(i) for i in range(8)])}
    assert columns["memory ran out"][:3] == ["4 rows at once from step 3"] * 2 + ["–"]
    assert columns["tokens/s"][:2] == ["–", "–"]
    assert not any(name.startswith("cost/") for name in dashboard.summary(made[-8]))
