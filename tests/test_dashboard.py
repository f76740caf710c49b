"""Loggers without an account and without a network: what they really write, and that every run ends."""

import ast
import json
import logging
import re
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from lyapft import dashboard, secrets
from lyapft.errors import InputError
from tests import synthetic

# Lightning's own use of a torch name that torch has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


def node(name: str, **fields: Any) -> DictConfig:
    return OmegaConf.create({"name": name, **fields})


def stub(**fields: Any) -> dict[str, Any]:
    made = synthetic.record(status="running")
    return made | fields


def finished(record: dict[str, Any], status: str = "ok") -> dict[str, Any]:
    full = synthetic.record(status=status)
    full["scores"] = [{"task": "skills_new", "shots": 3, "metric": "acc", "value": 0.75, "n": 64, "stderr": 0.05}]
    full["divergence"] = [
        {
            "counterpart": "paper",
            "reference_id": "f" * 12,
            "status": "ok",
            "mean_abs_points": 1.5,
            "per_score": [{"task": "skills_new", "shots": 3, "signed_points": -1.5, "abs_points": 1.5}],
        },
        {"counterpart": "precision_only", "reference_id": None, "status": "missing", "mean_abs_points": None},
    ]
    return full | {"name": record["name"]}


class Line(L.LightningModule):
    """The least that a Trainer trains: one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = (self.weight * batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(loggers: list[Any], steps: int = 4) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=loggers,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(steps, 1)))


def wandb_messages(path: Path) -> Iterator[bytes]:
    """Messages of an offline run's file: LevelDB's log (blocks of 32 KiB; checksum, length, kind) after 7 bytes."""
    data, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little left of the block for a header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def wandb_content(folder: Path) -> dict[str, Any]:
    """What the one offline run below a folder holds."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return written_whole(file)


def written_whole(file: Path) -> dict[str, Any]:
    """The content of a run's file, as soon as wandb's writer process has put its end to disk."""
    for _ in range(300):
        try:
            if (content := parsed(file))["exit"] is not None:
                return content
        except Exception as error:
            if type(error).__name__ != "DecodeError":  # half of a message
                raise
        time.sleep(0.1)
    raise AssertionError(f"{file} was never finished")


def _values(entries: Iterable[Any]) -> dict[str, Any]:
    return {"/".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries}


def parsed(file: Path) -> dict[str, Any]:
    """Config, summary, history, alerts, group, name and exit code of an offline run."""
    from wandb.proto import wandb_internal_pb2 as pb

    content: dict[str, Any] = {"config": {}, "summary": {}, "history": [], "alerts": [], "exit": None}
    for message in wandb_messages(file):
        item = pb.Record()
        item.ParseFromString(message)
        if item.HasField("run"):
            content |= {"id": item.run.run_id, "group": item.run.run_group, "name": item.run.display_name}
            content["config"] |= _values(item.run.config.update)
        elif item.HasField("config"):
            content["config"] |= _values(item.config.update)
        elif item.HasField("summary"):
            content["summary"] |= _values(item.summary.update)
        elif item.HasField("history"):
            content["history"].append(_values(item.history.item))
        elif item.HasField("alert"):
            content["alerts"].append((item.alert.title, item.alert.text))
        elif item.HasField("exit"):
            content["exit"] = item.exit.exit_code
    return content


def test_none_logs_nothing(tmp_path: Path) -> None:
    assert dashboard.build_loggers(node("none"), stub(), tmp_path) == []
    dashboard.finish([], finished(stub()))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_logger_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="logger=tensorboard is unknown: use none, csv or wandb"):
        dashboard.build_loggers(node("tensorboard"), stub(), tmp_path)


def test_csv_writes_below_the_cell_and_keeps_earlier_files(tmp_path: Path) -> None:
    for version in range(2):
        loggers = dashboard.build_loggers(node("csv"), stub(), tmp_path)
        assert isinstance(loggers[0], CSVLogger)
        train(loggers)
        dashboard.finish(loggers, finished(stub()))
        table = pd.read_csv(tmp_path / "csv" / f"version_{version}" / "metrics.csv")
        assert len(table) == 4
        assert table["loss"].is_monotonic_decreasing
    assert sorted(path.name for path in (tmp_path / "csv").iterdir()) == ["version_0", "version_1"]


