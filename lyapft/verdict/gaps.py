"""What a study does not have: runs that failed, are not there yet, or have no counterpart to be compared with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lyapft.records import Record, divergence_entry
from lyapft.verdict.evidence import PAPER, PRECISION_ONLY, Evidence, Recipe, is_rerun, seed_of
from lyapft.verdict.recipes import Row
from lyapft.verdict.words import joined, scored

NOT_RUN, NO_COUNTERPART, NO_RERUN = "not run", "no counterpart", "rerun not run"
NO_SAME_PEFT = "no counterpart with the same peft"
NO_PAIR = "some scores without a pair"


@dataclass(frozen=True)
class Gap:
    """A seed of a recipe that the tables lack something of, and why: a status, `not run`, no counterpart, no pair."""

    recipe: Recipe
    seed: int
    why: str
    error: str = ""
    kind: str = ""  # what it is counted as; empty is `why`


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


def gaps(evidence: Evidence, outstanding: Sequence[Outstanding] = (), rows: Sequence[Row] = ()) -> list[Gap]:
    """Every seed that some recipe of a setting has and another lacks, in the order of the recipes; then what else the
    study plans.

    Args:
        rows: against either kind of counterpart; scores that only some seeds or one side of a pair have are gaps.
    """
    found = _uneven(evidence)
    found += [gap for row in rows for gap in _unpaired(row)]
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
        seeds.setdefault(recipe.setting, set()).update(seed_of(run) for run in tried if not is_rerun(run))
    return [gap for recipe in evidence.recipes for gap in _gaps(recipe, sorted(seeds[recipe.setting]))]


def _gaps(recipe: Recipe, seeds: list[int]) -> list[Gap]:
    failed = recipe.failed_seeds()
    finished = {seed_of(run): run for run in recipe.runs}
    found = [
        Gap(recipe, seed_of(run), f"rerun {_status(run)}", str((run.get("error") or {}).get("message", "")))
        for run in recipe.failed_reruns()
    ]
    for seed in seeds:
        if seed in finished:
            if why := _without_counterpart(finished[seed]):
                found.append(Gap(recipe, seed, why))
        elif seed in failed:
            error = failed[seed].get("error") or {}
            found.append(Gap(recipe, seed, _status(failed[seed]), str(error.get("message", ""))))
        elif not recipe.seedless:
            found.append(Gap(recipe, seed, NOT_RUN))
    return found


def _status(run: Record) -> str:
    """How a run ended; its record does not know whether anybody still works on one that has not."""
    return "not finished" if run["status"] == "running" else str(run["status"])


def _without_counterpart(run: Record) -> str | None:
    """What a finished run cannot be compared with."""
    for kind, why in ((PAPER, NO_COUNTERPART), (PRECISION_ONLY, NO_SAME_PEFT)):
        if (divergence_entry(run, kind) or {}).get("status") not in ("ok", "self"):
            return why
    return None


def _unpaired(row: Row) -> Iterator[Gap]:
    """Scores that some pair of the row has and another lacks, or that one side of a pair has alone."""
    if row.counterpart == PRECISION_ONLY and row.recipe.peft == "none":
        return  # both counterparts are one
    known = dict.fromkeys(key for pair in row.pairs for key in (*pair.signed, *pair.unpaired))
    beside = " with full precision of the same peft" if row.counterpart == PRECISION_ONLY else ""
    for pair in row.pairs:
        if lost := [key for key in known if key not in pair.signed]:
            why = f"no pair{beside} of {joined([scored(key) for key in lost])}"
            yield Gap(row.recipe, pair.seed, why, kind=NO_PAIR)
