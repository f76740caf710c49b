"""The saved views of a study on a dashboard, as plain data: which panel shows which numbers. Knows no W&B."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lyapft.dashboard.content import summary
from lyapft.records import Record

STEP = "trainer/global_step"


@dataclass(frozen=True)
class Panel:
    """Numbers drawn together: lines over steps, bars over runs, or a table of each run."""

    kind: Literal["line", "bar", "table"]
    title: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """A saved view: its panels, and the columns that its list of runs shows."""

    name: str
    panels: tuple[Panel, ...]
    columns: tuple[str, ...]


def views(records: Sequence[Record]) -> list[View]:
    """The views `matrix`, `stability`, `divergence` and `cost`, with a panel for each number that a record has.

    >>> [view.name for view in views([])]
    ['matrix', 'stability', 'divergence', 'cost']
    """
    names = sorted({name for record in records for name in summary(record)})

    def bars(prefix: str, suffix: str = "") -> list[Panel]:
        found = [n for n in names if n.startswith(prefix) and n.endswith(suffix) and not n.endswith("/status")]
        return [Panel("bar", name, (name,)) for name in found]

    def over_steps(*metrics: str) -> list[Panel]:
        return [Panel("line", name, (name,)) for name in metrics]

    layers = sorted({name.split("/")[1] for name in names if name.startswith("stability/") and name.count("/") == 2})
    margins = [Panel("line", "margin by layer", tuple(f"margin/{layer}" for layer in layers))] if layers else []
    return [
        _view("matrix", [*over_steps("loss"), *bars("score/"), Panel("table", "items", ("tables/items",))]),
        _view(
            "stability",
            [*over_steps("lambda_max", "margin"), *margins, *over_steps("grad_norm", "loss_scale"), *_stable(names)],
        ),
        _view("divergence", [*bars("divergence/paper/"), *bars("divergence/precision_only/"), *_tables(names)]),
        _view("cost", [*over_steps("tokens_per_s"), *bars("cost/")]),
    ]


def _tables(names: Sequence[str]) -> list[Panel]:
    """The tables of differences of the runs that are listed, where any has them."""
    shown_by = {
        "divergence": "divergence/paper/mean_abs_points",
        "divergence_same_peft": "divergence/precision_only/mean_abs_points",
        "answers": "/flip_rate",
    }
    found = [table for table, number in shown_by.items() if any(name.endswith(number) for name in names)]
    return [Panel("table", table, (f"tables/{table}",)) for table in found]


def _stable(names: Sequence[str]) -> list[Panel]:
    wanted = ("stability/lambda_max", "stability/margin", "stability/norm_bound")
    return [Panel("bar", name, (name,)) for name in wanted if name in names]


def _view(name: str, panels: Sequence[Panel]) -> View:
    columns = [metric for panel in panels if panel.kind == "bar" for metric in panel.metrics]
    return View(name, tuple(panels), ("status", *columns))
