"""WinoGrande: which of two names fills the blank, judged by the likelihood of what follows it (partial evaluation).

Source: Sakaguchi et al. 2019 (arXiv 1907.10641); partial evaluation: Trinh & Le 2018 (arXiv 1806.02847). The text of a
query is that of lm-eval's task `winogrande`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lyapft.errors import InputError
from lyapft.tasks.base import Query, Task, content_hash, first_n, refuse_bad_rows
from lyapft.tasks.reading import existing, load_by_name, read_jsonl, require_columns

COLUMNS = ("sentence", "option1", "option2", "answer")
HUB = ("allenai/winogrande", "winogrande_xl", "validation")
SHOT_RULE = "the first n rows of the same file, every copy of the scored row left out"


@dataclass(frozen=True, slots=True)
class Row:
    """A sentence cut at its blank."""

    before: str
    after: str
    options: tuple[str, str]
    gold: int

    def filled(self, option: int) -> str:
        """The sentence up to and with the option."""
        return self.before + self.options[option]

    def solved(self) -> str:
        """The row as a shot."""
        return f"{self.filled(self.gold)} {self.after}\n\n"


@dataclass
class Winogrande(Task):
    """WinoGrande from one jsonl file: sentence with one `_`, option1, option2, answer "1" or "2".

    Both options are put in the blank, and the one after which the rest of the sentence is likelier is chosen. There is
    one split, so shots come from the file that is scored: `first_n` without the scored row. lm-eval's own default draws
    from the training split at random; to compare, run it with `sampler: first_n` and both `test_split` and
    `fewshot_split` set to the one split.

    Args:
        path: the file; None loads the validation split of `allenai/winogrande` by name.
    """

    @cached_property
    def _rows(self) -> tuple[list[tuple[int, Row]], list[str], int]:
        """(usable rows with their position), what is wrong with the others, how many in all."""
        if self.path is None:
            where, raw = HUB[0], list(enumerate(load_by_name(*HUB), start=1))
            require_columns(raw[0][1], COLUMNS, where)
        else:
            where, raw = self.path, read_jsonl(existing(self.path, "file"), COLUMNS)
        good, bad = [], []
        for position, (number, fields) in enumerate(raw):
            if fault := _fault(fields):
                bad.append(f"line {number}: {fault}")
            else:
                good.append((position, _row(fields, f"{where}, line {number}")))
        refuse_bad_rows(bad, len(raw), self.max_bad_fraction, where)
        if len(good) <= max(self.shots):
            raise InputError(
                f"task.shots={self.shots}: {where} has {len(good)} usable rows, too few to show {max(self.shots)} "
                "beside the scored one. Use fewer shots."
            )
        return good, bad, len(raw)

    def queries(self, shots: int) -> list[Query]:
        """One query per row; the two contexts differ, the continuation is shared."""
        good, _, _ = self._rows
        pool = [row for _, row in good]
        asked = []
        for position, row in good[: self.limit]:
            shown = first_n(pool, shots, excluded=row)
            if len(shown) < shots:
                raise InputError(
                    f"task.shots={self.shots}: fewer than {shots} rows differ from row {position + 1}. "
                    "Use fewer shots or more rows."
                )
            head = "".join(other.solved() for other in shown)
            contexts = (head + row.filled(0), head + row.filled(1))
            asked.append(Query(self.name, position, shots, contexts, (f" {row.after}",) * 2, row.gold, self.name))
        return asked

    def fingerprint(self) -> str:
        """sha256 of every usable row: each is scored or may be shown."""
        good, _, _ = self._rows
        return content_hash("winogrande", SHOT_RULE, [[i, r.before, r.after, list(r.options), r.gold] for i, r in good])

    def record(self) -> dict[str, Any]:
        """Name, hash, counts and the shot rule."""
        good, bad, _ = self._rows
        rows = len(good[: self.limit])
        return {
            "name": self.name,
            "hash": self.fingerprint(),
            "rows": rows,
            "rows_bad": len(bad),
            "subsets": [self.name],
            "shot_rule": SHOT_RULE,
        }


def _fault(fields: dict[str, Any]) -> str | None:
    """Why a row cannot be scored; None when it can."""
    for column in COLUMNS:
        if not isinstance(fields[column], str):
            return f"{column} is {fields[column]!r}, expected text"
    if not fields["option1"] or not fields["option2"]:
        return "an option is empty"
    if (blanks := fields["sentence"].count("_")) != 1:
        return f"the sentence has {blanks} blanks `_`, expected 1"
    if not fields["sentence"].split("_")[1].strip():
        return "nothing follows the blank, so there is nothing to score"
    return None


def _row(fields: dict[str, Any], where: str) -> Row:
    if fields["answer"] not in ("1", "2"):
        raise InputError(
            f'{where}: the answer is {fields["answer"]!r}, expected "1" or "2" (the published test split has none).'
        )
    before, after = fields["sentence"].split("_")
    return Row(before, after.strip(), (fields["option1"], fields["option2"]), int(fields["answer"]) - 1)
