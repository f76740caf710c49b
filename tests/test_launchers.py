"""The same study whoever runs its cells: launchers are presets, and records do not know them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lyapft import config, records
from tests.test_cli import ROOT, SMALL

CONF = ROOT / "conf"
submitit = pytest.importorskip("submitit", reason="pip install -e '.[cluster]'")


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "hydra" / "launcher").glob("*.yaml")))
def test_every_preset_composes(name):
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"hydra/launcher={name}"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.startswith("hydra_plugins.")


def sweep(folder: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, "reference=off", f"runs={folder}", *arguments]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [record for _, record in records.load_study(folder / "default")]


def test_a_local_launcher_makes_the_records_that_the_basic_one_makes(tmp_path):
    swept = "peft=lora,ia3"
    here = sweep(tmp_path / "basic", swept)
    there = sweep(tmp_path / "local", swept, "hydra/launcher=local")
    for one, other in zip(here, there, strict=True):
        assert {one["status"], other["status"]} == {"ok"}
        for part in ("id", "name", "config", "choices", "scores"):
            assert json.dumps(one[part]) == json.dumps(other[part]), part
        assert one["training"]["loss_last"] == other["training"]["loss_last"]