def test_two_cells_in_one_process_are_two_finished_offline_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    contents = []
    for index, status in enumerate(("ok", "failed")):
        folder = tmp_path / f"cell{index}"
        record = stub(name=f"cell{index}", study="my_study")
        loggers = dashboard.build_loggers(node("wandb", project="p"), record, folder)
        assert isinstance(loggers[0], WandbLogger)
        if status == "ok":
            train(loggers)
        dashboard.finish(loggers, finished(record, status))
        contents.append(wandb_content(folder))
    first, second = contents
    assert first["id"] != second["id"]
    assert [c["group"] for c in contents] == ["my_study"] * 2
    assert [c["name"] for c in contents] == ["cell0", "cell1"]
    assert [c["exit"] for c in contents] == [0, 1]
    assert [round(row["loss"], 6) for row in first["history"] if "loss" in row] == sorted(
        (round(row["loss"], 6) for row in first["history"] if "loss" in row), reverse=True
    )
    assert sum("loss" in row for row in first["history"]) == 4
    assert first["summary"]["score/skills_new/3-shot"] == 0.75
    assert first["summary"]["divergence/paper/mean_abs_points"] == 1.5
    assert first["summary"]["divergence/precision_only/status"] == "missing"
    assert first["summary"]["stability/lambda_max"] < 0
    assert second["summary"]["status"] == "failed"
    assert second["summary"]["error"] == "made-up failed"
    assert first["config"]["choices"]["precision"] == "bf16"


def test_no_secret_reaches_the_run(tmp_path: Path) -> None:
    record = stub()
    record["config"] = {"data": {"path": "https://me:hunter2@host/data", "hub_token": "hunter2", "limit": 3}}
    record["overrides"] = ["+data.hub_token=hunter2", "seed=1"]
    loggers = dashboard.build_loggers(node("wandb", project="p", mode="offline"), record, tmp_path)
    dashboard.finish(loggers, finished(record))
    config = wandb_content(tmp_path)["config"]
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
    assert config["config"]["data"] == {
        "path": "https://(hidden)@host/data",
        "hub_token": "(hidden)",
        "limit": 3,
    }
    assert config["overrides"] == ["+data.hub_token=(hidden)", "seed=1"]


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(st.characters(exclude_characters="@="))),
        lambda inner: st.one_of(
            st.lists(inner), st.dictionaries(st.sampled_from(["a", "batch_tokens", "keys"]), inner)
        ),
    )
)
def test_what_is_no_secret_stays_as_it_is(value: Any) -> None:
    assert secrets.without(value) == value


@pytest.mark.parametrize("key", ["token", "hub_token", "WANDB_API_KEY", "api_key", "password", "client_secret"])
def test_keys_that_name_secrets_are_hidden_at_any_depth(key: str) -> None:
    nested = {"a": [{"b": {key: "x"}}]}
    assert secrets.without(nested) == {"a": [{"b": {key: "(hidden)"}}]}


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": "0" * 40}, "online"),
        (None, {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, "offline"),
        (None, {"WANDB_MODE": "dryrun"}, "offline"),
        (None, {"WANDB_MODE": "disabled"}, "disabled"),
        ("offline", {"WANDB_MODE": "online"}, "offline"),
    ],
)
def test_mode_is_offline_unless_there_is_a_login_or_a_wish(
    configured: str | None,
    environment: dict[str, str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert dashboard.wandb_mode(node("wandb", mode=configured)) == expected


def test_a_netrc_entry_of_the_right_host_is_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'0' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert dashboard.wandb_mode(node("wandb")) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert dashboard.wandb_mode(node("wandb")) == "offline"


def test_an_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(InputError, match=r"'offlin' .* use one of online, offline, disabled"):
        dashboard.wandb_mode(node("wandb"))


def test_a_dashboard_that_fails_at_the_end_is_reported_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = dashboard.build_loggers(node("csv"), stub(), tmp_path)

    def broken(status: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(loggers[0], "finalize", broken)
    with caplog.at_level(logging.ERROR):
        dashboard.finish(loggers, finished(stub()))
    assert "CSVLogger could not be closed" in caplog.text


def test_the_summary_holds_plain_finite_values_only() -> None:
    record = finished(stub())
    record["training"]["loss_last"] = float("nan")
    record["training"]["loss_scale_last"] = None
    flat = dashboard.summary(record)
    assert "training/loss_last" not in flat
    assert "training/loss_scale_last" not in flat
    assert flat["training/steps"] == 120
    assert flat["divergence/paper/skills_new/3-shot"] == -1.5
    assert json.loads(json.dumps(flat, allow_nan=False)) == flat
    assert dashboard.summary(stub()) == {"status": "running"}


def test_wandb_is_imported_in_one_house_and_only_when_it_is_chosen(root: Path) -> None:
    found = set()
    for file in sorted((root / "lyapft").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for statement in ast.walk(tree):
            if isinstance(statement, ast.Import | ast.ImportFrom) and re.search(
                r"\bwandb(_workspaces)?\b", ast.unparse(statement)
            ):
                assert statement not in tree.body, f"{file} imports wandb with the module"
                found.add(file.parent.name)
    assert found == {"dashboard"}
