"""What changed between two studies, number by number, beside the noise of both."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import special

from lyapft.divergence import ALPHA, Comparison, adjusted, compare
from lyapft.report.cells import read
from lyapft.report.regression.quantities import QUANTITIES
from lyapft.report.tables import ABSENT, Column
from lyapft.verdict.evidence import Recipe, seed_of, threads
from lyapft.verdict.words import EMULATED, p_value

Pairs = Sequence[tuple[Recipe, Recipe]]


@dataclass(frozen=True)
class Floor:
    """How far the same run lies from itself: root mean square difference of `n` runs and their reruns.

    In the unit of the number, of a ratio as ln.
    """

    size: float
    n: int

    @property
    def bar(self) -> float:
        """What a rerun exceeds in 5% of cases: t(0.975, n) × size, as n pairs only estimate how far reruns lie apart.

        >>> round(Floor(1.0, 2).bar, 3)
        4.303
        """
        return float(special.stdtrit(self.n, 1 - ALPHA / 2)) * self.size


@dataclass(frozen=True)
class Change:
    """One number of one recipe, new minus old (or ln of new / old) over the seeds that both studies have."""

    recipe: Recipe
    quantity: str
    old: float
    new: float
    identical: bool  # no seed changed at all
    comparison: Comparison
    floor: Floor | None  # None: neither study has reruns

    @property
    def outcome(self) -> str:
        """`better` or `worse` where a change is shown, `same` where nothing changed, else `undecided`.

        Shown is what the paired t test over seeds shows, with no less spread than reruns have, and what a rerun would
        hardly do: averaging over seeds does not take away what it moves in all of them alike.
        """
        mean = self.comparison.estimate.mean
        if self.identical:
            return "same"
        if not self.comparison.p_different <= ALPHA or (self.floor and abs(mean) <= self.floor.bar):
            return "undecided"
        return "better" if (mean > 0) == QUANTITIES[self.quantity].higher_is_better else "worse"


def changes(pairs: Pairs, quantities: Sequence[str]) -> list[Change]:
    """Every chosen number of every recipe that both studies have; p adjusted by Holm over all of them."""
    floors = {name: _floors(name, [recipe for pair in pairs for recipe in pair]) for name in quantities}
    raw = []
    for old, new in pairs:
        for name in quantities:
            keys = ((old.setting, old.label), (new.setting, new.label), old.setting)
            known = [floors[name][key] for key in keys if key in floors[name]]
            floor = max(known, key=lambda one: one.bar, default=None)
            if change := _change(name, old, new, floor):
                raw.append(change)
    comparisons = adjusted([change.comparison for change in raw])
    return [replace(change, comparison=one) for change, one in zip(raw, comparisons, strict=True)]


def _change(name: str, old: Recipe, new: Recipe, floor: Floor | None) -> Change | None:
    quantity = QUANTITIES[name]
    before_by_seed = {seed_of(run): run for run in old.runs}
    both = [(before_by_seed[seed_of(run)], run) for run in new.runs if seed_of(run) in before_by_seed]
    pairs = [pair for one, other in both if (pair := quantity.pair(one, other)) is not None]
    if not pairs:
        return None
    differences = [quantity.difference(pair) for pair in pairs]
    before, after = (math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True))
    least = max(_resolution(name, new), floor.size if floor else 0.0)
    return Change(new, name, before, after, not any(differences), compare(differences, resolution=least), floor)


def _resolution(name: str, recipe: Recipe) -> float:
    """Scores are counts: equal changes on a few seeds are known to one answer only."""
    items = [int(score["n"]) for run in recipe.runs for score in run.get("scores") or []]
    return 100.0 / sum(items) * len(recipe.runs) if name in ("score", "divergence") and items else 0.0


def _floors(name: str, recipes: Iterable[Recipe]) -> dict[Any, Floor]:
    """Floors of one number by recipe (setting, label), and by setting: few reruns of one recipe may agree by chance."""
    squares: dict[Any, list[float]] = {}
    for recipe in recipes:
        for difference in _reruns_apart(name, recipe):
            for key in ((recipe.setting, recipe.label), recipe.setting):
                squares.setdefault(key, []).append(difference**2)
    return {key: Floor(math.sqrt(math.fsum(own) / len(own)), len(own)) for key, own in squares.items()}


def _reruns_apart(name: str, recipe: Recipe) -> Iterator[float]:
    """Rerun minus run of the same seed; on another number of threads too, unless that may change the number itself."""
    quantity = QUANTITIES[name]
    first = {seed_of(run): run for run in recipe.runs}
    for rerun in recipe.reruns:
        run = first.get(seed_of(rerun))
        if run is None or (quantity.ratio and threads(run) != threads(rerun)):
            continue
        if (pair := quantity.pair(run, rerun)) is not None:
            yield quantity.difference(pair)


def _mark(change: Change) -> str:
    emulated = any(read(run, "precision", "emulated") for run in change.recipe.runs)
    return f" {EMULATED}" * (emulated and change.quantity == "tokens_per_s")


def table(found: Sequence[Change]) -> list[Column]:
    """The changes as columns of text."""

    def shown(change: Change) -> str:
        values = (change.comparison.estimate.mean, change.comparison.estimate.low, change.comparison.estimate.high)
        if QUANTITIES[change.quantity].ratio:
            texts = [f"× {math.exp(value):.3f}" for value in values]
        else:
            texts = [f"{value:+.3g}" for value in values]
        return texts[0] if math.isnan(values[1]) else f"{texts[0]} [{texts[1]}, {texts[2]}]"

    def beside(change: Change, size: float | None) -> str:
        if size is None:
            return ABSENT
        return f"× {math.exp(size):.3f}" if QUANTITIES[change.quantity].ratio else f"{size:.3g}"

    return [
        Column("", "recipe", [change.recipe.name for change in found], numeric=False),
        Column("", "number", [f"{change.quantity}{_mark(change)}" for change in found], numeric=False),
        Column("", "seeds", [str(change.comparison.estimate.n) for change in found]),
        Column("", "old", [f"{change.old:.4g}" for change in found]),
        Column("", "new", [f"{change.new:.4g}" for change in found]),
        Column("", "change [95%]", [shown(change) for change in found]),
        Column("", "rerun", [beside(change, change.floor.size if change.floor else None) for change in found]),
        Column("", "beyond", [beside(change, change.floor.bar if change.floor else None) for change in found]),
        Column("", "Holm", [p_value(change.comparison.p_different) for change in found]),
        Column("", "outcome", [change.outcome for change in found], numeric=False),
    ]
