"""What a person types, and gets: exit codes, messages without tracebacks, sweeps that go on, Ctrl-C."""

import errno
import json
import logging
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra._internal.core_plugins import basic_launcher

from lyapft import cell, records, study
from tests import commands

ROOT = Path(__file__).parent.parent
SMALL = (
    "trainer.steps=3",
    "trainer.batch_size=4",
    "trainer.progress=false",
    "data.limit=32",
    "task.limit=8",
    "task.shots=[0]",
    "threads=1",
)


@pytest.fixture
def typed(monkeypatch, capfd, tmp_path):
    """Runs `python train.py …` (or evaluate.py) in this process; returns exit code and everything printed."""
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)

    def run(*arguments: str, name: str = "train") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.setattr(study.StudyFolder, "planned", None)
        monkeypatch.setattr(study.StudyFolder, "touched", [])
        cell._failed_references.clear()
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        logging.getLogger().handlers[:] = handlers
        printed = capfd.readouterr()
        lines = (printed.out + printed.err).splitlines()
        echo = ("INFO lyapft.cell: cell: ", "Error executing job with overrides")  # what was typed is not an answer
        return stop.value.code, "\n".join(line for line in lines if not line.startswith(echo))

    return run


def alpaca(path: Path, rows: list) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def row(**more):
    return {"instruction": "Add.", "input": "1 2", "output": "3", **more}


