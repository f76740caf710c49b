"""Nobody let in: names that lead elsewhere, sweeps in ranks, code in models and records, markup in data."""

import contextlib
import html.parser
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lyapft import admission, backbone, cell, config, containment, evaluation, records, report
from lyapft.config import ModelConfig
from lyapft.errors import InputError
from lyapft.peft import __main__ as peft_command
from lyapft.report.experiments import page as experiments_page
from tests.test_cell import prepared
from tests.test_cli import ROOT, SMALL, typed  # noqa: F401 - a fixture
from tests.test_pickles import SHIPPED, model_folder, payload  # noqa: F401 - a fixture
from tests.test_secrets import WINOGRANDE

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


LOG = "+hydra.job_logging={root: {handlers: [file]}, handlers: {file: {class: logging.FileHandler, %s}}}"
OF_HYDRA = {
    "a run": "hydra.run.dir={outside}",
    "a sweep": "hydra.sweep.dir={outside}",
    "a job": "hydra.sweep.subdir=../../outside",
    "settings": "hydra.output_subdir=../../outside",
    "settings of any path": "hydra.output_subdir={outside}",
    "jobs of submitit": "+hydra.launcher.submitit_folder={outside}/%j",
    "a log": LOG % "filename: {outside}",
    "a log's other name": LOG % "filename: runs/a.log, delay: true, .: {baseFilename: {outside}}",
    "a log in the present folder": LOG % "filename: outside",
    "a job's name": LOG % "filename: '${hydra.runtime.output_dir}/../${hydra.job.name}'",
}


@pytest.mark.parametrize("case", OF_HYDRA)
@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_a_folder_of_hydra_is_one_of_the_runs(typed, tmp_path, case, sweep):  # noqa: F811
    override = OF_HYDRA[case].replace("{outside}", str(tmp_path / "outside"))
    code, printed = typed(*sweep, *SMALL, override, "hydra.job.name=../x")
    assert code == 1
    assert f"leads out of {Path('runs')}" in printed
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["hydra.run.dir", "hydra.sweep.subdir", "hydra.output_subdir", "study.name"])
def test_a_folder_of_hydra_depends_on_nothing_that_a_job_may_change(typed, tmp_path, case):  # noqa: F811
    code, printed = typed("-m", *SMALL, "device=../../outside,../../other", f"{case}=${{device}}")
    assert code == 1
    assert f"{case} may not depend on device" in printed
    assert not any(tmp_path.iterdir())


def sweep_of(*words: str) -> DictConfig:
    """The settings of `python train.py -m …` as a callback gets them."""
    config.register()
    with initialize_config_dir(version_base=None, config_dir=str(config.CONF_DIR)):
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("train", list(words), RunMode.MULTIRUN)
    cfg.hydra.mode = RunMode.MULTIRUN
    return cfg


FILE = "hydra.job_logging.handlers.file.filename=${hydra:runtime.output_dir}/"
COMMON = {
    "a variable": ["runs=${oc.env:SCRATCH}", "hydra.sweep.dir=${oc.env:SCRATCH}/s"],
    "its default": ["hydra.sweep.subdir=${oc.env:NO_SUCH,plain}"],
    "the user in a log": ["hydra/job_logging=default", FILE + "${oc.env:SCRATCHER}.log"],
    "the time": ["hydra.sweep.subdir=${now:%Y-%m-%d}/${now:%H-%M-%S}"],
    "a choice": ["hydra.sweep.subdir=${hydra.runtime.choices.model}", "model=mamba_tiny,mamba2_tiny"],
    "a choice by the resolver": ["hydra.sweep.subdir=${hydra:runtime.choices.model}"],
    "the present folder": ["runs=${hydra:runtime.cwd}/runs", "hydra.sweep.dir=${ hydra:runtime.cwd }/runs/s"],
    "overrides": ["hydra.sweep.subdir=${hydra.job.override_dirname}", "data.path=../x.json", "seed=0,1"],
    "overrides below": ["hydra.sweep.subdir=${hydra:job.override_dirname}", "data.path=/data/a/x.json,b", "seed=0,1"],
    "a part of them": [
        "hydra.sweep.subdir=${hydra.job.override_dirname}",
        "hydra.job.config.override_dirname.exclude_keys=[data.path]",
        "data.path=../../../x.json",
    ],
    "jobs of submitit": [
        "+hydra.launcher.submitit_folder=${oc.env:SCRATCH}/jobs/${now:%H}/%j",
        "runs=${oc.env:SCRATCH}",
    ],
}


@pytest.mark.parametrize("case", COMMON)
def test_what_users_of_hydra_name_their_folders_after_is_allowed_in_a_sweep(monkeypatch, tmp_path, case):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("SCRATCHER", "me")
    assert admission.faults(sweep_of(*COMMON[case])) == []


