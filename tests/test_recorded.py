"""Records that someone wrote by hand, or another lyapft: refused by the name of the file and of the key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lyapft import cell, config, evaluation, records
from lyapft.config.recorded import typed as typed_settings
from lyapft.errors import InputError
from lyapft.peft import __main__ as peft_command
from tests.test_cell import prepared
from tests.test_cli import typed  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    one = prepared(tmp_path_factory.mktemp("runs"), "reference=off", "trainer.steps=2")
    assert cell.ensure(one)["status"] == "ok"
    return one.folder


def without(*place: str) -> Callable[[dict], Any]:
    def change(record: dict) -> None:
        for key in place[:-1]:
            record = record[key]
        del record[place[-1]]

    return change


def having(value: Any, *place: str) -> Callable[[dict], Any]:
    def change(record: dict) -> None:
        for key in place[:-1]:
            record = record[key]
        record[place[-1]] = value

    return change


CASES = {  # what is done to the record, and what the error has to name
    "no status": (without("status"), "status is missing"),
    "no id": (without("id"), "id is missing"),
    "no name": (without("name"), "name is missing"),
    "no config": (without("config"), "config.* is missing"),
    "no paths": (without("paths"), "paths is missing"),
    "paths a list": (having([], "paths"), r"paths=\[\] is no dict"),
    "a path a number": (having(3, "paths", "peft"), r"paths.peft=3 is no dict"),
    "no files": (without("files"), "files.weights is missing"),
    "no peft": (without("config", "peft"), "config.peft is missing"),
    "no kernel": (without("config", "kernel"), "config.kernel is missing"),
    "a bogus key": (having({"name": "torch", "bogus": 1}, "config", "kernel"), "kernel.bogus"),
    "no key": (having({}, "config", "kernel"), "kernel.name is missing"),
    "no content": (without("config", "model", "content"), "config.model.content is missing"),
    "content a number": (having(5, "config", "model", "content"), "config.model.content=5 is no str"),
    "no class": (without("config", "peft", "_target_"), "peft._target_ is missing"),
    "half a class": (having(True, "config", "peft", "_partial_"), "peft._partial_"),
    "arguments": (having([1], "config", "peft", "_args_"), "peft._args_"),
    "rank a text": (having("many", "config", "peft", "r"), "peft.r.*many"),
    "rank 0": (having(0, "config", "peft", "r"), "peft.r=0"),
    "a number of shots a text": (having("x", "config", "task", "shots"), "task.shots"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_record_that_no_cell_wrote_is_refused_by_file_and_key(run, tmp_path, typed, case):  # noqa: F811
    change, message = CASES[case]
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    record = json.loads((folder / records.RECORD).read_text())
    change(record)
    (folder / records.RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"(?s)run/record\.json: .*{message}"):
        peft_command.merge(folder, tmp_path / "merged")
    code, printed = typed(f"run={folder}", "progress=false", "task=skills", name="evaluate")
    assert code == 1
    assert "Traceback" not in printed
    assert "run/record.json: " in printed
    assert not (tmp_path / "merged").exists()


def test_a_rank_that_no_memory_holds_is_refused_before_any_is_taken(run, tmp_path, typed):  # noqa: F811
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    record = json.loads((folder / records.RECORD).read_text())
    record["config"]["peft"]["r"] = 10**9
    (folder / records.RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"run/adapter.* (r|settings|weights)"):
        peft_command.merge(folder, tmp_path / "merged")
    code, printed = typed(f"run={folder}", "progress=false", name="evaluate")
    assert code == 1
    assert "Traceback" not in printed


@pytest.mark.parametrize("group", evaluation.REBUILT)
def test_every_choice_of_a_group_is_read_back_as_it_was(group):
    for path in (config.CONF_DIR / group).glob("*.yaml"):
        values: Any = OmegaConf.to_container(config.load_choice(group, path.stem))
        values = {key: 3 if str(value).startswith("${") else value for key, value in values.items()}
        values.pop("tasks", None)  # of a suite, which composes them of the other choices
        assert typed_settings(group, values) == (values if path.stem != "paper" else values | {"tasks": {}})


def test_the_tasks_of_a_suite_are_read_like_any_other():
    one: Any = OmegaConf.to_container(config.load_choice("task", "piqa"))
    suite: Any = OmegaConf.to_container(config.load_choice("task", "paper"))
    assert typed_settings("task", suite | {"tasks": {"piqa": one}})["tasks"] == {"piqa": one}
    with pytest.raises(InputError, match=r"task._partial_"):
        typed_settings("task", suite | {"tasks": {"piqa": one | {"_partial_": True}}})
    with pytest.raises(InputError, match="piqa=3 is no dict"):
        typed_settings("task", suite | {"tasks": {"piqa": 3}})
