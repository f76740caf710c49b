"""What a study planned, kept beside its records: so that a report can say what is done, failed and missing.

`runs/STUDY/plan.json` is written when a command starts. A later command on the same study adds its cells; none is
taken away.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from lyapft.errors import NOT_JSON, InputError
from lyapft.plan.cells import CELL, FREE, RERUN, Planned, recipe_of, settings_of
from lyapft.records import LOCKS, RECORD, Record, load_study, save_json
from lyapft.verdict import Outstanding

FILE = "plan.json"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Entry:
    """A planned cell, as plan.json keeps it.

    Attributes:
        key: of the planned cell, the same in every plan.
        recipe: shared by cells that differ in seed, replicate and threads alone; with these three it finds the record.
        role: `cell`, `reference` or `rerun`.
        choices: names of model, data, task, peft and precision.
    """

    key: str
    recipe: str
    role: str
    choices: Mapping[str, str]
    seed: int
    replicate: int
    threads: int


def entry(planned: Planned) -> Entry:
    """What is kept of a planned cell."""
    replicate = int(planned.config.replicate)
    return Entry(planned.key, planned.recipe, planned.role, planned.choices, planned.seed, replicate, planned.threads)


def save(planned: Iterable[Planned]) -> None:
    """Write each study's plan into its folder, beside what earlier commands planned there."""
    by_study: dict[Path, list[Entry]] = {}
    for cell in planned:
        by_study.setdefault(Path(cell.config.runs) / cell.config.study.name, []).append(entry(cell))
    for folder, entries in by_study.items():
        lock = folder / LOCKS / "plan.lock"  # others may plan the same study: each adds to what the one before left
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            known = {one.key: one for one in load(folder)}
            for own in entries:
                if own.key not in known or own.role == CELL:
                    known[own.key] = own
            save_json(folder / FILE, [asdict(one) for one in known.values()])


def load(folder: Path) -> list[Entry]:
    """The plan of a study; empty where no command has planned it.

    Raises:
        InputError: a file that is not a plan.
    """
    path = folder / FILE
    try:
        return [_entry(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (*NOT_JSON, TypeError) as error:
        raise InputError(f"{path} is not a plan ({error}): delete it; the next command writes it anew") from None


def _entry(**kept: Any) -> Entry:
    made = Entry(**kept)
    texts, counts = (made.key, made.recipe, made.role), (made.seed, made.replicate, made.threads)
    whole = all(isinstance(text, str) for text in texts) and all(isinstance(count, int) for count in counts)
    if not whole or not isinstance(made.choices, dict):
        raise TypeError(f"{made!r:.80} is no planned cell")
    return made


def records_in(folder: Path) -> list[Record]:
    """The records of a study, none where it has not begun; those that cannot be read are named in a warning."""
    if not any(folder.glob(f"*/{RECORD}")):
        return []
    try:
        return [record for _, record in load_study(folder)]
    except InputError:  # none of them can be read
        return []


def whole(records: Iterable[Record]) -> list[Record]:
    """Without those that are too damaged to say what they are of."""
    return [record for record in records if "runs_as" in (record.get("config") or {})]


def states(entries: Sequence[Entry], records: Iterable[Record]) -> dict[str, str]:
    """The status of each planned cell by its key: that of its record, or `not run`."""
    found: dict[tuple[object, ...], str] = {}
    for record, recipe in _with_recipes(records) if entries else ():
        config = record["config"]
        cell = recipe, config.get("seed"), config.get("replicate"), config["runs_as"]["threads"]
        if found.get(cell) != "ok":  # the same settings on other contents of files: one that is ok counts
            found[cell] = str(record["status"])
    return {one.key: found.get((one.recipe, one.seed, one.replicate, one.threads), NOT_RUN) for one in entries}


def _with_recipes(records: Iterable[Record]) -> Iterator[tuple[Record, str]]:
    """The records that are whole, each with its recipe, which is made out once for configs that share their parts."""
    known: dict[tuple[object, ...], str] = {}
    for record in whole(records):  # a list, so that all of them are alive and no identity stands for two
        config = record["config"]
        parts = tuple((name, id(part)) for name, part in config.items() if name not in FREE)
        if parts not in known:
            known[parts] = recipe_of(settings_of(config))
        yield record, known[parts]


def summary(states_by_key: Mapping[str, str]) -> str:
    """One line on how far a study is.

    >>> summary({"a": "ok", "b": "failed", "c": "not run"})
    '3 planned: 1 ok, 1 failed, 1 not run'
    """
    counts = Counter(states_by_key.values())
    order = sorted(counts, key=lambda status: (status != "ok", status == NOT_RUN, status))
    return f"{len(states_by_key)} planned: {', '.join(f'{counts[status]} {status}' for status in order)}"


def outstanding(entries: Sequence[Entry], records: Sequence[Record]) -> list[Outstanding]:
    """The planned cells that have no record yet, as the verdict takes them."""
    found = states(entries, records)
    left = [one for one in entries if found[one.key] == NOT_RUN]
    alike: dict[str, set[str]] = {}
    for record, recipe in _with_recipes(records) if left else ():
        alike.setdefault(recipe, set()).add(str(record["id"]))
    same = {recipe: frozenset(own) for recipe, own in alike.items()}
    return [Outstanding(one.choices, one.seed, same.get(one.recipe, frozenset()), one.role == RERUN) for one in left]