DIRNAME = "hydra.sweep.subdir=${hydra.job.override_dirname}"
IN_A_JOB = {
    "a variable": (["hydra.sweep.dir=${oc.env:SCRATCH}/s"], "leads out of runs"),
    "a variable inside of runs": (["hydra.sweep.subdir=${oc.env:UP}"], "leads out of runs"),
    "a variable of another's name": (["hydra.sweep.subdir='${oc.env:${device}}'"], "may not depend on oc.env:"),
    "a default that is swept": (["hydra.sweep.subdir='${oc.env:NO_SUCH,${device}}'"], "may not depend on oc.env:"),
    "a variable of a launcher's": (
        ["hydra.sweep.subdir=${oc.env:PLAIN}", "+hydra.launcher.setup=['export PLAIN=../..']"],
        "may not depend on oc.env:PLAIN, which hydra.launcher may set",
    ),
    "a time": (["hydra.sweep.subdir=${now:../../%Y}"], "leads out of runs"),
    "a choice that is none": (
        ["hydra.sweep.subdir=${hydra.runtime.choices.mine}", "+hydra.runtime.choices.mine=${device}"],
        "may not depend on hydra.runtime.choices.mine",
    ),
    "a choice above": (
        ["hydra.sweep.subdir=${hydra.runtime.choices.model}", "model=mamba_tiny,../../model/mamba_tiny"],
        "as model=../../model/mamba_tiny is a path",
    ),
    "an override": ([DIRNAME, "device=a,../../../outside"], "as device=../../../outside would stand in it"),
    "what an override holds": ([DIRNAME, "device=${data.path}"], r"as device=\$\{data.path\} would stand in it"),
    "an override's separator": (
        [DIRNAME, "hydra.job.config.override_dirname.kv_sep=/", "device=../../.."],
        "would stand in it",
    ),
    "a separator that is swept": (
        [DIRNAME, "hydra.job.config.override_dirname.kv_sep=${device}", "device=a,b"],
        "kv_sep and item_sep have to be written out",
    ),
    "a job's name": (["hydra.job.name=${hydra:job.override_dirname}", "device=a,../../.."], "would stand in it"),
}


@pytest.mark.parametrize("case", IN_A_JOB)
def test_nothing_that_it_is_named_after_leads_out_in_a_job(monkeypatch, tmp_path, case):
    monkeypatch.chdir(tmp_path)
    for name, value in {"SCRATCH": str(tmp_path / "scratch"), "UP": "../../outside", "PLAIN": "plain"}.items():
        monkeypatch.setenv(name, value)
    words, said = IN_A_JOB[case]
    found = admission.faults(sweep_of(*words))
    assert re.search(said, "\n".join(found)), found


def test_a_parameter_of_the_sweeper_is_an_override():
    cfg = sweep_of(DIRNAME)
    cfg.hydra.sweeper.params = {"device": "a,../../../outside"}
    (found,) = admission.faults(cfg)
    assert "as device=../../../outside would stand in it" in found


def test_a_secret_of_the_environment_names_no_folder(monkeypatch):
    monkeypatch.setenv("OTHER", "hf_" + 30 * "x")
    (found,) = admission.faults(sweep_of("hydra.sweep.dir=runs/${oc.env:OTHER}"))[:1]
    assert "hydra.sweep.dir looks like a credential" in found
    assert "xxx" not in found


def test_the_folder_of_a_job_is_named_by_its_overrides(typed, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cell, "run", lambda cfg: None)
    words = ("hydra.sweep.dir=${hydra:runtime.cwd}/runs/s", "hydra.output_subdir=hydra", "data=text")
    code, printed = typed("-m", *words, DIRNAME, "data.path=a/b,../c")
    assert "cannot" not in printed, printed
    assert code == 0, printed
    folders = {path.relative_to(tmp_path).parts for path in tmp_path.rglob("hydra")}
    assert len(folders) == 2
    assert all(parts[0] == "runs" for parts in folders)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


OWN_LOG = "hydra_logging: {root: {handlers: [file]}, handlers: {file: {class: logging.FileHandler, filename: %s}}}"


