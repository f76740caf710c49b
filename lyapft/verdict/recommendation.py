"""Which recipe to use: the cheapest that is shown to be equivalent, and what stays open."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lyapft.verdict.evidence import Settings
from lyapft.verdict.recipes import Row


@dataclass(frozen=True)
class Recommendation:
    """Of one model, data set and task.

    `chosen` is the cheapest recipe that is shown to be equivalent and to cost less than its counterpart, or None.
    `open` are the undecided ones, cheapest first; beside a chosen one, those that may be cheaper still, or whose cost
    was not measured. `unsound` are equivalent on the seeds that
    finished, but broke down on others; `dear` are equivalent, but not shown to cost less; `better` score higher by more
    than the margin and cost less: not equivalent, but no loss either.
    """

    setting: tuple[str, str, str]
    chosen: Row | None
    open: tuple[Row, ...]
    unsound: tuple[Row, ...]
    dear: tuple[Row, ...]
    better: tuple[Row, ...]
    trained: bool = True  # whether any of it was trained at all


def recommend(found: Sequence[Row], settings: Settings) -> list[Recommendation]:
    """A recommendation for every model, data set and task, from the rows against the paper's counterpart."""
    made = []
    for setting in dict.fromkeys(row.recipe.setting for row in found):
        own = sorted((row for row in found if row.recipe.setting == setting), key=_place)
        equivalent = [row for row in own if row.outcome(settings) == "equivalent"]
        sound = [row for row in equivalent if not row.recipe.broke_down()]
        chosen = next((row for row in sound if row.cheaper), None)
        made.append(
            Recommendation(
                setting,
                chosen,
                open=tuple(
                    row
                    for row in own
                    if row.outcome(settings) == "undecided" and (chosen is None or not _cost(row) >= _cost(chosen))
                ),
                unsound=tuple(row for row in equivalent if row.recipe.broke_down()),
                dear=tuple(row for row in sound if not row.cheaper),
                better=tuple(
                    row
                    for row in own
                    if row.outcome(settings) == "better" and row.cheaper and not row.recipe.broke_down()
                ),
                trained=any(row.recipe.trained for row in own),
            )
        )
    return made


def _cost(row: Row) -> float:
    return row.cost.index.mean  # NaN where it was not measured


def _place(row: Row) -> float:
    return math.inf if math.isnan(_cost(row)) else _cost(row)
