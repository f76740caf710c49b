"""ARC: science questions of school exams, an easy and a challenge set.

Source: Clark et al. 2018 (arXiv 1803.05457); the text of a query is that of lm-eval's tasks `arc_easy` and
`arc_challenge`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lyapft.errors import InputError
from lyapft.tasks.single_split import Item, SingleSplit, answers_after, bad_choices, not_text

SUBSETS = ("ARC-Easy", "ARC-Challenge")


@dataclass
class Arc(SingleSplit):
    """ARC from one jsonl file, mostly with four choices labelled A to D; three, five and labels 1 to 4 occur.

    Two layouts are published: `question` and `choices` {text: […], label: […]} on the hub; `question` {stem, choices:
    [{text, label}]} in the release of its authors. Both have `answerKey`.

    Args:
        subset: ARC-Easy or ARC-Challenge; matters where the set is loaded by name.
    """

    KIND: ClassVar = "arc"
    COLUMNS: ClassVar = ("question", "answerKey")

    subset: str = "ARC-Easy"

    def __post_init__(self) -> None:
        SingleSplit.__post_init__(self)
        if self.subset not in SUBSETS:
            raise InputError(f"task.subset={self.subset}: use one of {', '.join(SUBSETS)}")

    def hub(self) -> tuple[str, str | None, str]:
        """`allenai/ai2_arc`."""
        return "allenai/ai2_arc", self.subset, "test"

    def fault(self, fields: dict[str, Any]) -> str | None:
        """Null fields, an empty choice, or labels that do not name the choices."""
        question, choices, labels = _parts(fields)
        if fault := not_text(fields, ["answerKey"]) or bad_choices(choices):
            return fault
        if not isinstance(question, str) or not question.strip():
            return f"the question is {question!r}, expected text"
        if not isinstance(labels, list) or len(labels) != len(choices) or len({*map(str, labels)}) != len(labels):
            return f"{len(choices)} choices are labelled {labels!r:.80}, expected one label each"
        return None

    def item(self, fields: dict[str, Any]) -> Item | str:
        """The choices' texts behind "Question: …, Answer:"; their labels are never shown."""
        question, choices, labels = _parts(fields)
        if fields["answerKey"] not in labels:
            return f"the answerKey is {fields['answerKey']!r}, expected one of {', '.join(map(str, labels))}."
        return answers_after(f"Question: {question}\nAnswer:", choices, labels.index(fields["answerKey"]))


def _parts(fields: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Question, choices and their labels from either layout; None for what is not there."""
    question, listed = fields["question"], fields.get("choices")
    if isinstance(question, dict):
        listed, question = question.get("choices"), question.get("stem")
    if isinstance(listed, dict):
        return question, listed.get("text"), listed.get("label")
    if isinstance(listed, list) and all(isinstance(choice, dict) for choice in listed):
        return question, [choice.get("text") for choice in listed], [choice.get("label") for choice in listed]
    return question, None, None
