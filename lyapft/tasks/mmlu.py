"""MMLU: four lettered choices per question, 57 subjects, shots from each subject's own development rows.

Source: Hendrycks et al. 2021 (arXiv 2009.03300); the text of a query is that of lm-eval's task `mmlu`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lyapft.errors import InputError
from lyapft.tasks.base import Query, Task, content_hash, first_n, refuse_bad_rows
from lyapft.tasks.reading import existing, load_by_name, read_csv

LETTERS = "ABCD"
HUB = ("cais/mmlu", "all")
SHOT_RULE = "the first n rows of the subject's dev file"


@dataclass(frozen=True, slots=True)
class Row:
    """One question; `gold` indexes `choices`."""

    question: str
    choices: tuple[str, ...]
    gold: int

    def prompt(self) -> str:
        """The question up to where the letter belongs."""
        lines = [
            self.question.strip(),
            *(f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=True)),
            "Answer:",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Subject:
    """Rows of one subject. `test` keeps each row's position in its file; `bad` describes the rows left out."""

    name: str
    dev: tuple[Row, ...]
    test: tuple[tuple[int, Row], ...]
    bad: tuple[str, ...]
    total: int


@dataclass
class Mmlu(Task):
    """MMLU from its published layout: PATH/dev/SUBJECT_dev.csv and PATH/test/SUBJECT_test.csv, six columns, no header.

    Args:
        path: the folder; None loads `cais/mmlu` by name.
        subjects: which; None for all that are there.
        limit: test rows per subject, as in lm-eval.
    """

    subjects: list[str] | None = None

    def __post_init__(self) -> None:
        Task.__post_init__(self)
        self.subjects = None if self.subjects is None else list(self.subjects)

    @cached_property
    def _subjects(self) -> list[Subject]:
        read = self._from_hub() if self.path is None else self._from_folder(existing(self.path, "folder"))
        total, bad = sum(s.total for s in read), [f"{s.name}: {b}" for s in read for b in s.bad]
        refuse_bad_rows(bad, total, self.max_bad_fraction, self.path or HUB[0])
        for subject in read:
            if len(subject.dev) < max(self.shots):
                raise InputError(
                    f"task.shots={self.shots}: subject {subject.name} has only {len(subject.dev)} dev rows to show. "
                    f"Use at most {len(subject.dev)} shots."
                )
        return read

    def _from_folder(self, folder: Path) -> list[Subject]:
        names = sorted(p.name.removesuffix("_test.csv") for p in folder.glob("test/*_test.csv"))
        if not names:
            raise InputError(
                f"{folder}: no test/SUBJECT_test.csv. Expected the layout dev/*_dev.csv and test/*_test.csv."
            )
        read = []
        for name in _chosen(self.subjects, names):
            files = [folder / split / f"{name}_{split}.csv" for split in ("dev", "test")]
            if max(self.shots) > 0 and not files[0].exists():
                raise InputError(
                    f"{files[0]}: no such file; shots come from it. Add it, or score without shots: task.shots=[0]."
                )
            dev, test = [[_row(f, n, fields) for n, fields in read_csv(f, 6)] if f.exists() else [] for f in files]
            read.append(_subject(name, dev, test))
        return read

    def _from_hub(self) -> list[Subject]:
        splits = {split: load_by_name(*HUB, split) for split in ("dev", "test")}
        grouped: dict[str, dict[str, list[Row]]] = {}
        for split, rows in splits.items():
            for row in rows:
                parsed = Row(row["question"], tuple(row["choices"]), int(row["answer"]))
                grouped.setdefault(row["subject"], {"dev": [], "test": []})[split].append(parsed)
        return [
            _subject(name, grouped[name]["dev"], grouped[name]["test"])
            for name in _chosen(self.subjects, sorted(grouped))
        ]

    def queries(self, shots: int) -> list[Query]:
        """Queries of all subjects, in the order of their names."""
        asked = []
        for subject in self._subjects:
            shown = first_n(subject.dev, shots)
            topic = subject.name.replace("_", " ")
            head = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
            head += "".join(f"{row.prompt()} {LETTERS[row.gold]}\n\n" for row in shown)
            for item, row in subject.test[: self.limit]:
                contexts = (head + row.prompt(),) * len(LETTERS)
                asked.append(
                    Query(self.name, item, shots, contexts, tuple(f" {x}" for x in LETTERS), row.gold, subject.name)
                )
        return asked

    def fingerprint(self) -> str:
        """sha256 of the questions that are scored and of those that may be shown."""
        rows = [
            [s.name, [_plain(r) for r in s.dev[: max(self.shots)]], [[i, _plain(r)] for i, r in s.test[: self.limit]]]
            for s in self._subjects
        ]
        return content_hash("mmlu", SHOT_RULE, rows)

    def record(self) -> dict[str, Any]:
        """Name, hash, counts and the shot rule."""
        return {
            "name": self.name,
            "hash": self.fingerprint(),
            "rows": sum(len(s.test[: self.limit]) for s in self._subjects),
            "rows_bad": sum(len(s.bad) for s in self._subjects),
            "subsets": [s.name for s in self._subjects],
            "shot_rule": SHOT_RULE,
        }


def _chosen(wanted: list[str] | None, present: list[str]) -> list[str]:
    if unknown := sorted(set(wanted or []) - set(present)):
        raise InputError(
            f"task.subjects: {', '.join(unknown)} not among the subjects here. Choose from {', '.join(present)}."
        )
    return present if wanted is None else [name for name in present if name in wanted]


def _row(path: Path, line: int, fields: list[str]) -> Row:
    *text, answer = fields
    if answer not in tuple(LETTERS):
        hint = " The published files have no header row: remove it." if line == 1 and answer.lower() == "answer" else ""
        raise InputError(f"{path}, line {line}: the answer is {answer!r}, expected one of A, B, C, D.{hint}")
    return Row(text[0], tuple(text[1:]), LETTERS.index(answer))


def _subject(name: str, dev: list[Row], test: list[Row]) -> Subject:
    """Leave out rows without a question; an empty choice stays, as in lm-eval."""
    bad = [f"row {i + 1} of test: the question is empty" for i, row in enumerate(test) if not row.question.strip()]
    kept = tuple((i, row) for i, row in enumerate(test) if row.question.strip())
    return Subject(name, tuple(row for row in dev if row.question.strip()), kept, tuple(bad), len(test))


def _plain(row: Row) -> list[Any]:
    return [row.question, list(row.choices), row.gold]
