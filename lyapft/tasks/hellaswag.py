"""HellaSwag: which of four endings follows a description of an everyday event.

Source: Zellers et al. 2019 (arXiv 1905.07830); the text of a query and its clean-up are those of lm-eval's task
`hellaswag`.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from lyapft.tasks.single_split import Item, SingleSplit, answers_after, bad_choices, not_text


def clean(text: str) -> str:
    """Text without the marks that WikiHow's layout left in it, as lm-eval cleans it.

    >>> clean(" How to bake [title] Mix. [step] Stir  well. ")
    'How to bake. Mix. Stir well.'
    """
    marks = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return marks.replace("  ", " ")


@dataclass
class Hellaswag(SingleSplit):
    """HellaSwag from one jsonl file: activity_label, ctx_a, ctx_b, endings, label 0-3 (a number or a digit as text)."""

    KIND: ClassVar = "hellaswag"
    COLUMNS: ClassVar = ("activity_label", "ctx_a", "ctx_b", "endings", "label")

    def hub(self) -> tuple[str, str | None, str]:
        """`Rowan/hellaswag`."""
        return "Rowan/hellaswag", None, "validation"

    def fault(self, fields: dict[str, Any]) -> str | None:
        """Null fields, or an ending of which the clean-up leaves nothing."""
        if fault := not_text(fields, self.COLUMNS[:3]) or bad_choices(fields["endings"]):
            return fault
        return None if all(map(clean, fields["endings"])) else "an ending holds nothing but layout marks"

    def item(self, fields: dict[str, Any]) -> Item | str:
        """The endings behind "activity: what happened so far"."""
        choices = [clean(ending) for ending in fields["endings"]]
        allowed = [str(index) for index in range(len(choices))]
        if str(fields["label"]) not in allowed:
            return (
                f"the label is {fields['label']!r}, expected one of {', '.join(allowed)} "
                "(the published test split has none)."
            )
        prompt = clean(f"{fields['activity_label']}: {fields['ctx_a']} {fields['ctx_b'].capitalize()}")
        return answers_after(prompt, choices, int(fields["label"]))
