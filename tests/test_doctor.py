"""The doctor says what is there, which path runs, and what to do about it."""

import json
import subprocess
import sys

import pytest
import torch

from lyapft import doctor, recurrence, scan


def test_the_page_names_every_package_and_path(root):
    done = subprocess.run(
        [sys.executable, "-m", "lyapft.doctor"], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for word in (
        *doctor.NEEDED,
        *doctor.KERNELS,
        *doctor.MODELS,
        torch.__version__.split("+")[0],
        "mamba2",
        "bfloat16",
    ):
        assert word in done.stdout
    assert "Traceback" not in done.stderr


def test_it_is_also_an_object():
    found = json.loads(json.dumps(doctor.asdict(doctor.examine())))
    assert found["versions"]["torch"] is not None
    assert found["paths"]["cpu"]["selective_scan"][0] == ("torch" if scan.available()["cpu"] else "cpu")


def test_every_family_has_a_path_and_a_reason_where_it_is_not_the_preferred_one(monkeypatch):
    monkeypatch.setattr(recurrence.mamba_ssm, "missing", lambda operation, device: f"no {operation} on {device}")
    assert recurrence.describe("cuda")["ssd"] == ("torch", "no ssd on cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made-up GPU")
    found = doctor.examine()
    assert set(found.paths["cuda"]) == set(doctor.MODELS)
    assert any("ssd on cuda runs plain torch: no ssd on cuda" in line for line in found.advice)
    assert "made-up GPU" in doctor.text(found)


@pytest.mark.parametrize("absent", ["peft", "torch"])
def test_a_missing_package_is_a_failed_health_check(monkeypatch, absent, capsys):
    whole = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == absent else whole(name))
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 1
    assert f"pip install {absent}" in capsys.readouterr().out
