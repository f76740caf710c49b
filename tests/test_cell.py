"""One cell from config to record: complete, deterministic, never run twice, honest about failure."""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from lyapft import cell, divergence, records, tasks
from lyapft.errors import InputError
from tests.test_config import composed

SMALL = (
    "trainer.steps=4",
    "trainer.batch_size=4",
    "trainer.progress=false",
    "data.limit=64",
    "task.limit=8",
    "threads=1",
)


@pytest.fixture(autouse=True)
def _no_memory_of_failures():
    cell._failed_references.clear()


def prepared(runs: Path, *overrides: str) -> cell.Cell:
    GlobalHydra.instance().clear()
    return cell.prepare(composed(*SMALL, "task.shots=[0,2]", f"runs={runs}", *overrides))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.rglob("*.safetensors")) for name, value in load_file(file).items()}


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """The default cell (Mamba, bf16, LoRA) and the references that it makes."""
    runs = tmp_path_factory.mktemp("runs")
    assert cell.ensure(prepared(runs))["status"] == "ok"
    return runs / "default"


def test_a_cell_makes_its_two_references_once(study):
    found = {
        record["choices"]["precision"] + record["choices"]["peft"]: record for _, record in records.load_study(study)
    }
    assert {key: record["role"] for key, record in found.items()} == {
        "bf16lora": "cell",
        "fp32none": "reference",
        "fp32lora": "reference",
    }
    links = {entry["counterpart"]: entry for entry in found["bf16lora"]["divergence"]}
    assert links["paper"]["reference_id"] == found["fp32none"]["id"]
    assert links["precision_only"]["reference_id"] == found["fp32lora"]["id"]
    assert {entry["status"] for entry in found["fp32none"]["divergence"]} == {"self"}
    times = {path: path.stat().st_mtime_ns for path in study.rglob("record.json")}
    assert cell.ensure(prepared(study.parent))["status"] == "ok"
    assert times == {path: path.stat().st_mtime_ns for path in study.rglob("record.json")}


def test_divergence_is_the_paired_difference_of_the_scores(study):
    by_id = {record["id"]: record for _, record in records.load_study(study)}
    for record in by_id.values():
        for entry in record["divergence"]:
            if entry["status"] == "self":
                continue
            theirs = {(s["task"], s["shots"]): s["value"] for s in by_id[entry["reference_id"]]["scores"]}
            for score in entry["per_score"]:
                mine = next(s for s in record["scores"] if (s["task"], s["shots"]) == (score["task"], score["shots"]))
                expected = 100 * (mine["value"] - theirs[score["task"], score["shots"]])
                assert score["signed_points"] == pytest.approx(expected, abs=1e-9)
                assert score["abs_points"] == pytest.approx(abs(expected), abs=1e-9)


def test_answers_are_counted_once_in_the_record(study):
    homes = {record["id"]: folder for folder, record in records.load_study(study)}
    compared = [
        (folder, entry)
        for folder, record in records.load_study(study)
        for entry in record["divergence"]
        if entry["status"] == "ok"
    ]
    assert len(compared) == 3  # the cell against both, fp32 LoRA against the paper's
    for folder, entry in compared:
        ours, theirs = (pd.read_parquet(f / "items.parquet") for f in (folder, homes[entry["reference_id"]]))
        assert entry["flips"] == asdict(divergence.item_flips(ours, theirs))
        assert entry["answer_shift"] == asdict(divergence.answer_shift(ours, theirs))


def test_a_record_says_what_ran(study):
    folder, record = next((f, r) for f, r in records.load_study(study) if r["role"] == "cell")
    assert folder.name == record["name"] == f"mamba_tiny-skills-bf16-lora-s0-{record['id']}"
    assert record["precision"]["requested"] == record["precision"]["effective"] == "bf16"
    assert isinstance(record["precision"]["emulated"], bool)
    assert "selective_scan" in record["kernels"]
    assert 0 < record["model"]["parameters_trainable"] < record["model"]["parameters_total"]
    assert record["training"]["steps"] == 4
    assert record["data"]["rows"] == 64
    assert {(s["task"], s["shots"]) for s in record["scores"]} == {
        (t, k) for t in ("skills_new", "skills_old") for k in (0, 2)
    }
    assert record["cost"]["tokens_per_s"] > 0
    assert record["stability"]["lambda_max"] == -record["stability"]["margin"] < 0
    assert record["stability"]["lambda_max"] <= record["stability"]["norm_bound"] < 0
    assert len(record["stability"]["layers"]) == 2
    assert str(Path.home()) not in json.dumps(record["environment"])
    steps = pd.read_parquet(folder / "steps.parquet")
    assert list(steps["step"]) == [1, 2, 3, 4]
    assert {
        "loss",
        "learning_rate",
        "grad_norm",
        "loss_scale",
        "skipped",
        "tokens_per_s",
        "lambda_max",
        "margin",
    } <= set(steps)
    assert steps["lambda_max"].max() == record["stability"]["lambda_max"]
    items = pd.read_parquet(folder / "items.parquet")
    for score in record["scores"]:
        rows = items[(items["task"] == score["task"]) & (items["shots"] == score["shots"])]
        assert rows["correct"].mean() == pytest.approx(score["value"])
        assert len(rows) == score["n"]