@pytest.mark.parametrize("how", ["typed", "a preset", "another choice", "another root", "a search path"])
def test_hydras_own_log_opens_no_file(typed, tmp_path, how):  # noqa: F811
    """It does so before any callback, so that one would come too late."""
    log, mine = OWN_LOG % (tmp_path / "evil.log"), tmp_path / "mine"
    files = {
        "a preset": ("study/mine.yaml", f"# @package _global_\nhydra: {{{log}}}"),
        "another choice": ("hydra/hydra_logging/mine.yaml", log.partition(":")[2]),
        "another root": ("mine.yaml", f"defaults: [train, _self_]\nhydra: {{{log}}}"),
        "a search path": ("hydra/hydra_logging/mine.yaml", log.partition(":")[2]),
    }
    words = {
        "typed": [f"+hydra={{{log}}}"],
        "a preset": ["--config-dir", str(mine), "study=mine"],
        "another choice": [f"-cd={mine}", "hydra/hydra_logging=mine"],
        "another root": [f"-cd={mine}", "-cn", "mine"],
        "a search path": [f"hydra.searchpath=[file://{mine}]", "hydra/hydra_logging=mine"],
    }
    if how in files:
        name, text = files[how]
        (mine / name).parent.mkdir(parents=True)
        (mine / name).write_text(text)
    code, printed = typed(*words[how], *SMALL)
    assert code == 1
    assert "Hydra's own log would be opened before the folder of the runs is known" in printed
    assert {path.name for path in tmp_path.iterdir()} <= {"mine"}


def test_a_log_of_hydra_below_the_runs_is_allowed():
    """Its own choice of Hydra's."""
    with initialize_config_dir(version_base=None, config_dir=str(config.CONF_DIR)):
        words = ["hydra/job_logging=default", "hydra.output_subdir=hydra", "hydra.sweep.subdir=${hydra.job.num}"]
        cfg = compose("train", overrides=words, return_hydra_config=True)
    assert len(list(containment.log_files(OmegaConf.to_container(cfg.hydra)))) == 1
    assert containment.hydra_faults(cfg) == []


def test_settings_that_cannot_be_checked_are_not_admitted(typed, tmp_path):  # noqa: F811
    code, printed = typed(*SMALL, "hydra.run.dir=${runs}/${study.name}/${hydra.job.num}", "runs=${oc.env:NO_SUCH}")
    assert code == 1
    assert "these settings cannot be checked" in printed
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["hydra.run.dir={outside}"],
        ["hydra.run.dir={outside}", "hydra.output_subdir=sub"],
        ["hydra.output_subdir=sub"],
        ["-m", "hydra.sweep.dir={outside}"],
        ["-m", "hydra.sweep.subdir=${{run}}"],
    ],
)
def test_an_evaluation_makes_no_folder_but_in_its_run(typed, tmp_path, words):  # noqa: F811
    given = [word.format(outside=tmp_path / "outside") for word in words]
    code, printed = typed(*given, "run=none", name="evaluate")
    assert code == 1
    assert "leads out of none" in printed or "may not depend on run" in printed
    assert not any(tmp_path.iterdir())


def test_what_is_unpickled_from_a_folder_is_put_there_by_its_owner_alone(tmp_path):
    """Jobs and results of submitit: whoever could exchange one would run code as the user who started the sweep."""
    folder = tmp_path / "runs" / "jobs"
    before = os.umask(0)
    try:
        containment.own(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    containment.own(folder)


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o701])
def test_a_folder_that_others_may_enter_is_refused_as_it_is(tmp_path, mode):
    folder = tmp_path / "runs"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(InputError, match=r"runs may be entered.*chmod 700 .*runs, or set .*submitit_folder=.*-NAME/%j"):
        containment.own(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == mode


def test_a_folder_that_is_another_users_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match=r"jobs is another user's.*submitit_folder=.*jobs-NAME/%j"):
        containment.own(tmp_path / "jobs")


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
    assert "hydra/launcher=submitit_slurm" in printed
    assert not any(tmp_path.iterdir())


def test_one_task_of_a_job_may_sweep():
    assert admission.rank_faults({"WORLD_SIZE": "1", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, ["t", "-m"]) == []
    assert admission.rank_faults({"SLURM_NTASKS": "4"}, ["t", "-m"]) == []  # in a batch script, before srun
    assert admission.rank_faults({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, ["t", "-m"]) != []


# -- models and records from elsewhere


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


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path):
    folder = model_folder(tmp_path)
    shutil.copy(SHIPPED / "model.safetensors", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w').close()\n")
    with contextlib.suppress(InputError):
        backbone.load(ModelConfig(name="hf", path=str(folder)))
    assert not (tmp_path / "touched").exists()


def test_a_pickle_as_table_of_a_study_is_left_out_unread(payload, finished, tmp_path):  # noqa: F811
    shutil.copytree(finished, tmp_path / "study" / "cell")
    tables = list((tmp_path / "study" / "cell").glob("*.parquet"))
    record = json.loads((tmp_path / "study" / "cell" / "record.json").read_text())
    record["divergence"] = [{"counterpart": "paper", "status": "ok", "mean_abs_points": 1.0, "per_score": []}]
    (tmp_path / "study" / "cell" / "record.json").write_text(json.dumps(record))  # which says nothing of the answers
    for path in tables:
        path.write_bytes(payload)
    found = report.load_study(tmp_path / "study")
    assert sum("cannot be read" in note for note in found.notes) == len(tables) > 1


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
