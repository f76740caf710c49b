"""Records of a study as a report shows them: named, grouped and with gaps where a cell has not got that far."""

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lyapft import records
from lyapft.divergence import CORRECTNESS, Flips, item_flips
from lyapft.errors import NOT_JSON, InputError
from lyapft.records import Record, divergence_entry, is_seedless
from lyapft.report.compact import Reader

COUNTERPARTS = {
    "paper": "full-precision fine-tuning of all weights",  # the paper's reference
    "precision_only": "full-precision fine-tuning with the same peft",
}
COUNTERPARTS_SHORT = {"paper": "fp32 full", "precision_only": "fp32 same peft"}
WHOLE_STUDY = 1000  # cells: a study up to this size is shown cell by cell
EXCERPT = 300  # of a larger one, about so many cells are
NO_STEPS = pd.DataFrame()
# overrides that no label needs: it names them anyway, or they change no number
NOT_IN_LABELS = frozenset(
    {
        "seed", "replicate", "study", "study.name", "study.noise_floor", "study.noise_floor_seeds", "logger",
        "reference", "runs", "probe", "trainer.progress", "trainer.record_every_s",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """One record with what lies beside it in its folder, read for the cells that are shown one by one.

    `kind` names what a cell is apart from its seed; cells of one kind are the seeds of one bar. `facet` is the panel
    that it shares with the cells that differ from it in precision and peft only.
    """

    record: Record
    label: str
    kind: str
    facet: str
    steps: pd.DataFrame = field(default_factory=lambda: NO_STEPS)
    items: pd.DataFrame | None = None
    stability: pd.DataFrame | None = None

    @property
    def ok(self) -> bool:
        """Whether the cell ended well."""
        return bool(self.record["status"] == "ok")


@dataclass(frozen=True)
class Study:
    """The cells of a study in the order of a report, and what could not be read.

    `shown` are those that figures and tables show one by one: all, or of a large study an excerpt.
    """

    name: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    experiments: tuple[dict[str, Any], ...] = ()
    shown: tuple[Cell, ...] = ()

    def flips(self, cell: Cell, counterpart: str) -> Flips | None:
        """Item-level flips of a cell against one of its references: from its record, or where both have their items."""
        entry = divergence_entry(cell.record, counterpart)
        if entry is None or entry.get("status") != "ok":
            return None
        if entry.get("flips"):
            return Flips(**entry["flips"])
        references = [other for other in self.shown if other.record["id"] == entry.get("reference_id")]
        if cell.items is None or not references or references[0].items is None:
            return None
        return item_flips(cell.items, references[0].items)


def read(record: Record, *keys: str) -> Any:
    """A nested field of a record, or None where the cell has not written it (yet)."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def choice(record: Record, group: str) -> str:
    """The chosen name in a config group."""
    return str((record.get("choices") or {}).get(group) or "?")


def facet(record: Record, group_by: Sequence[str]) -> str:
    """The panel of a cell: its model, and whatever other groups vary in this study."""
    return " · ".join(choice(record, group) for group in group_by)


def facet_groups(all_records: Sequence[Record]) -> list[str]:
    """Config groups that separate panels: the model always, data and task only where the study has several."""
    varying = [group for group in ("data", "task") if len({choice(record, group) for record in all_records}) > 1]
    return ["model", *varying]


def _own_overrides(record: Record) -> tuple[str, ...]:
    """Command-line overrides other than the choices that a label names anyway."""
    choices = record.get("choices") or {}
    named = [(text, text.split("=")[0].lstrip("+~")) for text in map(str, record.get("overrides") or [])]
    return tuple(sorted(text for text, name in named if name not in NOT_IN_LABELS and name not in choices))


def kinds(all_records: Sequence[Record]) -> list[str]:
    """Names of the cells apart from their seeds: facet, precision, peft, and overrides that some cell lacks."""
    groups = facet_groups(all_records)
    own = [_own_overrides(record) for record in all_records]
    shared = set.intersection(*(set(overrides) for overrides in own)) if own else set()
    names = []
    for record, overrides in zip(all_records, own, strict=True):
        parts = [facet(record, groups), choice(record, "precision"), choice(record, "peft")]
        parts += [text for text in overrides if text not in shared]
        parts += [f"replicate {record['replicate']}"] if record.get("replicate") else []
        names.append(" · ".join(parts))
    return names


def labels(all_records: Sequence[Record]) -> list[str]:
    """One short, unique name per record: its kind and seed, with the identity added where two would be alike."""
    return _labels(all_records, kinds(all_records))


def _labels(all_records: Sequence[Record], kinds_: Sequence[str]) -> list[str]:
    names = [f"{kind} · s{record.get('seed', '?')}" for kind, record in zip(kinds_, all_records, strict=True)]
    counts = Counter(names)
    ids = [str(record.get("id", "?"))[:6] for record in all_records]
    return [name if counts[name] == 1 else f"{name} · {ident}" for name, ident in zip(names, ids, strict=True)]


def _order(record: Record) -> tuple[Any, ...]:
    """References first within a panel, then by precision, peft and seed."""
    models = [choice(record, group) for group in ("model", "data", "task")]
    precision, peft = choice(record, "precision"), choice(record, "peft")
    return (
        *models,
        precision != "fp32",
        precision,
        peft != "none",
        peft,
        record.get("seed", 0),
        record.get("replicate", 0),
    )


def ordered(all_records: Sequence[Record]) -> list[Record]:
    """Records in the order of tables and legends."""
    return sorted(all_records, key=_order)


def load_study(folder: Path) -> Study:
    """Every cell of a study folder, however far each has got.

    A record that cannot be read is named in `notes` and does not hide the others.

    Raises:
        InputError: the folder is missing, or holds no readable record.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder of a study, runs/STUDY")
    if (folder / records.RECORD).exists():
        raise InputError(f"{folder} is the folder of one run: give its study, {folder.resolve().parent}")
    notes: list[str] = []
    homes = _records_in(folder, notes)
    if not homes:
        unreadable = f"; unreadable: {'; '.join(notes)}" if notes else ""
        raise InputError(
            f"{folder} holds no readable record (looked for */{records.RECORD}){unreadable}. "
            "Give the folder of a study, runs/STUDY, after `python train.py` has started its first cell"
        )
    found = ordered([record for _, record in homes])
    folders = {id(record): home for home, record in homes}
    groups, names = facet_groups(found), kinds(found)
    cells = [
        Cell(record, label, sys.intern(kind), sys.intern(facet(record, groups)))
        for record, label, kind in zip(found, _labels(found, names), names, strict=True)
    ]
    chosen = {id(cell.record) for cell in excerpt(cells)}
    answers = not all(_has_answers(cell.record) for cell in cells if id(cell.record) in chosen)
    cells = [
        _with_tables(cell, Path(folders[id(cell.record)]), id(cell.record) in chosen, answers, notes) for cell in cells
    ]
    shown = tuple(cell for cell in cells if id(cell.record) in chosen)
    experiments = _experiments(folder, notes)
    return Study(str(found[0].get("study") or folder.name), tuple(cells), tuple(notes), experiments, shown)


def excerpt(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The cells to show one by one: all, or of a large study the kinds that lie furthest from full precision.

    Kinds stay whole, so that what is said of their seeds holds; of one with very many seeds the first are taken.
    """
    if len(cells) <= WHOLE_STUDY:
        return cells
    furthest: dict[str, float] = {}
    own: dict[str, list[Cell]] = {}
    for cell in cells:
        entry = divergence_entry(cell.record, "paper") or {}
        furthest[cell.kind] = max(furthest.get(cell.kind, 0.0), float(entry.get("mean_abs_points") or 0.0))
        own.setdefault(cell.kind, []).append(cell)
    chosen: list[Cell] = []
    for kind in sorted(own, key=lambda kind: -furthest[kind]):
        if chosen and len(chosen) + len(own[kind]) > EXCERPT:
            break
        chosen += own[kind][:EXCERPT]
    return chosen


def _records_in(folder: Path, notes: list[str]) -> list[tuple[str, Record]]:
    """Folder and record of every cell, by folder name; equal parts of records are kept once."""
    found: list[tuple[str, Record]] = []
    reader = Reader()
    for home in sorted(entry.path for entry in os.scandir(folder) if entry.is_dir()):
        try:
            found.append((home, records.load(home, reader.decode)))
        except records.NoRecord:
            continue
        except InputError as error:
            notes.append(str(error))
    return found


def _has_answers(record: Record) -> bool:
    """Whether a record says all that the answers behind its comparisons would say."""
    entries = [entry for entry in record.get("divergence") or () if entry.get("status") == "ok"]
    return all(entry.get("flips") and entry.get("answer_shift") for entry in entries)


def _with_tables(cell: Cell, home: Path, shown: bool, answers: bool, notes: list[str]) -> Cell:
    """A cell with the tables of its folder, the answers to single items only where they are asked for.

    A base, which is one cell whatever the seed, is compared by its answers: it comes with what these comparisons need
    of them, shown or not.
    """
    items = None
    if (shown and answers) or is_seedless(cell.record):
        items = _table(home / records.ITEMS, notes, None if shown and answers else CORRECTNESS)
    if not shown:
        return cell if items is None else replace(cell, items=items)
    steps = _table(home / records.STEPS, notes)
    stability = _table(home / records.STABILITY, notes)
    return replace(cell, steps=NO_STEPS if steps is None else steps, items=items, stability=stability)


def _experiments(folder: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    found = []
    for path in sorted((folder / records.EXPERIMENTS).glob("*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, *NOT_JSON) as error:
            notes.append(f"{path.parent.name}/{path.name} cannot be read ({str(error).splitlines()[0]}): left out")
    return tuple(found)


def _table(path: Path, notes: list[str], columns: Sequence[str] | None = None) -> pd.DataFrame | None:
    """A Parquet table, or None (with a note where a file is there but broken)."""
    if not path.exists():
        return None
    try:
        return pd.read_parquet(path, columns=None if columns is None else list(columns))
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        notes.append(f"{path.parent.name}/{path.name} cannot be read ({str(error).splitlines()[0]}): left out")
        return None
