"""What a whole study becomes on a dashboard: offline runs made from records, and the views that would be saved."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lyapft import dashboard, records
from lyapft.dashboard import content, views, workspace
from lyapft.dashboard.__main__ import main
from lyapft.errors import InputError
from tests import synthetic
from tests.test_dashboard import node, stub, wandb_content, written_whole

ALERT = {"step": 7, "rule": "edge", "metric": "margin", "value": 0.01, "limit": 0.1}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A cell and its reference, which one file of an alert came with."""
    folder = tmp_path / "runs" / "synthetic"
    cells = [synthetic.record(), synthetic.record(precision="fp32", peft="none")]
    cells[0]["alerts"] = [ALERT]
    synthetic.study(folder, cells, n_steps=5, n_items=8)
    add_answers(folder / cells[0]["name"])
    return folder


def add_answers(home: Path) -> None:
    """Two counterparts and the answers beside theirs, as a cell counts them."""
    record = records.load(home)
    (entry,) = (one for one in record["divergence"] if one["status"] == "ok")
    entry |= {"flips": {"n": 64, "flipped": 16, "gained": 9, "lost": 7, "unpaired": 0}}
    entry |= {"answer_shift": {"n": 60, "kl": 0.125, "nll_gold": -0.5, "left_out": 4}}
    shift = {"n": 0, "kl": None, "nll_gold": None, "left_out": 64}  # no likelihood was finite
    scores = [score | {"signed_points": -score["signed_points"]} for score in entry["per_score"]]
    other = entry | {"counterpart": "precision_only", "per_score": scores, "answer_shift": shift}
    records.save_divergence(home, [entry, other])


def runs(folder: Path) -> dict[str, tuple[dict[str, Any], Path]]:
    found = {}
    for home in sorted(folder.glob("wandb/offline-run-*")):
        (file,) = home.glob("run-*.wandb")
        whole = written_whole(file)
        found[whole["name"]] = (whole, home)
    return found


def table(home: Path, run: dict[str, Any], name: str) -> pd.DataFrame:
    """A table as W&B stored it beside the run."""
    (logged,) = [row for row in run["history"] if f"{name}/path" in row]
    stored = json.loads((home / "files" / logged[f"{name}/path"]).read_text(encoding="utf-8"))
    return pd.DataFrame(stored["data"], columns=stored["columns"])


def test_a_pushed_study_holds_what_its_records_hold(study: Path) -> None:
    pushed = dashboard.push(study, "offline", "p")
    found = runs(study)
    assert sorted(found) == sorted(pushed)
    for folder, record in records.load_study(study):
        run, home = found[folder.name]
        assert (run["group"], run["exit"]) == ("synthetic", 0)
        assert run["config"]["choices"] == record["choices"]
        steps = pd.read_parquet(folder / records.STEPS)
        losses = [row["loss"] for row in run["history"] if "loss" in row]
        assert losses == pytest.approx(steps["loss"].tolist())
        assert [row["trainer/global_step"] for row in run["history"] if "loss" in row] == steps["step"].tolist()
        assert dashboard.summary(record).items() <= run["summary"].items()
        items = pd.read_parquet(folder / records.ITEMS)
        answers = table(home, run, "tables/items")
        for column in ("task", "item", "shots", "gold", "choice", "correct"):
            assert answers[column].tolist() == items[column].tolist()
        scores = table(home, run, "tables/scores")
        assert scores["value"].tolist() == [score["value"] for score in record["scores"]]


def test_alerts_and_charts_are_in_the_pushed_run(study: Path) -> None:
    dashboard.push(study, "offline", "p")
    (cell,) = [record for _, record in records.load_study(study) if record.get("alerts")]
    run, home = runs(study)[cell["name"]]
    assert run["alerts"] == [("lyapft: edge", "step 7: margin is 0.01")]
    prefix = "_wandb/visualize/"
    charts = {name.removeprefix(prefix): chart for name, chart in run["config"].items() if name.startswith(prefix)}
    drawn = {"score", "divergence", "divergence_same_peft", "flip_rate", "margin"}
    assert set(charts) == {f"charts/{name}" for name in drawn}
    assert charts["charts/score"]["panel_config"]["fieldSettings"] == {"x": "shots", "y": "value", "stroke": "series"}
    margins = table(home, run, "charts/margin_table")
    assert margins["margin"].tolist() == [layer["margin"] for layer in cell["stability"]["layers"]]


