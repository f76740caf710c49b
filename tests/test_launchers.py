"""The same study whoever runs its cells: launchers are presets, and records do not know them."""

import importlib.util
import json
import stat
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lyapft import admission, config, records
from tests import commands
from tests.test_cli import ROOT, SMALL, typed  # noqa: F401 - a fixture
from tests.test_secrets import leaks, secretive

CONF = ROOT / "conf"
PRESETS = sorted(p.stem for p in (CONF / "hydra" / "launcher").glob("*.yaml"))
has_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="submitit is not installed: pip install -e '.[cluster]'"
)


def composed(name: str):
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"hydra/launcher={name}"], return_hydra_config=True)


@pytest.mark.parametrize("name", [*PRESETS, "basic", "joblib"])
def test_every_launcher_composes_whether_its_package_is_installed_or_not(name):
    assert str(composed(name).hydra.launcher._target_).startswith("hydra")


def test_presets_have_resources_and_a_way_back_into_the_queue():
    assert {"submitit_slurm", "submitit_local", "ray"} == set(PRESETS)
    slurm = composed("submitit_slurm").hydra.launcher
    assert slurm.additional_parameters.requeue is True
    assert min(slurm.cpus_per_task, slurm.mem_gb, slurm.timeout_min, slurm.signal_delay_s, slurm.max_num_timeout) > 0


@has_submitit
@pytest.mark.parametrize(
    ("name", "schema"), [("submitit_slurm", "SlurmQueueConf"), ("submitit_local", "LocalQueueConf")]
)
def test_a_preset_names_every_setting_of_its_package(name, schema):
    node = getattr(import_module("hydra_plugins.hydra_submitit_launcher.config"), schema)
    preset = OmegaConf.to_container(composed(name).hydra.launcher, resolve=False)
    assert preset.keys() == {field.name for field in fields(node)}
    assert preset["_target_"] == node()._target_
    OmegaConf.merge(OmegaConf.structured(node), preset)  # of the right types


def test_a_launcher_that_is_not_installed_is_named_with_what_to_do(typed, monkeypatch, tmp_path):  # noqa: F811
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "launcher" in name else known(name, *rest)
    )
    for name, extra in {"submitit_slurm": "cluster", "submitit_local": "cluster", "ray": "ray"}.items():
        assert extra in admission.EXTRAS.values()
        code, printed = typed("-m", *SMALL, "seed=0,1", f"hydra/launcher={name}")
        assert code == 1
        assert f"hydra/launcher={name} needs hydra_plugins." in printed
        assert f"pip install -e '.[{extra}]'" in printed
        assert not any(tmp_path.iterdir())


SWEEP = ("-m", *SMALL, "reference=off", "peft=lora,ia3", "runs=runs")


def recorded(folder: Path) -> list[dict]:
    return [record for _, record in records.load_study(folder / "runs" / "default")]


@has_submitit
def test_a_local_launcher_makes_the_records_that_the_basic_one_makes(tmp_path):
    """And leaves no credential in the pickles of its jobs, which nobody else may read or exchange."""
    basic, local = tmp_path / "basic", tmp_path / "local"
    basic.mkdir()
    local.mkdir()
    done = commands.run("train.py", *SWEEP, folder=basic)
    assert done.returncode == 0, done
    everyones = {"umask": 0, "env": secretive(local) | {"PYTHONPATH": str(ROOT)}}  # its jobs import this checkout
    command = [sys.executable, str(ROOT / "train.py"), *SWEEP, "hydra/launcher=submitit_local"]
    done = subprocess.run(command, cwd=local, capture_output=True, text=True, timeout=300, **everyones)
    assert done.returncode == 0, done
    here, there = recorded(basic), recorded(local)
    for one, other in zip(here, there, strict=True):
        assert {one["status"], other["status"]} == {"ok"}
        for part in ("id", "name", "config", "choices", "scores"):
            assert json.dumps(one[part]) == json.dumps(other[part]), part
        assert one["training"]["loss_last"] == other["training"]["loss_last"]
    jobs = local / "runs" / "default" / ".submitit"
    assert len(list(jobs.rglob("*_submitted.pkl"))) == len(list(jobs.rglob("*_result.pkl"))) == 2
    assert leaks(tmp_path) == []
    assert stat.S_IMODE(jobs.stat().st_mode) == 0o700
