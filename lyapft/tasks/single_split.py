"""Tasks of one file: every row is scored, and the rows before it show how, never the scored one itself."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, ClassVar

from lyapft.errors import InputError
from lyapft.tasks.base import Query, Task, content_hash, first_n, refuse_bad_rows
from lyapft.tasks.reading import existing, load_by_name, read_jsonl, require_columns

SHOT_RULE = "the first n rows of the same file, every copy of the scored row left out"


@dataclass(frozen=True, slots=True)
class Item:
    """One row, ready to be asked.

    `contexts[i] + continuations[i]` is choice i without shots; `solved` is the row as a shot. `lengths` are the
    characters of the choices where the task reports acc_norm, else empty.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    solved: str
    lengths: tuple[int, ...] = ()


def answers_after(prompt: str, choices: Sequence[str], gold: int) -> Item:
    """The item of a task that scores each choice, after one space, behind the same prompt (lm-eval's layout).

    >>> answers_after("Question: 1 + 1?\\nAnswer:", ["two", "three"], 0).solved
    'Question: 1 + 1?\\nAnswer: two\\n\\n'
    """
    continuations = tuple(f" {choice}" for choice in choices)
    solved = f"{prompt}{continuations[gold]}\n\n"
    return Item((prompt,) * len(choices), continuations, gold, solved, tuple(map(len, choices)))


@dataclass
class SingleSplit(Task):
    """A task whose rows and shots come from one jsonl file, or from one split of a data set by name.

    Shots are the first rows of the file without the scored one (`first_n`). lm-eval's own default draws them from the
    training split at random; to compare, run it with `sampler: first_n` and both `test_split` and `fewshot_split` set
    to the one split.

    Args:
        path: the file; None loads the published split by name.
    """

    KIND: ClassVar[str]  # what the format is called; part of the fingerprint
    COLUMNS: ClassVar[tuple[str, ...]]

    @abstractmethod
    def hub(self) -> tuple[str, str | None, str]:
        """Data set, configuration and split by name: those that lm-eval scores."""

    @abstractmethod
    def fault(self, fields: dict[str, Any]) -> str | None:
        """Why a row cannot be scored; None when it can."""

    @abstractmethod
    def item(self, fields: dict[str, Any]) -> Item | str:
        """A row without a fault as an item, or what is wrong with its answer, which stops the run."""

    def read(self) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
        """(where the rows come from, rows with their line numbers)."""
        if self.path is not None:
            return self.path, read_jsonl(existing(self.path, "file"), self.COLUMNS)
        rows = list(enumerate(load_by_name(*self.hub()), start=1))
        require_columns(rows[0][1], self.COLUMNS, self.hub()[0])
        return self.hub()[0], rows

    @cached_property
    def _rows(self) -> tuple[list[tuple[int, Item]], list[str]]:
        """(usable rows with their position in the file, what is wrong with the others)."""
        where, raw = self.read()
        good, bad = [], []
        for position, (number, fields) in enumerate(raw):
            if fault := self.fault(fields):
                bad.append(f"line {number}: {fault}")
                continue
            made = self.item(fields)
            if isinstance(made, str):
                raise InputError(f"{where}, line {number}: {made}")
            good.append((position, made))
        refuse_bad_rows(bad, len(raw), self.max_bad_fraction, where)
        if len(good) <= max(self.shots):
            raise InputError(
                f"task.shots={self.shots}: {where} has {len(good)} usable rows, too few to show {max(self.shots)} "
                "beside the scored one. Use fewer shots."
            )
        return good, bad

    def queries(self, shots: int) -> list[Query]:
        """One query per row, each behind the same first rows of the file."""
        good, _ = self._rows
        pool = [item for _, item in good]
        return [self._query(position, item, pool, shots) for position, item in good[: self.limit]]

    def _query(self, position: int, item: Item, pool: Sequence[Item], shots: int) -> Query:
        shown = first_n(pool, shots, excluded=item)
        if len(shown) < shots:
            raise InputError(
                f"task.shots={self.shots}: fewer than {shots} rows differ from row {position + 1}. "
                "Use fewer shots or more rows."
            )
        head = "".join(other.solved for other in shown)
        contexts = tuple(head + context for context in item.contexts)
        return Query(self.name, position, shots, contexts, item.continuations, item.gold, self.name, item.lengths)

    def fingerprint(self) -> str:
        """sha256 of every usable row: each is scored or may be shown."""
        good, _ = self._rows
        return content_hash(self.KIND, SHOT_RULE, [[position, *astuple(item)] for position, item in good])

    def record(self) -> dict[str, Any]:
        """Name, hash, counts and the shot rule."""
        good, bad = self._rows
        return {
            "name": self.name,
            "hash": self.fingerprint(),
            "rows": len(good[: self.limit]),
            "rows_bad": len(bad),
            "subsets": [self.name],
            "shot_rule": SHOT_RULE,
        }


def not_text(fields: dict[str, Any], columns: Sequence[str]) -> str | None:
    """The first of the columns that is no text, as a fault; None when all are.

    >>> not_text({"goal": None}, ["goal"])
    'goal is None, expected text'
    """
    for column in columns:
        if not isinstance(fields[column], str):
            return f"{column} is {fields[column]!r}, expected text"
    return None


def bad_choices(choices: Any) -> str | None:
    """Why a list cannot be the choices of a question: fewer than two, or one that is empty or no text."""
    if not isinstance(choices, list) or len(choices) < 2:
        return f"the choices are {choices!r:.80}, expected a list of at least two"
    if any(not isinstance(choice, str) or not choice.strip() for choice in choices):
        return "a choice is empty or no text"
    return None
