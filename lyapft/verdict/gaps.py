"""What a study does not have: runs that failed, are not there yet, or have no counterpart to be compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lyapft.records import Record, divergence_entry
from lyapft.verdict.evidence import PAPER, Evidence, Recipe, seed_of

NOT_RUN, NO_COUNTERPART, NO_RERUN = "not run", "no counterpart", "rerun not run"


@dataclass(frozen=True)
class Gap:
    """One seed of one recipe that the tables lack, and why: a status, `not run` or `no counterpart`."""

    recipe: Recipe
    seed: int
    why: str
    error: str = ""


@dataclass(frozen=True)
class Outstanding:
    """A run that the study plans and has no record of yet.

    Attributes:
        choices: names of model, data, task, precision and peft.
        alike: identities of records of the same recipe, as far as there are any.
        rerun: for the noise floor.
    """

    choices: Mapping[str, str]
    seed: int
    alike: frozenset[str] = frozenset()
    rerun: bool = False


def gaps(evidence: Evidence, outstanding: Sequence[Outstanding] = ()) -> list[Gap]:
    """Every seed that some recipe of a setting has and another lacks, in the order of the recipes; then what else the
    study plans."""
    found = _uneven(evidence)
    known = {(*gap.recipe.setting, gap.recipe.label, gap.seed) for gap in found}
    by_run = {
        str(run["id"]): place
        for place, recipe in enumerate(evidence.recipes if outstanding else ())
        for run in (*recipe.runs, *recipe.reruns, *recipe.failed)
    }
    for planned in outstanding:
        places = [by_run[run] for run in planned.alike if run in by_run]
        recipe = evidence.recipes[min(places)] if places else _unknown(planned)
        if planned.rerun:
            found.append(Gap(recipe, planned.seed, NO_RERUN))
        elif (*recipe.setting, recipe.label, planned.seed) not in known:
            found.append(Gap(recipe, planned.seed, NOT_RUN))
    order = {(recipe.setting, recipe.label): place for place, recipe in enumerate(evidence.recipes)}

    def place(gap: Gap) -> tuple[int, tuple[str, str, str], str, str, int]:
        setting, label = gap.recipe.setting, gap.recipe.label
        return order.get((setting, label), len(order)), setting, label, gap.why, gap.seed

    return sorted(found, key=place)


def _unknown(planned: Outstanding) -> Recipe:
    """A recipe of which no record is there yet."""
    own = dict(planned.choices)
    label = f"{own['precision']} · {own['peft']}"
    return Recipe(own["model"], own["data"], own["task"], own["precision"], own["peft"], label, ())


def _uneven(evidence: Evidence) -> list[Gap]:
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for recipe in evidence.recipes:
        tried = [*recipe.runs, *recipe.failed]
        seeds.setdefault(recipe.setting, set()).update(seed_of(run) for run in tried if not run.get("replicate"))
    return [gap for recipe in evidence.recipes for gap in _gaps(recipe, sorted(seeds[recipe.setting]))]


def _gaps(recipe: Recipe, seeds: list[int]) -> list[Gap]:
    failed = {seed_of(run): run for run in recipe.failed if not run.get("replicate")}
    finished = {seed_of(run): run for run in recipe.runs}
    found = [
        Gap(recipe, seed_of(run), f"rerun {run['status']}", str((run.get("error") or {}).get("message", "")))
        for run in recipe.failed
        if run.get("replicate") or seed_of(run) in finished  # on another number of threads
    ]
    for seed in seeds:
        if seed in finished:
            if not _comparable(finished[seed]):
                found.append(Gap(recipe, seed, NO_COUNTERPART))
        elif seed in failed:
            error = failed[seed].get("error") or {}
            found.append(Gap(recipe, seed, str(failed[seed]["status"]), str(error.get("message", ""))))
        else:
            found.append(Gap(recipe, seed, NOT_RUN))
    return found


def _comparable(run: Record) -> bool:
    return (divergence_entry(run, PAPER) or {}).get("status") in ("ok", "self")
