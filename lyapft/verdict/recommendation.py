"""Which recipe to use: the cheapest that is shown to be equivalent, and what stays open."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

from lyapft.verdict.costs import told_apart
from lyapft.verdict.evidence import BROKE_DOWN, Settings
from lyapft.verdict.recipes import Row, judged_once

UNFINISHED = ("running", "interrupted")  # not there yet: their seeds may still come
Advice = Literal["use", "cost_open", "open", "unsound", "better", "dear", "outside"]


@dataclass(frozen=True)
class Recommendation:
    """Of one model, data set and task.

    `chosen` is the cheapest recipe that is shown to be equivalent and to cost less than its counterpart, or None;
    `tied` are equivalent ones whose cost the seeds do not tell from its own. `open` are the undecided ones, cheapest
    first; beside a chosen one, those that may be cheaper still, or whose cost was not measured. `unsound` are
    equivalent on the seeds that could be compared, but lack others (see `doubts`). Of the other equivalent ones it is
    undecided whether they cost less (`cost_open`), or shown that they do not (`dear`). `better` score higher by more
    than the margin and are not shown to cost more: not equivalent, but no loss either.
    """

    setting: tuple[str, str, str]
    chosen: Row | None
    tied: tuple[Row, ...]
    open: tuple[Row, ...]
    unsound: tuple[Row, ...]
    cost_open: tuple[Row, ...]
    dear: tuple[Row, ...]
    better: tuple[Row, ...]
    trained: bool = True  # whether any of it was trained at all

    @property
    def advice(self) -> Advice:
        """To use the chosen one; else which of the others there are, in this order; `outside` where there are none.

        To stay with the counterpart is advised (`dear`, `outside`) only where nothing is left that may be used instead.
        """
        if self.chosen:
            return "use"
        others: tuple[Advice, ...] = ("cost_open", "open", "unsound", "better", "dear")
        return next((name for name in others if getattr(self, name)), "outside")

    def soonest(self, settings: Settings) -> tuple[Row, int] | None:
        """Of the undecided ones that which the fewest seeds would show to be equivalent, if that can be said of any."""
        inside = [row for row in self.open if abs(row.comparison.estimate.mean) < settings.margin]
        seeds = [(row, row.comparison.seeds_needed(settings.alpha, settings.power)) for row in inside]
        return min(((row, count) for row, count in seeds if count), key=itemgetter(1), default=None)


def recommend(found: Sequence[Row], settings: Settings) -> list[Recommendation]:
    """A recommendation for every model, data set and task, from the rows against the paper's counterpart.

    A recipe that another one of the study repeats under its own name is judged once, by the first name.
    """
    by_setting: dict[tuple[str, str, str], list[Row]] = {}
    for row in judged_once(found):
        by_setting.setdefault(row.recipe.setting, []).append(row)
    pairs = sum(math.comb(len(_sound(own, settings)), 2) for own in by_setting.values())
    return [_recommended(setting, own, pairs, settings) for setting, own in by_setting.items()]


def _recommended(setting: tuple[str, str, str], found: Sequence[Row], pairs: int, settings: Settings) -> Recommendation:
    """
    Args:
        pairs: of equivalent recipes of the study that are compared by their costs.
    """
    own, alpha = sorted(found, key=_place), settings.alpha
    outcomes = [(row.outcome(settings), row) for row in own]
    sound = _sound(own, settings)
    chosen = next((row for row in sound if row.cost.saves(alpha)), None)
    return Recommendation(
        setting,
        chosen,
        tied=_tied(chosen, sound, alpha / max(1, pairs)) if chosen else (),
        open=tuple(
            row
            for outcome, row in outcomes
            if outcome == "undecided" and (chosen is None or not _cost(row) >= _cost(chosen))
        ),
        unsound=tuple(row for outcome, row in outcomes if outcome == "equivalent" and doubts(row)),
        cost_open=tuple(row for row in sound if row.cost.undecided(alpha)),
        dear=tuple(row for row in sound if row.cost.exceeds(alpha) or row.cost.alike),
        better=tuple(
            row for outcome, row in outcomes if outcome == "better" and not (row.cost.exceeds(alpha) or doubts(row))
        ),
        trained=any(row.recipe.trained for row in own),
    )


def doubts(row: Row) -> list[str]:
    """Why the seeds that could be compared do not stand for all that the recipe was given.

    Which seeds fail may well depend on what is compared, so those that are left may flatter.
    """
    lost = row.recipe.failed_seeds()
    failed = [run for run in lost.values() if run["status"] not in (*BROKE_DOWN, *UNFINISHED)]
    total = len(row.recipe.runs) + len(lost)
    kinds = sorted({str(run["status"]) for run in failed})
    reasons = {
        f"{len(failed)} of {total} seeds did not finish ({', '.join(kinds)})": len(failed),
        f"the counterpart of {row.uncompared} of {total} seeds is missing": row.uncompared,
    }
    return [*row.recipe.breakdowns(), *(reason for reason, count in reasons.items() if count)]


def _sound(found: Sequence[Row], settings: Settings) -> list[Row]:
    """Those that are shown to be equivalent on all that they were given."""
    return [row for row in found if row.outcome(settings) == "equivalent" and not doubts(row)]


def _tied(chosen: Row, sound: Sequence[Row], risk: float) -> tuple[Row, ...]:
    """The others whose cost cannot be told from that of the chosen one.

    The risk is shared among all pairs of the study, not only those with the chosen one: it was chosen for its low cost,
    which among several that cost the same is luck.
    """
    return tuple(row for row in sound if row is not chosen and not told_apart(chosen.cost, row.cost, 1 - risk))


def _cost(row: Row) -> float:
    return row.cost.index.mean  # NaN where it was not measured


def _place(row: Row) -> float:
    return math.inf if math.isnan(_cost(row)) else _cost(row)
