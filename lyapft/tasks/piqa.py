"""PIQA: which of two ways reaches a goal in the physical world.

Source: Bisk et al. 2020 (arXiv 1911.11641); the text of a query is that of lm-eval's task `piqa`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lyapft.errors import InputError
from lyapft.tasks.reading import existing, read_jsonl, read_text
from lyapft.tasks.single_split import Item, SingleSplit, answers_after, bad_choices, not_text


@dataclass
class Piqa(SingleSplit):
    """PIQA from one jsonl file: goal, sol1, sol2, label 0 or 1 (a number or a digit as text).

    The release of its authors keeps the labels apart, one a line: `valid.jsonl` beside `valid-labels.lst`. They are
    read from there when the first row has no label.
    """

    KIND: ClassVar = "piqa"
    COLUMNS: ClassVar = ("goal", "sol1", "sol2", "label")

    def hub(self) -> tuple[str, str | None, str]:
        """`baber/piqa`: the copy that lm-eval reads, free of loading code."""
        return "baber/piqa", None, "validation"

    def read(self) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
        """The rows, with the labels of the file beside them where they have none."""
        if self.path is None:
            return SingleSplit.read(self)
        file = existing(self.path, "file")
        labels = file.with_name(f"{file.stem}-labels.lst")
        if not labels.is_file():
            return SingleSplit.read(self)
        rows = read_jsonl(file, self.COLUMNS[:3])
        return self.path, rows if "label" in rows[0][1] else _labelled(rows, labels)

    def fault(self, fields: dict[str, Any]) -> str | None:
        """Null fields or an empty solution."""
        return not_text(fields, self.COLUMNS[:3]) or bad_choices([fields["sol1"], fields["sol2"]])

    def item(self, fields: dict[str, Any]) -> Item | str:
        """The solutions behind "Question: goal, Answer:"."""
        if str(fields["label"]) not in ("0", "1"):
            return f"the label is {fields['label']!r}, expected 0 or 1 (the published test split has none)."
        prompt = f"Question: {fields['goal']}\nAnswer:"
        return answers_after(prompt, [fields["sol1"], fields["sol2"]], int(fields["label"]))


def _labelled(rows: list[tuple[int, dict[str, Any]]], file: Path) -> list[tuple[int, dict[str, Any]]]:
    labels = read_text(file).split()
    if len(labels) != len(rows):
        raise InputError(
            f"{file} has {len(labels)} labels for {len(rows)} rows. Give one label a line, in their order."
        )
    return [(number, fields | {"label": label}) for (number, fields), label in zip(rows, labels, strict=True)]
