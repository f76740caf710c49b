"""Nobody let in, nothing let out: credentials, pickles, names that lead elsewhere, markup in data."""

import contextlib
import html.parser
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from omegaconf import OmegaConf

from lyapft import admission, backbone, cell, config, data, evaluation, records, recurrence, report, secrets, tasks
from lyapft.config import ModelConfig
from lyapft.errors import InputError
from lyapft.peft import Lora
from lyapft.peft import __main__ as peft_command
from lyapft.peft.base import ADAPTER_FOLDER, TENSORS
from lyapft.report.experiments import page as experiments_page
from lyapft.resume import CheckpointFiles
from tests import commands
from tests.test_cell import prepared
from tests.test_cli import ROOT, SMALL, typed  # noqa: F401 - a fixture

CANARY = "canary0f81c6d2e7b94a5a9d3c"
SHIPPED = ROOT / "lyapft" / "checkpoints" / "mamba_tiny"


def command(*arguments: str, name: str = "train") -> list[str]:
    return [sys.executable, str(ROOT / f"{name}.py"), *SMALL, *arguments]


# -- credentials


def secretive(folder: Path) -> dict[str, str]:
    """An environment with credentials, where W&B keeps all of its files in this folder."""
    found = os.environ | {"WANDB_API_KEY": CANARY * 2, "HF_TOKEN": f"hf_{CANARY}", "WANDB_MODE": "offline"}
    found |= {key: str(folder / "caches") for key in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    found.pop("WANDB_SERVICE", None)  # of this process: a command's files must be whole when the command ends
    return found


def leaks(folder: Path) -> list[str]:
    """Every file below that has a credential in it, or in its name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if CANARY.encode() in path.read_bytes() or CANARY in path.name]


def swept(folder: Path) -> set[str]:
    """Run a sweep over two processes with credentials, all probes and W&B; the titles of its processes."""
    titles: set[str] = set()
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", "-m")
    arguments = command("logger=wandb", "probe=all", "runs=r", "reference=off", *launcher)
    with (folder / "printed").open("wb") as file:
        process = psutil.Popen(arguments, cwd=folder, env=secretive(folder), stdout=file, stderr=file)
        while process.poll() is None:
            titles |= titles_of(process)
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(0.2)
    assert process.returncode == 0, (folder / "printed").read_text()
    return titles


def titles_of(process: psutil.Process) -> set[str]:
    """Command lines of a process and those that it started, as `ps` shows them to everyone."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.add(" ".join(one.cmdline()))
    return found


WINOGRANDE = ("task=winogrande", f"task.path={ROOT / 'tests' / 'fixtures' / 'winogrande.jsonl'}", "task.shots=[0]")
COMMANDS = {  # what is typed after the sweep, its exit code, and what it leaves
    "evaluate": (("evaluate.py", "run={cell}", "progress=false", *WINOGRANDE), 0, "evaluations/*.json"),
    "experiment": (("evaluate.py", "experiment=stall", "experiment.tokens=500", "run={study}"), 0, "stall-*.html"),
    "report": (("-m", "lyapft.report", "{study}", "--output=again.html"), 0, "again.html"),
    "plan": (("-m", "lyapft.plan", "study=smoke", "--gpu"), 0, "printed"),
    "failed": (("train.py", *SMALL, "runs=r", "data=alpaca", "data.path=none.json"), 1, "printed"),
    "other": (("train.py", *SMALL, "runs=r", "study.name=other", "reference=off"), 0, "other/*/record.json"),
    "dashboard": (("-m", "lyapft.dashboard", "push", "r/other"), 0, "other/wandb/*/*.wandb"),
}


def test_no_command_leaves_a_credential_anywhere(tmp_path):
    """Everything that is written, printed and shown in the process list."""
    titles = swept(tmp_path)
    written = [path.name for path in tmp_path.rglob("*")]
    assert {"record.json", "cell.log", "report.html", "plan.json", "printed"} <= set(written)
    assert sum(name.endswith(".wandb") for name in written) == 2
    assert leaks(tmp_path) == []
    assert any("loky" in title for title in titles)
    assert not any(CANARY in title for title in titles)
    study = tmp_path / "r" / "default"
    run = next(path.parent for path in study.glob("*/record.json"))
    for name, (words, expected, left) in COMMANDS.items():
        words = [word.format(cell=run, study=study) for word in words]
        done = commands.run(*words, folder=tmp_path, environment=secretive(tmp_path))
        (tmp_path / "printed").write_text(done.stdout + done.stderr)
        assert done.returncode == expected, (name, done)
        assert list(tmp_path.rglob(left)), name
        assert leaks(tmp_path) == [], name


REFUSED = {
    "a field's name": "+model.dims.hub_token=" + CANARY,
    "a URL": f"data.path=https://me:{CANARY}@host/data.json",
    "a token's look": f"model.path=hf_{CANARY}",
    "a swept field": f"+model.dims.api_key=a,{CANARY}",
    "a name of joined words": "+model.dims.hubToken=" + CANARY,
    "a name above": "+model.dims.password={value: " + CANARY + "}",
    "a query": f'data.path="https://host/data.json?X-Amz-Signature={CANARY}"',
    "a variable of Hydra's": "+hydra.job.env_set={WANDB_API_KEY: " + CANARY + "}",
}


@pytest.mark.parametrize(
    "settings",
    [
        {"hub-token": "abc"}, {"authToken": "abc"}, {"hf_tokens": "abc"}, {"passphrase": "abc"}, {"db_pwd": "abc"},
        {"authorization": "abc"}, {"private_key": "abc"}, {"wandb_key": "0" * 40}, {"token": {"value": "abc"}},
        {"password": 12345678}, {"url": "https://h/x?token=abc"}, {"model": "AIza" + 35 * "x"},
        {"x": "xoxb-" + 12 * "1"},
        {"launcher": {"setup": ["export WANDB_API_KEY=abc"]}}, {"text": "{HF_TOKEN: abc}"}, {"password": "$abc"},
    ],
)  # fmt: skip
def test_what_names_or_looks_like_a_credential_is_found_wherever_it_stands(settings):
    assert len(secrets.faults(settings)) == 1
    assert secrets.faults({}, [f"a.{key}={value}" for key, value in settings.items()])


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_tokens": 8192}, {"token": 8}, {"tokens": "256"}, {"tokenizer": "gpt2"}, {"revision": "0" * 40},
        {"setup": ["export WANDB_API_KEY=$KEY"]}, {"password": None}, {"path": "a/b?c=d"}, {"key": "loss"},
    ],
)  # fmt: skip
def test_an_ordinary_setting_is_none(settings):
    assert secrets.faults(settings) == []


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_settings_that_look_like_credentials_are_refused_and_not_repeated(typed, tmp_path, case, sweep):  # noqa: F811
    if case == "a swept field" and not sweep:
        pytest.skip("a list of values needs -m")
    code, printed = typed(*sweep, *SMALL, REFUSED[case])
    assert code == 1
    assert "looks like a credential" in printed
    assert "HF_TOKEN" in printed
    assert CANARY not in printed
    assert not any(tmp_path.iterdir())