def test_both_counterparts_and_the_answers_are_in_the_pushed_run(study: Path) -> None:
    dashboard.push(study, "offline", "p")
    (cell,) = [record for _, record in records.load_study(study) if record.get("alerts")]
    run, home = runs(study)[cell["name"]]
    for entry in cell["divergence"]:
        points = [score["signed_points"] for score in entry["per_score"]]
        name = {"paper": "divergence", "precision_only": "divergence_same_peft"}[entry["counterpart"]]
        for stored in (table(home, run, f"tables/{name}"), table(home, run, f"charts/{name}_table")):
            assert stored["signed_points"].tolist() == pytest.approx(points)
    answers = table(home, run, "tables/answers").set_index("counterpart")
    assert answers.loc["paper", ["flipped", "gained", "lost", "flip_rate", "kl", "nll_gold"]].tolist() == [
        16, 9, 7, 0.25, 0.125, -0.5,
    ]  # fmt: skip
    assert answers.loc["precision_only", "flip_rate"] == 0.25
    assert answers.loc["precision_only"].isna()[["kl", "nll_gold"]].all()
    summary = run["summary"]
    assert summary["divergence/paper/flip_rate"] == summary["divergence/precision_only/flip_rate"] == 0.25
    assert (summary["divergence/paper/kl"], summary["divergence/paper/nll_gold"]) == (0.125, -0.5)
    assert "divergence/precision_only/kl" not in summary


def test_a_second_push_has_the_same_runs(study: Path) -> None:
    first = dashboard.push(study, "offline", "p")
    ids = sorted(run["id"] for run, _ in runs(study).values())
    for home in study.glob("wandb/offline-run-*"):
        home.rename(home.with_name(f"earlier-{home.name}"))
    assert dashboard.push(study, "offline", "p") == first
    assert sorted(run["id"] for run, _ in runs(study).values()) == ids
    assert len(set(ids)) == 2


