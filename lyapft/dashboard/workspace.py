"""The views of a study as W&B saved views, by wandb-workspaces (the extra `dashboards`)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lyapft.dashboard.views import STEP, Panel, View, views
from lyapft.errors import InputError
from lyapft.records import load_study

GROUPS = ("choices.model", "choices.peft", "choices.precision")  # the seeds of a recipe are one line


def workspaces(entity: str, project: str, studies: Sequence[Path]) -> list[Any]:
    """One saved view each of matrix, stability, divergence and cost; runs grouped by study, then by recipe.

    Raises:
        InputError: no such study, or wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise InputError(
            "the dashboard's views need wandb-workspaces, which is not installed: pip install -e '.[dashboards]'"
        ) from None
    found = [record for study in studies for _, record in load_study(study)]
    names = sorted({str(record["study"]) for record in found})
    runset = {
        "filters": [ws.Metric("Group").isin(names)],
        "groupby": [ws.Metric("Group"), *(ws.Config(group) for group in GROUPS)],
    }
    return [
        ws.Workspace(
            entity=entity,
            project=project,
            name=f"{', '.join(names)}: {view.name}",
            sections=[ws.Section(name=view.name, panels=[_panel(panel) for panel in view.panels], is_open=True)],
            settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
            runset_settings=ws.RunsetSettings(**runset, pinned_columns=_columns(view)),
        )
        for view in views(found)
    ]


def _columns(view: View) -> list[str]:
    return [f"summary:{name}" for name in view.columns]


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "line":
        return wr.LinePlot(title=panel.title, x=STEP, y=list(panel.metrics))
    if panel.kind == "bar":
        return wr.BarPlot(title=panel.title, metrics=list(panel.metrics))
    return wr.WeavePanelSummaryTable(table_name=panel.metrics[0])


def specification(made: Sequence[Any]) -> list[dict[str, Any]]:
    """What `save` would send to the server for each view, as plain JSON values."""
    sent = [workspace._to_model() for workspace in made]
    return [
        {
            "entityName": view.entity,
            "projectName": view.project,
            "displayName": view.display_name,
            "type": "project-view",
        }
        | {"spec": json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))}
        for view in sent
    ]


def save(made: Sequence[Any]) -> None:
    """Save the views on the server; wandb prints their addresses.

    Raises:
        InputError: no account, or the server refused them.
    """
    try:
        for workspace in made:
            workspace.save()
    except Exception as error:  # noqa: BLE001 - wandb and its transport raise many kinds
        raise InputError(
            f"the views could not be saved ({error}): log in with `wandb login`, or use --output FILE"
        ) from None