def test_the_value_of_a_known_variable_is_refused_in_any_field(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    assert secrets.faults({"study": {"name": f"x-{CANARY}"}}) != []
    monkeypatch.delenv("WANDB_API_KEY")
    assert secrets.faults({"study": {"name": f"x-{CANARY}"}}) == []


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf" / "model").glob("*.yaml")))
def test_no_shipped_setting_looks_like_a_credential(name):
    from tests.test_config import composed

    assert secrets.faults(OmegaConf.to_container(composed(f"model={name}"))) == []


# -- folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    one = prepared(tmp_path_factory.mktemp("runs"), "reference=off")
    assert cell.ensure(one)["status"] == "ok"
    return one.folder


OUTSIDE = ("study.name=../x", "study.name=..", "study.name=/tmp/x", "model.name=../../x", "study.name=.git")


@pytest.mark.parametrize("override", OUTSIDE)
@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_names_that_lead_out_of_the_folder_are_refused_before_it_is_made(typed, tmp_path, override, sweep):  # noqa: F811
    inside = tmp_path / "deep" / "runs"
    code, printed = typed(*sweep, *SMALL, f"runs={inside}", override)
    assert code == 1
    assert "must be a plain folder name" in printed
    assert not any(tmp_path.iterdir())


def test_a_swept_name_that_leads_out_is_refused(typed, tmp_path):  # noqa: F811
    code, printed = typed("-m", *SMALL, "study.name=fine,../x")
    assert code == 1
    assert "'../x' must be a plain folder name" in printed
    assert not any(tmp_path.iterdir())


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LINKS = ("default", "default/{cell}", "default/.locks", "default/{cell}/cell.log", "default/tables", ".tokens")


@pytest.fixture(scope="module")
def cell_name(tmp_path_factory) -> str:
    """That of the folder of a small cell."""
    return prepared(tmp_path_factory.mktemp("named"), *SMALL, "reference=off").folder.name


@pytest.mark.parametrize("link", LINKS)
def test_a_link_that_leads_out_of_the_folder_is_refused(typed, tmp_path, cell_name, link):  # noqa: F811
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    (outside / "kept" / "file").write_text("as it was")
    place = runs / link.format(cell=cell_name)
    place.parent.mkdir(parents=True)
    place.symlink_to(outside / "kept" / "file" if link.endswith(".log") else outside / "kept")
    code, printed = typed(*SMALL, "reference=off")
    assert code == 1
    assert f"leads out of {Path('runs')}" in printed
    assert "Traceback" not in printed
    assert content_of(outside) == {"kept/file": b"as it was"}


def test_a_folder_of_runs_may_be_a_link_and_an_evaluation_follows_none(finished, typed, tmp_path):  # noqa: F811
    shutil.copytree(finished, tmp_path / "disk" / "run")
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "outside").mkdir()
    assert typed(f"run={tmp_path / 'runs' / 'run'}", "progress=false", *WINOGRANDE, name="evaluate")[0] == 0
    shutil.rmtree(tmp_path / "disk" / "run" / "evaluations")
    (tmp_path / "disk" / "run" / "evaluations").symlink_to(tmp_path / "outside")
    code, printed = typed(f"run={tmp_path / 'runs' / 'run'}", *WINOGRANDE, name="evaluate")
    assert (code, "leads out of" in printed) == (1, True)
    assert not any((tmp_path / "outside").iterdir())


