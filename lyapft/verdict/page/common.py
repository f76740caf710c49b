"""What all lines of a page share and so need not say each: how numbers are written, data and task, the seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lyapft.divergence import Estimate
from lyapft.verdict.evidence import Recipe
from lyapft.verdict.findings import Findings
from lyapft.verdict.words import BASE, REFERENCE, counted, joined, p_value, raw, signed

BEYOND = "†"  # beside scores that are also of items longer than what the base was trained on
FLIPPED = "flipped"  # beside the share of answers that differ from the counterpart's
LONGEST_NAME = 60
MOST_NAMED = 4  # layers, models


@dataclass(frozen=True)
class Common:
    """How the lines of one page name settings and write numbers."""

    found: Findings

    @cached_property
    def seeds(self) -> int:
        """Seeds of most comparisons; 0 where there is none, or none over seeds."""
        found = self.found
        counts = [row.n for row in (*found.rows, *found.format_rows) if row.comparison.estimate.unit == "seeds"]
        counts += [one.difference.n for one in found.learned]
        counts += [one.comparison.estimate.n for one in found.ablations]
        return max(set(counts), key=lambda n: (counts.count(n), n), default=0)

    @cached_property
    def place(self) -> tuple[str, str] | None:
        """Data and task, where the study has one of each."""
        places = {recipe.setting[1:] for recipe in self.found.recipes}
        return places.pop() if len(places) == 1 else None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Parameters by model, as far as the records say."""
        return {
            recipe.model: int(count)
            for recipe in self.found.recipes
            for run in recipe.runs[:1]
            if (count := (run.get("model") or {}).get("parameters_total"))
        }

    @property
    def reference(self) -> str:
        """What recipes are compared with."""
        trained = any(row.recipe.trained for row in self.found.rows) or not self.found.rows
        return REFERENCE if trained else BASE

    @property
    def everywhere(self) -> str:
        """Data and task where the study has one of each, to be said once."""
        if not self.place:
            return ""
        data, task = self.place
        return f" on {cut(data if data == task else f'{data} (scored on {task})')}"

    def size(self, model: str) -> int:
        """Parameters of a model; 0 where no record says so."""
        return self.sizes.get(model, 0)

    def on(self, data: str, task: str) -> str:
        """Where, after the name of a model; nothing where the whole study is there."""
        return "" if self.place else f" on {cut(data if data == task else f'{data} ({task})')}"

    def where(self, setting: tuple[str, str, str]) -> str:
        """A setting by its model, and data and task where there are several."""
        model, data, task = setting
        return f"{cut(model)}{self.on(data, task)}"

    def name(self, recipe: Recipe) -> str:
        """Model and recipe, and where."""
        return f"{cut(recipe.name)}{self.on(recipe.data, recipe.task)}"

    def apart(self, found: Estimate, p: float | None = None) -> str:
        """A difference, its interval, the seeds where they are not those of most lines, and its p."""
        parts = [] if found.n < 2 else [f"{signed(found.low)}, {signed(found.high)}"]
        parts += [counted(found)] if found.n and (found.unit, found.n) != ("seeds", self.seeds or 1) else []
        bracket = f" [{'; '.join(parts)}]" if parts else ""
        return f"{signed(found.mean)}{bracket}" + (f", {p_value(p)}" if p is not None and found.n > 1 else "")

    def numbers(
        self, found: Estimate, scores: tuple[float, float], beyond: bool = False, p: float | None = None
    ) -> str:
        """A difference beside the two scores that it is of."""
        return f"{self.apart(found, p)}; {self.scores(scores, beyond)}"

    def scores(self, scores: tuple[float, float], beyond: bool = False) -> str:
        """Two scores, labelled where they are beyond the trained length."""
        return f"{raw(*scores)}{f' {BEYOND}' * beyond}"


def cut(name: str) -> str:
    """A name that cannot fill a page: one line, at most 60 characters.

    >>> cut("a  b"), len(cut(100 * "x"))
    ('a b', 60)
    """
    flat = " ".join(name.split())
    return flat if len(flat) <= LONGEST_NAME else f"{flat[: LONGEST_NAME - 1]}…"


def some(names: Sequence[str], what: str, most: int = MOST_NAMED) -> str:
    """The first names of many, and how many more, which are at least two.

    >>> some(["a", "b", "c", "d", "e", "f"], "layers")
    'a, b, c, d and 2 more layers'
    """
    if len(names) <= most + 1:
        return joined(list(map(cut, names)))
    return f"{', '.join(map(cut, names[:most]))} and {len(names) - most} more {what}"
