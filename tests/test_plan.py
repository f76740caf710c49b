"""What a command will run, what it will cost, and what of it is there: found without running it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from lyapft import backbone, cell, recurrence, tasks
from lyapft.module import response_loss
from lyapft.plan import calibration, cells, cores, file, gpu, sizes
from lyapft.plan.__main__ import main
from lyapft.verdict import Outstanding, judge
from tests.test_cell import SMALL
from tests.test_cli import ROOT
from tests.test_verdict import STEADY, study, text

MATRIX = ("seed=0,1", "model=mamba_tiny,llama_tiny", "peft=none,lora", "precision=fp32,bf16", "threads=1")
PUBLISHED = {  # parameters of the checkpoints, as their model cards and files have them
    "mamba_130m": 129_135_360,
    "mamba_2.8b": 2_768_345_600,
    "pythia_160m": 162_322_944,
    "pythia_2.8b": 2_775_208_960,
    "tinyllama_1.1b": 1_100_048_384,
    "smollm2_135m": 134_515_008,
    "olmo_1b": 1_176_764_416,
}


HOURS = (r"([\d,]+) GPU hours", r"On 1 of them: ([\d,.]+) hours", r"On 2 of them: ([\d,.]+) hours")


def planned(*overrides: str) -> list[cells.Planned]:
    GlobalHydra.instance().clear()
    with cells.composing():
        return cells.cells(cells.composed(["hydra.mode=MULTIRUN", *overrides]))


def sized(*overrides: str) -> sizes.Sizes:
    (one,) = [p for p in planned("reference=off", *overrides) if p.role == cells.CELL]
    return sizes.count(one.config)


@pytest.fixture(scope="module")
def matrix() -> list[cells.Planned]:
    return planned(*MATRIX, "study.noise_floor=[replicate,threads]")


def test_a_plan_has_every_cell_each_reference_once_and_the_reruns_of_seed_0(matrix):
    roles = [one.role for one in matrix]
    assert roles.count(cells.CELL) == 16  # the references are among them
    assert roles.count(cells.REFERENCE) == 0
    assert roles.count(cells.RERUN) == 2 * 8
    assert len({one.key for one in matrix}) == len(matrix)
    assert {one.seed for one in matrix if one.role == cells.RERUN} == {0}
    assert len({one.recipe for one in matrix}) == 8
    alone = planned("seed=0", "precision=bf16,fp16", "threads=1")
    assert sorted(one.role for one in alone) == [cells.CELL] * 2 + [cells.REFERENCE] * 2
    assert alone[0].role == cells.REFERENCE  # before the cell that needs it


def test_what_is_given_goes_before_a_presets_own_choices():
    found = planned("study=matrix", "seed=range(1,3)", "model=llama_tiny", "peft=lora", "study.noise_floor=[]")
    assert [one.choices["precision"] for one in found if one.role == cells.CELL] == ["fp32", "bf16", "fp16"] * 2
    assert {one.seed for one in found} == {1, 2}
    assert {one.choices["model"] for one in found} == {"llama_tiny"}


def test_a_base_is_one_cell_whatever_the_seed():
    found = planned("study=icl", "model=mamba_tiny,llama_tiny")
    assert sorted(one.seed for one in found if not one.config.trainer.steps) == [0, 0]
    assert sorted(one.seed for one in found if one.config.trainer.steps) == sorted([*range(8)] * 2)
    scratch = planned("seed=0,1", "model=mamba_130m", "trainer.steps=0", "model.init=scratch", "reference=off")
    assert [one.seed for one in scratch] == [0, 1]  # its weights are drawn by it


def test_a_setting_that_follows_the_seed_is_resolved_for_each():
    found = planned("seed=0,1", "data.data_seed=${seed}", "reference=off")
    assert [one.settings["data"]["data_seed"] for one in found] == [0, 1]


def test_a_record_is_found_by_its_settings_alone(tmp_path):
    (one,) = planned(*SMALL, "reference=off", "seed=3")
    prepared = cell.prepare(one.config)
    record = {"status": "ok", "config": json.loads(json.dumps(prepared.science))}
    assert cells.key_of(record) == one.key
    other = [planned(*SMALL, "reference=off", "seed=3", change)[0].key for change in ("trainer.steps=5", "peft=none")]
    assert one.key not in other
    entries = [file.entry(one), *map(file.entry, planned(*SMALL, "reference=off", "seed=4"))]
    states = file.states(entries, [record])
    assert list(states.values()) == ["ok", file.NOT_RUN]
    assert file.summary(states) == "2 planned: 1 ok, 1 not run"
    assert [left.seed for left in file.outstanding(entries, [record | {"id": "x"}])] == [4]
    assert file.outstanding(entries, [record | {"id": "x"}])[0].alike == {"x"}


def test_a_plan_grows_and_loses_nothing(tmp_path):
    file.save(planned(f"runs={tmp_path}", "seed=0", "precision=bf16"))
    first = file.load(tmp_path / "default")
    file.save(planned(f"runs={tmp_path}", "seed=0,1", "precision=fp32"))
    both = file.load(tmp_path / "default")
    assert {one.key for one in first} < {one.key for one in both}
    (now_a_cell,) = [one for one in both if one.choices["peft"] == "lora" and one.key in {r.key for r in first[1:2]}]
    assert now_a_cell.role == cells.CELL  # it was planned as a reference only


def test_threads_are_shared_out_among_the_cells_that_run_at_a_time(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(cores, "_joblib_cores", lambda: 8)
    assert cores.threads_per_cell(None, {"n_jobs": 4}) == 2
    assert cores.threads_per_cell(None, {"n_jobs": -1}) == 1
    assert cores.threads_per_cell(3, {"n_jobs": 4}) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert cores.threads_per_cell(None, {"n_jobs": 4}) == 5  # joblib leaves it as it is


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_are_those_of_the_published_models(model):
    assert sized(f"model={model}", "peft=none").base == PUBLISHED[model]


def real(model: str, peft: str) -> tuple[backbone.Backbone, sizes.Sizes]:
    (one,) = planned("reference=off", f"model={model}", f"peft={peft}", "precision=fp32")
    base = backbone.load(one.config.model)
    instantiate(one.config.peft).attach(base, recurrence.install(base.model, "torch", device="cpu"))
    return base, sizes.count(one.config)


@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("model", ["mamba_tiny", "mamba2_tiny", "llama_tiny", "pythia_tiny"])
def test_sizes_are_those_of_the_real_model(model, peft):
    """Parameters exactly; operations as torch's own counter finds them; what autograd keeps to a third."""
    base, counted = real(model, peft)
    parameters = list(base.model.parameters())
    assert counted.base + counted.adapters == sum(p.numel() for p in parameters)
    assert counted.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    ids, weights = torch.randint(3, 1000, (4, 64)), {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = base.model(input_ids=ids, use_cache=False).logits
    held = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    assert counted.kept * ids.numel() == pytest.approx(held, rel=1 / 3)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        base.model(input_ids=ids, use_cache=False)
    assert counted.scoring_operations(64) * ids.numel() == pytest.approx(forward.get_total_flops(), rel=0.1)
    if "mamba" in model and peft == "none":
        return  # torch counts the weight gradient of a depthwise convolution as if it were dense
    with FlopCounterMode(display=False) as step:
        response_loss(base.model(input_ids=ids, use_cache=False).logits, ids).backward()
    assert counted.training_operations(64) * ids.numel() == pytest.approx(step.get_total_flops(), rel=0.15)
    assert logits.requires_grad


def test_memory_of_a_step_by_hand():
    own = sizes.Sizes(base=100, adapters=10, trainable=10, weights=90, vocabulary=7, kept=20, scan=0, attention=0)
    mixed = own.memory("bf16", tokens=3)
    assert (mixed.parameters, mixed.adapters, mixed.gradients, mixed.optimizer) == (400, 40, 40, 80)
    assert mixed.activations == 3 * 20 + 2 * 90  # and the weights' half copies
    assert mixed.logits == 12 * 7 * 3
    assert mixed.total == 400 + 40 + 40 + 80 + 240 + 252
    half = own.memory("bf16_true", tokens=3)
    assert (half.parameters, half.gradients, half.optimizer) == (200, 20, 40)
    assert own.memory("fp16_true", tokens=3).optimizer == 80  # moments stay in float32


def test_operations_of_a_step_by_hand():
    own = sizes.Sizes(base=100, adapters=0, trainable=100, weights=90, vocabulary=7, kept=20, scan=0, attention=0)
    assert own.training_operations(64) == 6 * 90
    (one,) = planned(*SMALL, "reference=off", "task=piqa", "task.limit=null", "task.shots=[0]", "precision=fp32")
    card = gpu.Card(single=1e6, utilisation=0.5)
    trained, scored = 4 * 4 * 64 * own.training_operations(64), gpu.TASKS["piqa"].tokens(0) * 2 * 90
    assert gpu.seconds(one.config, own, card) == pytest.approx((trained + scored) / 5e5)


def test_a_calibration_is_made_once_and_its_queries_are_counted(tmp_path):
    (one,) = planned(*SMALL, f"runs={tmp_path}", "reference=off", "task.shots=[0,2]", "precision=fp32")
    found = calibration.calibrate(one)
    assert min(found.step_s, found.fixed_s, found.query_s) > 0
    assert found.seconds(steps=7, queries=3) == found.fixed_s + 7 * found.step_s + 3 * found.query_s
    records = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert len(records) == 2
    assert calibration.calibrate(one) == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")} == records
    task = instantiate(one.config.task)
    assert isinstance(task, tasks.SkillsTask)
    assert calibration.queries(one.config) == 2 * 2 * 8  # two numbers of shots, two rule sets, eight items of each


def test_the_command_says_what_fits(capsys):
    paper = ["study=paper", "seed=0", "model=mamba_130m,pythia_2.8b", "peft=none", "precision=bf16", "--gpu"]
    assert main([*paper, "--fits", "24GB"]) == 1
    page = capsys.readouterr().out
    assert "mamba_130m · alpaca · bf16 · none" in page
    assert "NO, not even 1 row of 32" in page  # 2.8 billion parameters take 44 GB before the first token
    assert "GPU hours" in page
    assert "not measured on any" in page
    assert "On disk" not in page
    mixed = ["--fits", "500GB", *paper[:2], "--gpus", "1,2", *paper[2:]]  # options stand anywhere among overrides
    assert main(mixed) == 0
    page = capsys.readouterr().out
    assert "NO" not in page
    total, one, two = (float(re.search(pattern, page)[1].replace(",", "")) for pattern in HOURS)
    assert one == pytest.approx(total, abs=0.5)
    assert total / 2 - 0.5 <= two < one
    trained = 3 * 4 * (PUBLISHED["mamba_130m"] + PUBLISHED["pythia_2.8b"])  # the cell, its reference and its rerun
    assert f"{trained / 1e9:,.0f} GB of trained tensors" in page
    with pytest.raises(SystemExit):
        main([*paper, "--fits", "much"])
    assert main(["study=nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_the_verdict_says_what_the_study_still_has_to_run():
    records = study({("bf16", "lora"): STEADY, ("fp32", "lora"): STEADY})
    own = next(r for r in records if r["choices"]["precision"] == "bf16")
    other = own["choices"] | {"precision": "fp16"}
    left = [
        Outstanding(own["choices"], 77, frozenset({own["id"]})),
        Outstanding(own["choices"], 0, frozenset({own["id"]}), rerun=True),
        Outstanding(other, 0),
    ]
    said = text(judge(records, outstanding=left), "What is missing")
    assert "bf16 · lora: not run for seed 77; rerun not run for seed 0" in said
    assert "fp16 · lora: not run for seed 0" in said
    assert "Nothing is missing" in text(judge(records), "What is missing")
    assert Path(file.FILE).name == file.FILE


def test_choices_are_spanned_without_a_preset():
    with cells.composing():
        planned = cells.cells(cells.composed(["model=mamba_tiny,llama_tiny", "seed=range(2)", "reference=off"]))
    found = [(one.choices["model"], one.seed) for one in planned]
    assert found == [(model, seed) for model in ("mamba_tiny", "llama_tiny") for seed in range(2)]


def test_two_commands_that_plan_one_study_at_once_lose_no_cell(tmp_path):
    """Each adds to what the other has left, a hundred times."""
    code = (
        "import sys\nfrom dataclasses import replace\nfrom pathlib import Path\nfrom lyapft.plan import file\n"
        "from tests.test_plan import planned\n"
        "one = planned('reference=off', f'runs={sys.argv[1]}')[0]\n"
        "for i in range(40):\n"
        "    file.save([replace(one, settings={**one.settings, 'other': sys.argv[2] + str(i)})])\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=ROOT) for name in "ab"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len(file.load(tmp_path / "default")) == 80