# -- processes


def test_a_sweep_inside_a_rank_names_the_right_command(typed, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, printed = typed("-m", *SMALL, "seed=0,1")
    assert code == 1
    assert "torchrun --nproc-per-node 2 train.py" in printed
    assert "hydra/launcher=slurm" in printed
    assert not any(tmp_path.iterdir())


def test_one_task_of_a_job_may_sweep():
    assert admission.rank_faults({"WORLD_SIZE": "1", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, ["t", "-m"]) == []
    assert admission.rank_faults({"SLURM_NTASKS": "4"}, ["t", "-m"]) == []  # in a batch script, before srun
    assert admission.rank_faults({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, ["t", "-m"]) != []


# -- pickles


class Mine:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def payloads(mark: Path) -> dict[str, bytes]:
    zipped, old = io.BytesIO(), io.BytesIO()
    torch.save({"w": Mine(mark)}, zipped)
    torch.save({"w": Mine(mark)}, old, _use_new_zipfile_serialization=False)
    return {
        "pickle": pickle.dumps(Mine(mark), protocol=2),
        "torch": zipped.getvalue(),
        "torch before 1.6": old.getvalue(),
    }


@pytest.fixture(params=["pickle", "torch", "torch before 1.6"])
def payload(request, tmp_path):
    """Bytes that leave `touched` when they are unpickled; none of the tests may leave it."""
    mark = tmp_path / "touched"
    content = payloads(mark)[request.param]
    yield content
    assert not mark.exists()


def test_the_payloads_are_live(tmp_path):
    mark = tmp_path / "touched"
    pickle.loads(payloads(mark)["pickle"])
    assert mark.exists()


def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in SHIPPED.glob("*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_as_model_is_refused_unread(payload, tmp_path, name):
    folder = model_folder(tmp_path)
    (folder / name).write_bytes(payload)
    with pytest.raises(InputError, match=r"cannot be loaded|damaged"):
        backbone.load(ModelConfig(name="hf", path=str(folder)))


def test_a_pickle_beside_safetensors_is_not_touched(payload, tmp_path):
    folder = model_folder(tmp_path)
    shutil.copy(SHIPPED / "model.safetensors", folder)
    for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(payload)
    assert backbone.load(ModelConfig(name="hf", path=str(folder))).hash


def test_an_adapter_in_a_model_folder_is_refused(payload, tmp_path):
    folder = model_folder(tmp_path)
    shutil.copy(SHIPPED / "model.safetensors", folder)
    (folder / "adapter_model.bin").write_bytes(payload)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        backbone.load(ModelConfig(name="hf", path=str(folder)))


def test_a_pickle_as_checkpoint_of_state_spaces_is_refused_unread(payload, tmp_path):
    folder = model_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps({"d_model": 96, "n_layer": 2, "vocab_size": 1024, "ssm_cfg": {}}))
    (folder / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        backbone.load(ModelConfig(name="hf", path=str(folder)))


@pytest.mark.parametrize("kind", [data.Alpaca, data.Sharegpt, data.TextFile])
def test_a_pickle_as_data_set_is_refused_unread(payload, tmp_path, kind):
    (tmp_path / "rows.pkl").write_bytes(payload)
    with pytest.raises(InputError):
        kind(name="x", path=str(tmp_path / "rows.pkl")).fingerprint()


@pytest.mark.parametrize("kind", [tasks.Winogrande, tasks.Hellaswag, tasks.Piqa, tasks.Arc])
def test_a_pickle_as_task_is_refused_unread(payload, tmp_path, kind):
    (tmp_path / "rows.jsonl").write_bytes(payload)
    with pytest.raises(InputError):
        kind("x", str(tmp_path / "rows.jsonl"), [0]).queries(0)


def test_a_pickle_as_checkpoint_of_a_training_is_passed_over_unread(payload, tmp_path, caplog):
    one = prepared(tmp_path / "runs", *SMALL, "reference=off")
    files = CheckpointFiles(one.folder, one.id)
    one.folder.mkdir(parents=True)
    for path in (files.newest, files.before):
        path.write_bytes(payload)
    record = cell.ensure(one)
    assert (record["status"], record["resumed"]["at_steps"]) == ("ok", [])
    assert caplog.text.count("cannot be read") == 2


def test_a_pickle_as_adapter_of_a_run_is_refused_unread(payload, tmp_path):
    base = backbone.load(ModelConfig(name="mamba_tiny"))
    peft = Lora(name="lora", targets=["in_proj"], min_coverage=1.0, memory_buffer="tied")
    peft.attach(base, recurrence.install(base.model, "torch"))
    peft.save(tmp_path)
    peft.load(tmp_path)
    (tmp_path / ADAPTER_FOLDER / TENSORS).write_bytes(payload)
    with pytest.raises(InputError, match="Only safetensors are read"):
        peft.load(tmp_path)


def test_code_that_comes_with_a_model_runs_only_by_its_own_key_and_is_recorded(tmp_path):
    folder = model_folder(tmp_path)
    shutil.copy(SHIPPED / "model.safetensors", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w').close()\n")
    with pytest.raises(InputError, match="trust_remote_code=true"):
        backbone.load(ModelConfig(name="hf", path=str(folder)))
    assert not (tmp_path / "touched").exists()
    from tests.test_config import FINGERPRINTS, composed

    science = config.science(composed("model=hf", "model.trust_remote_code=true"), FINGERPRINTS, {})
    assert science["model"]["trust_remote_code"] is True


# -- records from elsewhere


TARGETS = {
    "a function": ("peft", {"_target_": "os.system", "command": "touch touched"}),
    "a class": ("task", {"_target_": "subprocess.Popen", "args": ["touch", "touched"]}),
    "an argument": ("peft", {"targets": {"_target_": "os.system", "command": "touch touched"}}),
    "an interpolation": ("model", {"name": "${oc.env:HOME}"}),
    "a model's code": ("model", {"trust_remote_code": True}),
}


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("name", ["evaluate", "merge", "experiment"])
def test_a_record_from_elsewhere_runs_no_code(finished, typed, tmp_path, case, name):  # noqa: F811
    run, (group, values) = tmp_path / "run", TARGETS[case]
    shutil.copytree(finished, run)
    record = json.loads((run / records.RECORD).read_text())
    record["config"][group] |= values
    (run / records.RECORD).write_text(json.dumps(record))
    if name == "merge":
        with pytest.raises(InputError, match=r"nothing was run|Read that code"):
            peft_command.merge(run, tmp_path / "merged")
    else:
        wanted = ["experiment=growth", f"experiment.models=[{run}]"] if name == "experiment" else [f"run={run}"]
        code, printed = typed(*wanted, "progress=false", name="evaluate")
        assert code == 1
        assert "nothing was run" in printed or "Read that code" in printed
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "runs"}
    assert not (run / "evaluations").exists()


def test_a_class_of_a_record_is_refused_before_its_module_is_imported(finished, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('this was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    record = records.load(finished)
    record["config"]["peft"]["_target_"] = "evil.X"
    with pytest.raises(InputError, match=r"names 'evil.X'.*|nothing was run"):
        evaluation.rebuild_config(record)
    assert "evil" not in sys.modules


def test_code_of_a_model_is_allowed_by_the_command_not_by_the_record(finished):
    record = records.load(finished)
    record["config"]["model"]["trust_remote_code"] = True
    with pytest.raises(InputError, match=r"evaluate\.py trust_remote_code=true"):
        evaluation.rebuild_config(record)
    assert evaluation.rebuild_config(record, trust_remote_code=True).model.trust_remote_code is True


# -- markup


class Page(html.parser.HTMLParser):
    """Elements and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts, self.handlers, self.images, self.texts = 0, [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.images += tag == "img"
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, text):
        self.texts.append(text)


def test_markup_in_data_is_shown_in_the_report_and_not_run(typed, tmp_path):  # noqa: F811
    """A subject of MMLU is a file's name, and its words reach the tables and figures of the report."""
    mark = '<img src=x onerror="alert(1)"><script>alert(2)<'
    questions = ROOT / "tests" / "fixtures" / "mmlu"
    for subject in ("plain", mark):
        for part in ("dev", "test"):
            folder = tmp_path / ("marked" if subject == mark else "clean") / part
            folder.mkdir(parents=True)
            rows = (questions / part / f"astronomy_{part}.csv").read_text()
            (folder / f"{subject}_{part}.csv").write_text(rows.replace("A", "<script>alert(3)</script>", 1))
    pages = []
    for name in ("clean", "marked"):
        done = typed(
            *SMALL, "reference=off", "task=mmlu", f"task.path={name}", f"study.name={name}", "data.max_length=64"
        )
        assert done[0] == 0, done[1]
        study = Path("runs") / name
        ((folder, record),) = records.load_study(study)
        record["status"], record["error"] = "failed", {"type": "InputError", "message": f"row 3 is {mark}"}
        records.save_json(folder / "other" / records.RECORD, record)
        shutil.copytree(folder / "other", study / "other")
        pages.append(Page(report.write(study).read_text()))
    clean, marked = pages
    assert (marked.scripts, marked.images, marked.handlers) == (clean.scripts, clean.images, clean.handlers)
    assert any(mark in text for text in marked.texts)


MARK = '"\'><img src=x onerror="alert(1)"><script>alert(2)</script>'
KEPT = ("status", "metric", "counterpart", "method", "kind")  # words that a report compares with its own


def marked(value, key: str = ""):
    """A JSON tree whose texts, and names of kernels, all end in markup."""
    if isinstance(value, dict):
        suffix = MARK if key in ("kernels", "kernel_fallbacks") else ""
        return {name + suffix: marked(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [marked(entry, key) for entry in value]
    return value + MARK if isinstance(value, str) and key not in KEPT else value


def test_markup_in_any_text_of_a_study_is_shown_and_not_run(finished, typed, tmp_path):  # noqa: F811
    """Every text of records, plans, tables and experiments; that of a failed cell too."""
    study = tmp_path / "study"
    shutil.copytree(finished, study / "cell")
    shutil.copytree(finished, study / "failed")
    record = json.loads((study / "failed" / records.RECORD).read_text())
    record |= {"id": "f" * 12, "status": "failed", "error": {"type": "InputError", "message": "row 3"}}
    (study / "failed" / records.RECORD).write_text(json.dumps(record))
    assert typed("experiment=stall", "experiment.tokens=500", f"run={study}", "progress=false", name="evaluate")[0] == 0
    clean = [Page(path.read_text()) for path in (report.write(study), *study.rglob("stall-*.html"))]
    for path in study.rglob("*.json"):
        if path.parent.name != "adapter":
            path.write_text(json.dumps(marked(json.loads(path.read_text()))))
    for path in study.rglob("*.parquet"):
        table = pd.read_parquet(path)
        for name in table.select_dtypes(["object", "string"]).columns.difference(KEPT):
            table[name] = [value + MARK if isinstance(value, str) else value for value in table[name]]
        table.to_parquet(path, index=False)
    experiment = next(study.rglob("stall-*.json"))
    content = json.loads(experiment.read_text()) | {"name": "stall"}
    experiment.write_text(json.dumps(content))
    shown = experiments_page.write(content, experiment.with_suffix(".html"))
    for before, path in zip(clean, (report.write(study), shown), strict=True):
        page = Page(path.read_text())
        assert (page.scripts, page.images, page.handlers) == (before.scripts, before.images, before.handlers), path
        assert any(MARK in text for text in page.texts), path