def test_running_cells_and_those_with_a_run_of_their_own_are_left_out(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live, other = sorted(path.parent for path in study.glob("*/record.json"))
    (live / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    synthetic.study(study, [synthetic.record(status="running", seed=9)])
    with caplog.at_level(logging.INFO):
        assert dashboard.push(study, "offline", "p") == [other.name]
    assert live.name in caplog.text


def test_a_live_run_carries_the_same_tables(study: Path) -> None:
    folder, record = next((f, r) for f, r in records.load_study(study) if r["role"] == "cell")
    loggers = dashboard.build_loggers(node("wandb", mode="offline"), stub(name=record["name"]), folder)
    dashboard.finish(loggers, record)
    live = wandb_content(folder)
    (home,) = folder.glob("wandb/offline-run-*")
    items = pd.read_parquet(folder / records.ITEMS)
    assert table(home, live, "tables/items")["choice"].tolist() == items["choice"].tolist()
    for name in ("scores", "divergence", "divergence_same_peft", "answers", "layers"):
        assert len(table(home, live, f"tables/{name}"))
    assert dashboard.summary(record).items() <= live["summary"].items()


def test_no_credential_of_the_environment_is_written(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = {"WANDB_API_KEY": "c0ffee" * 6 + "beef", "HF_TOKEN": "hf_canaryCanaryCanaryCanary"}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    dashboard.push(study, "offline", "p")
    written = [file for file in study.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in written)
    for file in written:
        for value in canaries.values():
            assert value.encode() not in file.read_bytes(), file


def test_tables_leave_out_what_is_not_there_and_say_none_for_nan() -> None:
    record = {"scores": [{"task": "t", "shots": 0, "metric": "acc", "value": float("nan"), "n": 1}]}
    found = content.tables(record, None)
    assert list(found) == ["scores"]
    assert found["scores"]["value"].tolist() == [None]
    assert [chart.name for chart in content.charts(found)] == ["score"]


def test_every_panel_of_the_views_shows_a_number_that_a_run_has(study: Path) -> None:
    found = [record for _, record in records.load_study(study)]
    steps = pd.concat(pd.read_parquet(folder / records.STEPS) for folder, _ in records.load_study(study))
    summaries = {name for record in found for name in dashboard.summary(record)}
    tables = {f"tables/{name}" for record in found for name in content.tables(record, pd.DataFrame({"task": ["t"]}))}
    made = views.views(found)
    assert [view.name for view in made] == ["matrix", "stability", "divergence", "cost"]
    for view in made:
        for panel in view.panels:
            # synthetic series have no loss scale, real ones do
            known = {"line": {*steps, "loss_scale"}, "bar": summaries, "table": tables}[panel.kind]
            assert set(panel.metrics) <= known, (view.name, panel)
    shown = {metric for view in made for panel in view.panels if panel.kind == "bar" for metric in panel.metrics}
    numbers = {
        name for name in summaries if name.startswith(("score/", "divergence/")) and not name.endswith("/status")
    }
    assert numbers <= shown
    assert {panel.metrics[0] for panel in made[2].panels if panel.kind == "table"} == {
        "tables/divergence", "tables/divergence_same_peft", "tables/answers",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydantic, in wandb_workspaces
def test_the_specification_that_would_be_sent(study: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboards` is not installed")
    assert main(["workspace", "me/p", str(study), "--output", str(tmp_path / "spec.json")]) == 0
    sent = json.loads((tmp_path / "spec.json").read_text(encoding="utf-8"))
    assert [view["displayName"] for view in sent] == [
        f"synthetic: {name}" for name in ("matrix", "stability", "divergence", "cost")
    ]
    for view, made in zip(sent, views.views([r for _, r in records.load_study(study)]), strict=True):
        assert (view["entityName"], view["projectName"], view["type"]) == ("me", "p", "project-view")
        section = view["spec"]["section"]
        (runset,) = section["runSets"]
        assert [(key["section"], key["name"]) for key in runset["grouping"]] == [
            ("run", "group"),
            ("config", "choices.value.model"),
            ("config", "choices.value.peft"),
            ("config", "choices.value.precision"),
        ]
        (chosen,) = runset["filters"]["filters"]
        assert (chosen["key"]["name"], chosen["op"], chosen["value"]) == ("group", "IN", ["synthetic"])
        assert section["settings"]["xAxis"] == views.STEP
        (bank,) = section["panelBankConfig"]["sections"]
        drawn = [panel["config"].get("metrics") for panel in bank["panels"] if panel["viewType"] != "Weave"]
        assert drawn == [list(panel.metrics) for panel in made.panels if panel.kind != "table"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydantic, in wandb_workspaces
def test_what_would_be_sent_is_what_is_sent(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboards` is not installed")
    from wandb_workspaces.workspaces import internal

    calls = []

    def server(_: object, __: str, variables: dict[str, Any]) -> dict[str, Any]:
        calls.append(variables)
        return {"upsertView": {"view": {"id": "1", "name": "nw-x-v"}, "inserted": True}}

    monkeypatch.setattr(internal.wandb, "Api", lambda: None)
    monkeypatch.setattr(internal, "execute_graphql", server)
    monkeypatch.setattr("wandb_workspaces.workspaces.interface.get_app_url", lambda *_: "https://example.org")
    made = workspace.workspaces("me", "p", [study])
    workspace.save(made)
    for call, promised in zip(calls, workspace.specification(made), strict=True):
        assert json.loads(call["spec"]) == promised["spec"]
        assert {name: call[name] for name in promised if name != "spec"} == {
            name: value for name, value in promised.items() if name != "spec"
        }


def test_without_the_extra_the_command_says_what_to_install(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["workspace", "me/p", str(study)]) == 2
    assert "pip install -e '.[dashboards]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["p", "/p", "me/", "a/b/c"])
def test_a_project_without_its_entity_is_refused(name: str, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workspace", name, str(study)]) == 2
    assert "ENTITY/PROJECT" in capsys.readouterr().err


def test_views_that_cannot_be_saved_say_what_to_do() -> None:
    class Refused:
        def save(self) -> None:
            raise ValueError("permission denied")

    with pytest.raises(InputError, match=r"permission denied.*wandb login"):
        workspace.save([Refused()])


def test_push_on_the_command_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(study), "--mode", "offline"]) == 0
    assert capsys.readouterr().out.startswith("2 runs (offline) in ")
    assert main(["push", str(study / "nowhere")]) == 2
