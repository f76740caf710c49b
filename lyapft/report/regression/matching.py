"""Which recipes of two studies are the same, and what the new study lacks or does otherwise."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lyapft.records import Record
from lyapft.verdict.evidence import Evidence, Recipe, ScoreKey, scores_of, seed_of

# not those that are running or were interrupted
FAILED = ("nonfinite", "loss_scale_underflow", "stopped_by_guard", "oom", "failed")
ABSENT = "(none)"  # a setting that one of the studies did not know


@dataclass(frozen=True)
class Matching:
    """The recipes of two studies side by side.

    `same` are pairs of old and new; `different` says of those that were not compared which settings differ, `changed`
    of those that were, because the settings were given as changed on purpose; `gone` are of the old study alone.
    """

    same: tuple[tuple[Recipe, Recipe], ...]
    different: tuple[str, ...]
    changed: tuple[str, ...]
    gone: tuple[Recipe, ...]


def matching(old: Evidence, new: Evidence, may_change: Sequence[str] = ()) -> Matching:
    """Recipes with the same settings, or that differ only in settings that may have changed.

    Args:
        may_change: names of settings or their groups, such as `kernel` or `trainer.learning_rate`.
    """
    left: dict[tuple[Any, ...], list[tuple[Recipe, Mapping[str, str]]]] = {}
    for recipe in new.recipes:
        left.setdefault(_kind(recipe), []).append((recipe, recipe.settings))
    same, different, changed, gone = [], [], [], []
    # those without any difference first: what is left is paired with the nearest
    unequal = []
    for recipe in old.recipes:
        settings, others = recipe.settings, left.get(_kind(recipe), [])
        place = next((i for i, (_, theirs) in enumerate(others) if theirs == settings), None)
        if place is None:
            unequal.append((recipe, settings))
        else:
            same.append((recipe, others.pop(place)[0]))
    for recipe, settings in unequal:
        others = left.get(_kind(recipe), [])
        if not others:
            gone.append(recipe)
            continue
        place = min(range(len(others)), key=lambda i: len(_differences(settings, others[i][1])))
        other, theirs = others.pop(place)
        found = _differences(settings, theirs)
        line = f"{recipe.name}: {', '.join(f'{name} {a} → {b}' for name, (a, b) in found.items())}"
        if all(_is_among(name, may_change) for name in found):
            same.append((recipe, other))
            changed.append(line)
        else:
            different.append(f"{line}: another recipe, not compared")
    return Matching(tuple(same), tuple(different), tuple(changed), tuple(gone))


def _kind(recipe: Recipe) -> tuple[str, ...]:
    return (*recipe.setting, recipe.precision, recipe.peft)


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    names = [*old, *(name for name in new if name not in old)]
    sides = {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in names}
    return {name: (_short(a), _short(b)) for name, (a, b) in sides.items() if a != b}


def _short(value: str) -> str:
    """A hash of contents by its first characters; other values as they are."""
    return f"{value[:9]}…" if len(value) > 60 else value


def _is_among(name: str, groups: Iterable[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def broken(pairs: Iterable[tuple[Recipe, Recipe]]) -> list[str]:
    """Runs that finished before and whose training or program now fails: worse, whatever number was chosen."""
    return [
        f"{new.name}, seed {seed_of(run)}: finished before, now {run['status']}"
        for old, new in pairs
        for run in new.failed
        if seed_of(run) in old.seeds and run["status"] in FAILED
    ]


def lost(found: Matching) -> list[str]:
    """What finished before and the new study has no word of, so that nobody can say that it did not get worse."""
    lines = [f"{recipe.name}: not in the new study" for recipe in found.gone if recipe.runs]
    for old, new in found.same:
        tried = {seed_of(run) for run in (*new.runs, *new.failed) if run["status"] in ("ok", *FAILED)}
        if missing := sorted(set(old.seeds) - tried):
            lines.append(
                f"{old.name}: no finished run of seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            )
        asked, again = (_scored(side) for side in (old, new))
        if new.runs and (unasked := sorted(asked - again)):
            lines.append(f"{old.name}: not scored on {', '.join(f'{task} {shots}-shot' for task, shots in unasked)}")
    return lines


def _scored(recipe: Recipe) -> set[ScoreKey]:
    return {key for run in recipe.runs for key in scores_of(run).values}


MACHINE = ("lyapft", "git_commit", "torch", "transformers", "peft", "python", "cpu", "device")


def machines(old: Evidence, new: Evidence) -> list[str]:
    """Versions and hardware that differ between the studies: what a change may come from besides the code."""
    sides = [_environments(side.by_id.values()) for side in (old, new)]
    return [
        f"{name}: {' or '.join(before)} → {' or '.join(after)}"
        for name in MACHINE
        if (before := sides[0][name]) != (after := sides[1][name])
    ]


def _environments(runs: Iterable[Record]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {name: set() for name in MACHINE}
    for run in runs:
        for name in MACHINE:
            found[name].add(str((run.get("environment") or {}).get(name))[:40])
    return {name: sorted(values) for name, values in found.items()}