BAD = {
    "missing file": (["data=alpaca", "data.path=none.json"], ["none.json"]),
    "no path": (["data=alpaca"], ["data.path"]),
    "unknown choice": (["peft=lorra"], ["lorra", "lora"]),
    "misspelt key": (["trainer.stepz=5"], ["stepz"]),
    "wrong type": (["trainer.steps=many"], ["trainer.steps", "many"]),
    "negative steps": (["trainer.steps=-1"], ["trainer.steps=-1 must not be negative"]),
    "negative batch": (["trainer.batch_size=-1"], ["trainer.batch_size=-1 must be greater than 0"]),
    "zero length": (["data.max_length=0"], ["data.max_length=0 must be greater than 0"]),
    "probe never": (["probe.lyapunov.every=0"], ["probe.lyapunov.every=0 must be 1 or more"]),
    "W&B mode": (["logger=wandb", "logger.mode=sometimes"], ["sometimes", "offline"]),
    "beyond positions": (["model=llama_tiny", "data.max_length=99999"], ["99999", "4096"]),
    "too many shots": (["task.shots=[0,99]"], ["99"]),
    "tf32 on a CPU": (["precision=tf32", "device=cpu"], ["tf32", "fp32"]),
    "fp8 on a CPU": (["precision=fp8"], ["fp8", "bf16"]),
    "no model folder": (["model=hf", "model.path=no/model"], ["no/model"]),
    "no task folder": (["task=mmlu", "task.path=no/mmlu"], ["no/mmlu"]),
    "unknown kernel": (["kernel=fast"], ["kernel", "fast"]),
    "unknown target": (["peft.targets=[q_proj]"], ["q_proj", "in_proj"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_message(typed, case, tmp_path):
    overrides, parts = BAD[case]
    started = time.perf_counter()
    code, printed = typed(*SMALL, *overrides)
    assert code == 1
    assert "Traceback" not in printed
    for part in parts:
        assert part in printed
    assert time.perf_counter() - started < 30


FILES = {
    "empty file": ("", ["a.json", "empty"]),
    "invalid JSON": ('[{"instruction": "a", "input": "", "output": "b"},\n{"instruction": }]', ["a.json", "line 2"]),
    "wrong columns": (json.dumps([{"question": "a", "answer": "b"}] * 3), ["instruction", "question"]),
    "null fields": (
        json.dumps([row(), row(output=None), row(instruction=7)]),
        ["2 of 3 rows", "row 2", "max_bad_fraction"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_named_with_what_to_do(typed, case, tmp_path):
    content, parts = FILES[case]
    (tmp_path / "a.json").write_text(content)
    code, printed = typed(*SMALL, "data=alpaca", "data.path=a.json")
    assert code == 1
    assert "Traceback" not in printed
    for part in parts:
        assert part in printed


def test_a_checkpoint_folder_without_weights_is_named(typed, tmp_path):
    source = ROOT / "lyapft" / "checkpoints" / "mamba_tiny"
    (tmp_path / "hollow").mkdir()
    for file in source.glob("*.json"):
        (tmp_path / "hollow" / file.name).write_bytes(file.read_bytes())
    code, printed = typed(*SMALL, "model=hf", "model.path=hollow")
    assert code == 1
    assert "hollow" in printed
    assert "weights" in printed
    assert "Traceback" not in printed


def test_a_sweep_goes_on_after_a_failure_skips_what_is_done_and_tells(typed, monkeypatch, tmp_path):
    whole = cell.execute

    def execute(one, *rest):
        if one.config.peft.name == "lora":
            raise RuntimeError("broken on purpose")
        whole(one, *rest)

    sweep = ("-m", *SMALL, "reference=off", "precision=fp32,bf16", "peft=lora,none", "runs=r")
    with monkeypatch.context() as patch:
        patch.setattr(cell, "execute", execute)
        code, printed = typed(*sweep)
    assert code == 1
    found = {
        (r["choices"]["precision"], r["choices"]["peft"]): r["status"] for _, r in records.load_study(Path("r/default"))
    }
    assert found == {
        ("fp32", "lora"): "failed",
        ("bf16", "lora"): "failed",
        ("fp32", "none"): "ok",
        ("bf16", "none"): "ok",
    }
    assert "broken on purpose" in printed
    assert "report.html" in printed  # the table and the report come all the same
    before = {p: p.stat().st_mtime_ns for p in Path("r").rglob("record.json")}
    code, printed = typed(*sweep)
    assert code == 0
    redone = {p for p in Path("r").rglob("record.json") if p.stat().st_mtime_ns != before[p]}
    assert {records.load(p.parent)["choices"]["peft"] for p in redone} == {"lora"}
    assert len(redone) == 2


def test_a_run_can_be_scored_again_and_on_other_tasks(typed, tmp_path):
    code, _ = typed(*SMALL, "reference=off")
    assert code == 0
    (folder,) = Path("runs/default").glob("mamba_tiny-*")
    record = records.load(folder)
    code, _ = typed(f"run={folder}", "threads=1", "progress=false", name="evaluate")
    assert code == 0
    (first,) = (folder / "evaluations").glob("*.json")
    assert json.loads(first.read_text())["scores"] == record["scores"]  # the reloaded model is the model
    again = first.stat().st_mtime_ns
    code, _ = typed(f"run={folder}", "threads=1", "progress=false", name="evaluate")
    assert code == 0
    assert first.stat().st_mtime_ns == again
    code, _ = typed(f"run={folder}", "task=skills", "task.shots=[1]", "task.limit=4", "progress=false", name="evaluate")
    assert code == 0
    assert len(list((folder / "evaluations").glob("*.json"))) == 2
    assert records.load(folder) == record


def test_every_refused_cell_of_a_sweep_is_named(typed):
    code, printed = typed("-m", *SMALL, "seed=-1,-2")
    assert code == 1
    assert "seed=-1 must not be negative" in printed
    assert "seed=-2 must not be negative" in printed


def test_a_sweep_over_studies_reports_on_each(typed):
    code, _ = typed("-m", *SMALL, "reference=off", "study.name=one,two")
    assert code == 0
    assert Path("runs/one/report.html").is_file()
    assert Path("runs/two/report.html").is_file()


HIGH = ["guard=stop", "+guard.rules.high={metric: loss, above: 0}"]


def test_a_cell_that_broke_down_is_no_failure_that_another_attempt_could_mend(typed, monkeypatch):
    sweep = ("-m", *SMALL, "reference=off")
    code, printed = typed(*sweep, "seed=0,1", *HIGH)
    assert code == study.BROKE_DOWN == 3
    assert "stopped_by_guard: " in printed
    assert "report.html" in printed
    assert typed(*SMALL, *HIGH, "reference=off")[0] == study.BROKE_DOWN  # found
    # a cell that failed, and one that could not begin, are another matter
    assert typed(*sweep, "precision=bf16,fp8", *HIGH)[0] == 1
    jobs = iter([basic_launcher.run_job])

    def no_space(*job, **settings):
        if (run_job := next(jobs, None)) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return run_job(*job, **settings)

    monkeypatch.setattr(basic_launcher, "run_job", no_space)  # where Hydra itself cannot begin the second one
    assert typed(*sweep, "seed=0,1", *HIGH)[0] == 1


def test_references_are_made_up_for_when_they_were_off_or_failed(typed, monkeypatch):
    assert typed(*SMALL, "reference=off")[0] == 0
    whole = cell.execute

    def execute(one, *rest):
        if one.role == "reference":
            raise RuntimeError("the reference broke")
        whole(one, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(cell, "execute", execute)
        code, printed = typed(*SMALL)
    assert code == 1
    assert "not its reference" in printed
    assert typed(*SMALL)[0] == 0
    statuses = [e["status"] for _, r in records.load_study(Path("runs/default")) for e in r["divergence"]]
    assert sorted(statuses) == ["ok", "ok", "ok", "self", "self", "self"]


@pytest.mark.parametrize("content", ["{", '{"schema_version": 1, "id": "ffffffffffff", "status": "ok"}'])
def test_a_run_folder_that_is_not_this_cells_is_refused_untouched(typed, content):
    assert typed(*SMALL, "reference=off")[0] == 0
    (path,) = Path("runs/default").glob("mamba_tiny-*/record.json")
    path.write_text(content)
    code, printed = typed(*SMALL, "reference=off")
    assert code == 1
    assert str(path.parent) in printed
    assert "Traceback" not in printed
    assert path.read_text() == content


def test_a_runs_folder_that_cannot_be_made_is_said(typed, tmp_path):
    (tmp_path / "file").touch()
    for sweep in ((), ("-m",)):
        code, printed = typed(*sweep, *SMALL, "runs=file/below")
        assert code == 1
        assert "runs=file/below cannot be made" in printed
        assert "Traceback" not in printed


def test_evaluate_refuses_what_is_no_finished_run(typed, tmp_path):
    for argument, part in (("run=nowhere", "nowhere"), ("progress=false", "run=runs/STUDY/CELL")):
        code, printed = typed(argument, name="evaluate")
        assert code == 1
        assert part in printed
        assert "Traceback" not in printed


def test_a_run_of_other_base_weights_is_not_scored(typed, tmp_path):
    code, _ = typed(*SMALL, "reference=off")
    assert code == 0
    (folder,) = Path("runs/default").glob("mamba_tiny-*")
    record = json.loads((folder / "record.json").read_text())
    record["config"]["model"]["content"] = "0" * 64
    (folder / "record.json").write_text(json.dumps(record))
    code, printed = typed(f"run={folder}", name="evaluate")
    assert code == 1
    assert "are not those that" in printed


def test_no_space_left_is_said_and_loses_nothing(typed, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "items.parquet")

    with monkeypatch.context() as patch:
        patch.setattr(records, "save_items", full)
        code, printed = typed(*SMALL, "reference=off")
    assert code == 1
    assert "no space left" in printed
    assert "Traceback" not in printed
    (folder,) = Path("runs/default").glob("mamba_tiny-*")
    assert records.load(folder)["status"] == "failed"
    assert typed(*SMALL, "reference=off")[0] == 0


def test_help_teaches_and_needs_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for part in (
        "precision=bf16,fp16",
        "kernel: auto, cpu",
        "peft: adalora, bitfit, dora, ia3",
        "Exit codes",
        "evaluate.py",
    ):
        assert part in done.stdout


def test_ctrl_c_ends_with_130_and_the_same_command_continues(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *SMALL,
        "trainer.steps=100000",
        "reference=off",
        f"runs={tmp_path}",
    ]
    # where this runs in the background of a script, SIGINT is ignored, and a child would inherit that
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = None
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (log and "training" in log.read_text()):
        log = next(tmp_path.rglob("cell.log"), None)
        time.sleep(0.2)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    ((_, record),) = records.load_study(tmp_path / "default")
    assert record["status"] == "interrupted"
    assert "report.html" in printed


def test_precision_of_the_process_is_left_as_it_was(typed):
    before = torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.get_default_dtype()
    assert typed(*SMALL, "reference=off", "precision=fp16")[0] == 0
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.get_default_dtype()) == before


def test_two_processes_share_their_references(tmp_path):
    """Both need the same two references at the same time: each is made once, by one of them."""
    command = ["train.py", *SMALL, f"runs={tmp_path}"]
    both = [commands.Started(*command, f"precision={name}", folder=tmp_path) for name in ("bf16", "fp16")]
    done = [process.done(180) for process in both]
    assert [one.returncode for one in done] == [0, 0], done
    printed = "".join(one.stdout + one.stderr for one in done)
    trained = [line for line in printed.splitlines() if "training mamba_tiny" in line]
    assert sum("(reference)" in line for line in trained) == 2
    assert len(trained) == 4
    assert {record["status"] for _, record in records.load_study(tmp_path / "default")} == {"ok"}
