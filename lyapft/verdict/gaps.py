"""What a study does not have: runs that failed, are not there yet, or have no counterpart to be compared with."""

from dataclasses import dataclass

from lyapft.records import Record, divergence_entry
from lyapft.verdict.evidence import PAPER, Evidence, Recipe, seed_of

NOT_RUN, NO_COUNTERPART = "not run", "no counterpart"


@dataclass(frozen=True)
class Gap:
    """One seed of one recipe that the tables lack, and why: a status, `not run` or `no counterpart`."""

    recipe: Recipe
    seed: int
    why: str
    error: str = ""


def gaps(evidence: Evidence) -> list[Gap]:
    """Every seed that some recipe of a setting has and another lacks, in the order of the recipes."""
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for recipe in evidence.recipes:
        tried = [*recipe.runs, *recipe.failed]
        seeds.setdefault(recipe.setting, set()).update(seed_of(run) for run in tried if not run.get("replicate"))
    return [gap for recipe in evidence.recipes for gap in _gaps(recipe, sorted(seeds[recipe.setting]))]


def _gaps(recipe: Recipe, seeds: list[int]) -> list[Gap]:
    failed = {seed_of(run): run for run in recipe.failed if not run.get("replicate")}
    finished = {seed_of(run): run for run in recipe.runs}
    found = []
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