@pytest.mark.parametrize(
    "overrides", [("precision=bf16",), ("precision=fp16", "peft=none"), ("model=mamba2_tiny", "precision=fp32")]
)
def test_the_same_cell_is_bitwise_the_same_and_the_probe_changes_nothing(tmp_path, overrides):
    a = prepared(tmp_path / "a", "reference=off", *overrides)
    b = prepared(tmp_path / "b", "reference=off", "probe=none", *overrides)
    torch.manual_seed(123)  # whatever was drawn before a cell must not matter
    first = cell.ensure(a)
    torch.rand(7)
    second = cell.ensure(b)
    assert first["status"] == second["status"] == "ok"
    assert a.id == b.id
    assert same_weights(a.folder, b.folder)
    assert first["scores"] == second["scores"]
    columns = ["loss", "grad_norm", "learning_rate", "loss_scale", "skipped"]
    both = [pd.read_parquet(c.folder / "steps.parquet")[columns] for c in (a, b)]
    pd.testing.assert_frame_equal(*both, check_exact=True)
    pd.testing.assert_frame_equal(*[pd.read_parquet(c.folder / "items.parquet") for c in (a, b)], check_exact=True)


def test_another_seed_is_another_cell(tmp_path):
    a, b = (prepared(tmp_path, "reference=off", f"seed={seed}") for seed in (0, 1))
    cell.ensure(a)
    cell.ensure(b)
    assert a.id != b.id
    assert not same_weights(a.folder, b.folder)


def test_a_failed_cell_keeps_its_error_and_is_tried_again(tmp_path, monkeypatch):
    broken = prepared(tmp_path, "reference=off")

    def evaluate(*_, **__):
        raise RuntimeError("the evaluation broke")

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "evaluate", evaluate)
        record = cell.ensure(broken)
    assert (record["status"], record["error"]) == (
        "failed",
        {"type": "RuntimeError", "message": "the evaluation broke"},
    )
    assert "Traceback" in (broken.folder / "cell.log").read_text()
    assert len(pd.read_parquet(broken.folder / "steps.parquet")) == 4
    assert cell.ensure(broken)["status"] == "ok"
    assert records.load(broken.folder)["error"] is None


def test_ctrl_c_is_recorded_and_the_cell_can_be_continued(tmp_path, monkeypatch):
    stopped = prepared(tmp_path, "reference=off")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lyapft.module.response_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cell.ensure(stopped)
    assert records.load(stopped.folder)["status"] == "interrupted"
    assert cell.ensure(stopped)["status"] == "ok"


def test_a_run_that_diverges_is_an_outcome_not_a_crash(tmp_path, monkeypatch):
    lost = prepared(tmp_path, "reference=off", "precision=fp32", "trainer.max_nonfinite=2")
    with monkeypatch.context() as patch:
        patch.setattr("lyapft.module.response_loss", lambda logits, labels, of: logits.sum() * torch.nan)
        record = cell.ensure(lost)
    assert record["status"] == "nonfinite"
    assert "2 steps in a row" in record["error"]["message"]
    assert cell.ensure(lost)["status"] == "nonfinite"  # an outcome of the cell: not tried again


def test_a_step_that_was_withheld_leaves_a_readable_record(tmp_path, monkeypatch):
    from lyapft import module

    count, loss = iter(range(99)), module.response_loss

    def poisoned(logits, labels, of):
        return loss(logits, labels, of) * (torch.nan if next(count) in (1, 4) else 1.0)  # 0 is the warm-up

    monkeypatch.setattr(module, "response_loss", poisoned)
    one = prepared(tmp_path, "reference=off", "precision=fp32")
    assert cell.ensure(one)["status"] == "ok"
    record = records.load(one.folder)
    assert (record["training"]["loss_first"], record["training"]["loss_last"]) == (None, None)
    assert record["training"]["skipped_steps"] == 2
    assert list(pd.read_parquet(one.folder / "steps.parquet")["skipped"]) == [True, False, False, True]


def test_a_failed_reference_leaves_the_cell_standing(tmp_path, monkeypatch):
    whole = cell.execute

    def execute(one, *rest):
        if one.role == "reference":
            raise RuntimeError("the reference broke")
        whole(one, *rest)

    monkeypatch.setattr(cell, "execute", execute)
    record = cell.ensure(prepared(tmp_path))
    assert record["status"] == "ok"
    assert {entry["status"] for entry in record["divergence"]} == {"missing"}


def test_all_faults_of_an_input_come_at_once(tmp_path):
    with pytest.raises(InputError) as caught:
        prepared(tmp_path, "trainer.batch_size=-2", "precision=tf32", "data=alpaca", "data.path=nowhere.json",
                 "task=mmlu", "task.path=nowhere", "model=hf", "model.path=no_model", "peft.r=0",
                 "kernel=mamba_ssm")  # fmt: skip
    for part in (
        "batch_size=-2",
        "tf32 needs a CUDA",
        "nowhere.json",
        "task.path=nowhere",
        "no_model",
        "peft.r=0",
        "kernel=mamba_ssm",
    ):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_required_kernel_is_no_matter_of_a_model_without_a_recurrence(tmp_path):
    choice = ["kernel=torch", "kernel.require=cpu"]
    with pytest.raises(InputError, match=r"kernel\.require=cpu, but selective_scan would run kernel 'torch'"):
        prepared(tmp_path, *choice)
    assert prepared(tmp_path, *choice, "model=llama_tiny").science["kernel"]


@pytest.mark.parametrize("peft", ["initial_state", "state_offset"])
def test_a_tuned_first_state_cannot_be_packed_whatever_the_choice_is_called(tmp_path, peft):
    with pytest.raises(InputError, match="in front of a row, not of each of its sequences"):
        prepared(tmp_path, "data.packing=true", f"peft={peft}", "peft.state=initial_state")


def test_a_folder_of_another_cell_is_refused(tmp_path):
    mine = prepared(tmp_path, "reference=off")
    records.save(mine.folder, {"schema_version": 1, "id": "ffffffffffff", "status": "ok"})
    with pytest.raises(InputError, match="record of another cell"):
        cell.ensure(mine)
    assert records.load(mine.folder)["id"] == "ffffffffffff"
