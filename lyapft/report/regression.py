"""Two studies of the same recipes, before and after a change: did a number get worse beyond its noise?

`python -m lyapft.report compare OLD NEW --fail-on=score,tokens_per_s`
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lyapft import records
from lyapft.divergence import ALPHA, Comparison, adjusted, compare
from lyapft.errors import InputError
from lyapft.records import Record, costs, divergence_entry
from lyapft.report.cells import read
from lyapft.report.tables import Column, as_text
from lyapft.verdict.evidence import Evidence, Recipe, gather, seed_of, values_of
from lyapft.verdict.words import p_value

WORSE = 1  # exit code
# not those that are running or were interrupted
FAILED = ("nonfinite", "loss_scale_underflow", "stopped_by_guard", "oom", "failed")


@dataclass(frozen=True)
class Quantity:
    """A number of a record: where it is, which way is better, and whether it is compared as a ratio."""

    unit: str
    value: Callable[[Record], float | None]
    higher_is_better: bool
    ratio: bool = False

    def pair(self, old: Record, new: Record) -> tuple[float, float] | None:
        """The number of both, where both have it: finite, and of a ratio positive."""
        if self.value is _score:
            return _common_scores(old, new)
        before, after = self.value(old), self.value(new)
        if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
            return None
        return None if self.ratio and min(before, after) <= 0 else (before, after)


def _field(*keys: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        found = read(record, *keys)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None

    return value


def _cost(key: str) -> Callable[[Record], float | None]:
    return lambda record: costs(record).get(key)


def _score(record: Record) -> float | None:
    found = values_of(record)
    return 100 * math.fsum(found.values()) / len(found) if found else None


def _common_scores(old: Record, new: Record) -> tuple[float, float] | None:
    """Mean scores over the tasks and shots that both were asked, so that an easier set is no progress."""
    before, after = values_of(old), values_of(new)
    both = before.keys() & after.keys()
    if not both:
        return None
    first, second = (100 * math.fsum(side[key] for key in both) / len(both) for side in (before, after))
    return first, second


def _divergence(record: Record) -> float | None:
    found = (divergence_entry(record, "paper") or {}).get("mean_abs_points")
    return None if found is None else float(found)


QUANTITIES = {
    "score": Quantity("points", _score, higher_is_better=True),
    "loss": Quantity("nats/token", _field("training", "loss_mean_last_10pct"), higher_is_better=False),
    "divergence": Quantity("points", _divergence, higher_is_better=False),
    "margin": Quantity("nats/token", _field("stability", "margin"), higher_is_better=True),
    "tokens_per_s": Quantity("ratio", _cost("tokens_per_s"), higher_is_better=True, ratio=True),
    "peak_bytes_per_token": Quantity("ratio", _cost("peak_bytes_per_token"), higher_is_better=False, ratio=True),
}


@dataclass(frozen=True)
class Change:
    """One number of one recipe, new minus old (or ln of new / old) over the seeds that both studies have."""

    recipe: Recipe
    quantity: str
    old: float
    new: float
    identical: bool  # no seed changed at all
    comparison: Comparison

    @property
    def outcome(self) -> str:
        """`better` or `worse` where the paired t test shows it, `same` where nothing changed, else `undecided`."""
        mean = self.comparison.estimate.mean
        if self.identical:
            return "same"
        if not self.comparison.p_different <= ALPHA:
            return "undecided"
        return "better" if (mean > 0) == QUANTITIES[self.quantity].higher_is_better else "worse"


def changes(old: Evidence, new: Evidence, quantities: Sequence[str]) -> list[Change]:
    """Every chosen number of every recipe that both studies have; p adjusted by Holm over all of them."""
    before = {(recipe.setting, recipe.label): recipe for recipe in old.recipes}
    raw = []
    for recipe in new.recipes:
        other = before.get((recipe.setting, recipe.label))
        for name in quantities if other else ():
            assert other is not None
            if change := _change(name, other, recipe):
                raw.append(change)
    comparisons = adjusted([change.comparison for change in raw])
    return [replace(change, comparison=one) for change, one in zip(raw, comparisons, strict=True)]


def _change(name: str, old: Recipe, new: Recipe) -> Change | None:
    quantity = QUANTITIES[name]
    before_by_seed = {seed_of(run): run for run in old.runs}
    both = [(before_by_seed[seed_of(run)], run) for run in new.runs if seed_of(run) in before_by_seed]
    pairs = [pair for one, other in both if (pair := quantity.pair(one, other)) is not None]
    if not pairs:
        return None
    differences = [math.log(b / a) if quantity.ratio else b - a for a, b in pairs]
    before, after = (math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True))
    comparison = compare(differences, resolution=_resolution(name, new))
    return Change(new, name, before, after, not any(differences), comparison)


def _resolution(name: str, recipe: Recipe) -> float:
    """Scores are counts: equal changes on a few seeds are known to one answer only."""
    items = [int(score["n"]) for run in recipe.runs for score in run.get("scores") or []]
    return 100.0 / sum(items) * len(recipe.runs) if name in ("score", "divergence") and items else 0.0


def broken(old: Evidence, new: Evidence) -> list[str]:
    """Runs that finished before and whose training or program now fails: worse, whatever number was chosen."""
    before = {(recipe.setting, recipe.label): set(recipe.seeds) for recipe in old.recipes}
    return [
        f"{recipe.name}, seed {seed_of(run)}: finished before, now {run['status']}"
        for recipe in new.recipes
        for run in recipe.failed
        if seed_of(run) in before.get((recipe.setting, recipe.label), set()) and run["status"] in FAILED
    ]


def lost(old: Evidence, new: Evidence) -> list[str]:
    """What finished before and the new study has no word of, so that nobody can say that it did not get worse."""
    after = {(recipe.setting, recipe.label): recipe for recipe in new.recipes}
    lines = []
    for recipe in old.recipes:
        other = after.get((recipe.setting, recipe.label))
        if other is None and recipe.runs:
            lines.append(f"{recipe.name}: not in the new study")
        if other is None:
            continue
        tried = {
            seed_of(run) for run in (*other.runs, *other.failed) if run["status"] == "ok" or run["status"] in FAILED
        }
        if missing := sorted(set(recipe.seeds) - tried):
            lines.append(
                f"{recipe.name}: no finished run of seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            )
        asked, again = (set[tuple[str, int]]().union(*map(values_of, side.runs)) for side in (recipe, other))
        if other.runs and (gone := sorted(asked - again)):
            lines.append(f"{recipe.name}: not scored on {', '.join(f'{task} {shots}-shot' for task, shots in gone)}")
    return lines


def table(found: Sequence[Change]) -> list[Column]:
    """The changes as columns of text."""

    def shown(change: Change) -> str:
        values = (change.comparison.estimate.mean, change.comparison.estimate.low, change.comparison.estimate.high)
        if QUANTITIES[change.quantity].ratio:
            texts = [f"× {math.exp(value):.3f}" for value in values]
        else:
            texts = [f"{value:+.3g}" for value in values]
        return texts[0] if math.isnan(values[1]) else f"{texts[0]} [{texts[1]}, {texts[2]}]"

    return [
        Column("", "recipe", [change.recipe.name for change in found], numeric=False),
        Column("", "number", [change.quantity for change in found], numeric=False),
        Column("", "seeds", [str(change.comparison.estimate.n) for change in found]),
        Column("", "old", [f"{change.old:.4g}" for change in found]),
        Column("", "new", [f"{change.new:.4g}" for change in found]),
        Column("", "change [95%]", [shown(change) for change in found]),
        Column("", "Holm", [p_value(change.comparison.p_different) for change in found]),
        Column("", "outcome", [change.outcome for change in found], numeric=False),
    ]


def main(arguments: Sequence[str]) -> int:
    """Compare two studies.

    Returns 0 when nothing got worse; 1 when a chosen number did, a run now fails, or the new study lacks what the old
    one has; 2 for bad input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lyapft.report compare",
        description="Did a number get worse beyond its noise? Paired over the seeds that both studies have; with one "
        "seed there is no noise to compare with, so nothing is called worse. What the new study lacks is named, and "
        "counts as worse unless --allow-missing is given.",
    )
    parser.add_argument("old", type=Path, help="folder of the study before the change")
    parser.add_argument("new", type=Path, help="folder of the study after it")
    parser.add_argument(
        "--fail-on", default="score", help=f"numbers, with commas between, of {', '.join(QUANTITIES)} (default: score)"
    )
    parser.add_argument("--allow-missing", action="store_true", help="let the new study have fewer recipes or seeds")
    options = parser.parse_args(arguments)
    try:
        return _report(options.old, options.new, _chosen(options.fail_on), options.allow_missing)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _chosen(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in QUANTITIES]
    if unknown or not names:
        raise InputError(f"--fail-on={text}: choose from {', '.join(QUANTITIES)}")
    return names


def _report(old: Path, new: Path, quantities: Sequence[str], allow_missing: bool) -> int:
    sides = [gather([record for _, record in records.load_study(folder)]) for folder in (old, new)]
    found = changes(sides[0], sides[1], quantities)
    failed, missing = broken(*sides), lost(*sides)
    if not found and not failed:
        raise InputError(
            f"{old} and {new} share no recipe with a common seed and {' or '.join(quantities)}: nothing to compare"
        )
    if found:
        print(as_text(table(found), width=160))
    worse = [change for change in found if change.outcome == "worse"]
    one_seed = sum(change.comparison.estimate.n == 1 and change.outcome != "same" for change in found)
    print(f"{len(worse)} of {len(found)} numbers got worse.")
    for line in failed:
        print(f"✗ {line}")
    for line in missing:
        print(f"{'·' if allow_missing else '✗'} {line}")
    if one_seed:
        print(f"{one_seed} changed on their only common seed: run more seeds to tell that from noise.")
    return WORSE if worse or failed or (missing and not allow_missing) else 0
