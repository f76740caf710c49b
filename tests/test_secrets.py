"""No credential is in what is written, printed or shown by `ps`; settings that look like one are refused."""

import base64
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import logging
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import peft
import psutil
import pytest
import transformers
import wandb
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lyapft import (
    cell,
    config,
    records,
    secrets,
)
from lyapft.errors import InputError
from lyapft.plan.__main__ import main as plan
from tests import commands
from tests.test_cli import ROOT, SMALL, typed  # noqa: F401 - a fixture

CANARY = "canary0f81c6d2e7b94a5a9d3c"
SHIPPED = ROOT / "lyapft" / "checkpoints" / "mamba_tiny"


def command(*arguments: str, name: str = "train") -> list[str]:
    return [sys.executable, str(ROOT / f"{name}.py"), *SMALL, *arguments]


def secretive(folder: Path) -> dict[str, str]:
    """An environment with credentials, where W&B keeps all of its files in this folder, which is a checkout whose
    remote has a token in its address."""
    remote = f"https://me:{CANARY}@host/lyapft.git"
    (folder / ".git" / "objects").mkdir(parents=True, exist_ok=True)
    (folder / ".git" / "refs").mkdir(exist_ok=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / ".git" / "config").write_text(f'[remote "origin"]\n\turl = {remote}\n')
    found = os.environ | {"WANDB_API_KEY": CANARY * 2, "HF_TOKEN": f"hf_{CANARY}", "WANDB_MODE": "offline"}
    found |= {"HTTPS_PROXY": f"http://me:{CANARY}@127.0.0.1:9", "NO_PROXY": "localhost,127.0.0.1"}
    found |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "remote.origin.url", "GIT_CONFIG_VALUE_0": remote}
    found |= {key: str(folder / "caches") for key in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    found.pop("WANDB_SERVICE", None)  # of this process: a command's files must be whole when the command ends
    return found


def forms(text: str) -> list[bytes]:
    """How bytes may hold it: as text, or inside of a longer text that is in base 64 (a header of HTTP)."""
    coded = [base64.b64encode(bytes(before) + text.encode())[4 * (before > 0) : -4] for before in range(3)]
    return [text.encode(), text.encode("utf-16-le"), *coded]


def leaks(folder: Path) -> list[str]:
    """Every file below that has a credential in it, or in its name; but for the checkout's own."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts):
        content = path.read_bytes()
        if path.suffix == ".parquet":  # its columns are compressed
            content += pd.read_parquet(path).to_json().encode()
        if CANARY in path.name or any(form in content for form in forms(CANARY)):
            found.append(str(path))
    return found


def test_a_credential_that_was_put_there_is_found(tmp_path):
    (tmp_path / "clean").write_bytes(os.urandom(10_000))
    assert leaks(tmp_path) == []
    header = base64.b64encode(f"api:{CANARY}:".encode())
    contents = {"text": CANARY.encode(), "pickle": pickle.dumps({"a": [CANARY]}), "header": b"Basic " + header}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(b"\0" + content)
    (tmp_path / CANARY).touch()
    pd.DataFrame({"a": [CANARY] * 100}).to_parquet(tmp_path / "a.parquet", compression="zstd")
    assert len(leaks(tmp_path)) == len(contents) + 2


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
    "a variable for Hydra": "hydra.job.env_copy=[OTHER_TOKEN]",
    "a variable in a name": "study.name=${oc.env:OTHER_TOKEN}",
    "a variable under another name": "study.name=${oc.env:OTHER}",
    "a name of a folder": "study.name=sk-" + CANARY,
    "a password with @": f"data.path=https://me:{CANARY[:4]}@{CANARY}@host/data.json",
    "a field that is none": "model.hub_token=" + CANARY,
    "no override": "{hub_token: " + CANARY + "}",
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
        {"rules": {"forward_pass": {"metric": "margin", "below": 1e-5}}}, {"rules": "{forward_pass: {below: 1}}"},
        {"env_set": {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "true"}}, {"setup": ["export SSH_KEY_TYPE=ed25519"]},
    ],
)  # fmt: skip
def test_an_ordinary_setting_is_none(settings):
    assert secrets.faults(settings) == []


@pytest.mark.parametrize(
    "value", ["true", "False", "NONE", "null", "yes", "no", "on", "Off", "'true'", "true,false", ""]
)
def test_a_text_that_switches_is_no_credential(value):
    assert secrets.faults({"x": {"use_auth": value}}, [f"x.use_auth={value}", f"+x={{use_auth: {value}}}"]) == []
    kept = {"use_auth": value, "overrides": [f"x.use_auth={value}"]}
    assert secrets.without(kept) == kept
    assert len(secrets.faults({}, [f"x.use_auth={value}x"])) == 1


@pytest.mark.parametrize(
    "value",
    [
        "8",
        "8,16",
        "[8,16]",
        "range(8,16)",
        "range(16,8,-4)",
        "range(1,9,step=2)",
        "choice(8,16)",
        "shuffle(range(8,16))",
    ],
)
def test_numbers_of_tokens_may_be_swept_and_passwords_may_not(value):
    sweep = f"hydra.sweeper.params={{experiment.token: {value}}}"
    assert secrets.faults({}, [f"experiment.token={value}", sweep]) == []
    assert len(secrets.faults({}, [f"x.password={value}", f"experiment.token={value[:-1]},{CANARY}"])) == 2


NAMES = (
    "secrets", "passwords", "api_keys", "apikeys", "pass", "db_pass", "auth", "cookie", "secret_value", "hub_token_2",
    "encryption_key", "service_key", "HF_TOKEN_READ", "token", "access_tokens", "passphrase", "db_pwd", "userPassword",
    "user_pass", "dbpass", "MYSQL_PASS", "SMTP_PASS",
)  # fmt: skip
ORDINARY = (
    "max_tokens", "batch_tokens", "n_tokens", "pad_token_id", "tokenizer", "author", "authors", "pass_k", "passes",
    "pass_rate", "key", "keys", "monkey", "keyboard", "hub", "cache_key", "sort_keys", "HF_TOKEN_PATH", "compass",
    "forward_pass", "second_pass", "AUTH_METHOD", "OS_AUTH_TYPE", "SSH_KEY_TYPE", "SECRETS_MOUNT", "auth_mode",
    "credential_helper", "secret_name", "OAUTH_URL", "auth_uri", "password_directory", "auth_host", "AUTH_USER",
    "PWD", "OLDPWD",
)  # fmt: skip
STYLES = (
    lambda words: "_".join(words), lambda words: "-".join(words), lambda words: "_".join(words).upper(),
    lambda words: "".join(word.capitalize() for word in words), lambda words: ".".join(words).title(),
)  # fmt: skip


@given(
    words=st.lists(st.sampled_from(["my", "model", "run", "remote"]), max_size=2),
    name=st.sampled_from([name for name in NAMES if name.islower() and name != "pass"]),  # that one stands alone
    number=st.sampled_from([[], ["2"], ["0", "1"]]),
    style=st.sampled_from(STYLES),
)
def test_a_credential_is_known_by_its_name_however_it_is_written(words, name, number, style):
    assert secrets.is_named(style([*words, *name.split("_"), *number]))


@given(name=st.sampled_from([name for name in ORDINARY if name.islower()]), style=st.sampled_from(STYLES))
def test_an_ordinary_name_is_one_however_it_is_written(name, style):
    assert not secrets.is_named(style(name.split("_")))


@pytest.mark.parametrize("name", NAMES)
def test_a_field_or_variable_of_such_a_name_is_refused_and_hidden(monkeypatch, name):
    assert len(secrets.faults({"model": {name: "abc"}})) == 1
    assert len(secrets.faults({}, [f"+model.{name}=abc"])) == 1
    assert secrets.without({name: "abc"}) == {name: secrets.HIDDEN}
    monkeypatch.setenv(name, CANARY)
    assert secrets.hidden(f"said {CANARY}") == f"said {secrets.HIDDEN}"


@pytest.mark.parametrize("name", ORDINARY)
def test_a_field_of_an_ordinary_name_is_kept(name):
    assert secrets.faults({"model": {name: "abc"}}, [f"+model.{name}=abc"]) == []
    assert secrets.without({name: "abc"}) == {name: "abc"}


def names_in(node: Any) -> set[str]:
    """Every key of nested mappings."""
    if isinstance(node, list):
        return set().union(*map(names_in, node))
    return set(node) | set().union(*map(names_in, node.values())) if isinstance(node, dict) else set()


def fields_of(module: Any) -> set[str]:
    """Those of every dataclass of a module."""
    found = [value for value in vars(module).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
    return {field.name for one in found for field in dataclasses.fields(one)}


def test_no_setting_of_ours_or_of_a_library_has_the_name_of_a_credential_but_those_that_are():
    """Else it could not be set. `experiment.token` is a number."""
    ours = {path: names_in(yaml.safe_load(path.read_text())) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name for names in ours.values() for name in names if secrets.is_named(name)} == {"token"}
    assert not any(secrets.is_named(name) for name in fields_of(config))
    launchers = [
        importlib.import_module(f"hydra_plugins.{name}.config")
        for name in ("hydra_joblib_launcher", "hydra_submitit_launcher")
        if importlib.util.find_spec(f"hydra_plugins.{name}")  # an extra
    ]
    passed = {name for module in (peft, *launchers) for name in fields_of(module)}
    for call in (wandb.init, lightning.Trainer, transformers.AutoConfig.for_model):
        passed |= set(inspect.signature(call).parameters)
    assert len(passed) > 100
    assert not any(secrets.is_named(name) for name in passed)
    credentials = {"api_key", "azure_account_url_to_access_key"}
    assert {name for name in wandb.Settings.model_fields if secrets.is_named(name)} == credentials


def test_a_message_that_cannot_be_formatted_is_hidden_too(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    record = logging.LogRecord("lib", logging.INFO, "lib.py", 1, f"%d of {CANARY}", (CANARY,), None)
    said = secrets.Formatter("%(message)s").format(record)
    assert CANARY not in said
    assert secrets.HIDDEN in said
    assert "lib.py" in said


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_settings_that_look_like_credentials_are_refused_and_not_repeated(
    typed,  # noqa: F811
    tmp_path,
    monkeypatch,
    case,
    sweep,
):
    monkeypatch.setenv("OTHER_TOKEN", f"other{CANARY}")
    monkeypatch.setenv("OTHER", f"hf_{CANARY}")
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


def test_the_variable_whose_value_a_field_holds_is_named_and_its_value_is_not(monkeypatch):
    monkeypatch.setenv("VAULT_SECRET", "/workspace")
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{CANARY}@proxy:3128")
    held, proxy = secrets.faults({"runs": "/workspace/runs"}, [f"x={CANARY}"])
    assert "runs looks like a credential" in held
    assert "it holds the value of VAULT_SECRET" in held
    assert "/workspace" not in held
    assert "it holds the value of HTTPS_PROXY" in proxy
    assert CANARY not in proxy


@pytest.mark.parametrize("name", ["AUTH_METHOD", "OS_AUTH_TYPE", "SSH_KEY_TYPE", "SECRETS_MOUNT"])
def test_what_a_variable_says_of_how_a_credential_is_kept_stays_in_the_log(monkeypatch, name):
    monkeypatch.setenv(name, "/workspace")
    assert secrets.hidden("saved in /workspace/runs") == "saved in /workspace/runs"


def test_a_plan_of_what_looks_like_a_credential_is_refused(capsys):
    assert plan([f"model.hub_token={CANARY}"]) == 2
    printed = capsys.readouterr()
    assert "model.hub_token looks like a credential" in printed.err
    assert CANARY not in printed.out + printed.err


def test_a_name_in_an_address_is_no_credential_but_a_token_is(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "ssh://christina@build")
    monkeypatch.setenv("MIRROR", f"https://{CANARY}@mirror/x")
    assert secrets.faults({"runs": "/data/christina/runs"}) == []
    assert len(secrets.faults({"runs": f"/data/{CANARY}/runs"})) == 1


def test_what_a_library_says_of_the_environment_is_hidden(typed, tmp_path, monkeypatch):  # noqa: F811
    """The addresses of a proxy and a mirror may hold a password, and exceptions of the network quote them."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{CANARY}@proxy:3128")

    def execute(*_):
        raise RuntimeError(f"no way to https://me:p@{CANARY}@mirror/x by me:{CANARY} with hf_{CANARY}")

    monkeypatch.setattr(cell, "execute", execute)
    code, printed = typed(*SMALL, "reference=off")
    assert code == 1
    assert "no way to https://(hidden)@mirror/x by (hidden) with hf_(hidden)" in printed
    ((folder, record),) = records.load_study(Path("runs/default"))
    assert record["error"]["message"] == "no way to https://(hidden)@mirror/x by (hidden) with hf_(hidden)"
    assert "Traceback" in (folder / records.LOG).read_text()
    assert (CANARY in printed, leaks(tmp_path)) == (False, [])
    with pytest.raises(InputError, match=r"https://\(hidden\)@mirror: 404"):
        raise InputError(f"https://me:{CANARY}@mirror: 404")


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf" / "model").glob("*.yaml")))
def test_no_shipped_setting_looks_like_a_credential(name):
    from tests.test_config import composed

    assert secrets.faults(OmegaConf.to_container(composed(f"model={name}"))) == []
