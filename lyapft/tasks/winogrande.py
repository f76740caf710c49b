"""WinoGrande: which of two names fills the blank, judged by the likelihood of what follows it (partial evaluation).

Source: Sakaguchi et al. 2019 (arXiv 1907.10641); partial evaluation: Trinh & Le 2018 (arXiv 1806.02847). The text of a
query is that of lm-eval's task `winogrande`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lyapft.tasks.single_split import Item, SingleSplit, not_text


@dataclass
class Winogrande(SingleSplit):
    """WinoGrande from one jsonl file: sentence with one `_`, option1, option2, answer "1" or "2".

    Both options are put in the blank, and the one after which the rest of the sentence is likelier is chosen.
    """

    KIND: ClassVar = "winogrande"
    COLUMNS: ClassVar = ("sentence", "option1", "option2", "answer")

    def hub(self) -> tuple[str, str | None, str]:
        """`allenai/winogrande`."""
        return "allenai/winogrande", "winogrande_xl", "validation"

    def fault(self, fields: dict[str, Any]) -> str | None:
        """Null fields, an empty option, no single blank, or nothing behind it."""
        if fault := not_text(fields, self.COLUMNS):
            return fault
        if not fields["option1"] or not fields["option2"]:
            return "an option is empty"
        if (blanks := fields["sentence"].count("_")) != 1:
            return f"the sentence has {blanks} blanks `_`, expected 1"
        if not fields["sentence"].split("_")[1].strip():
            return "nothing follows the blank, so there is nothing to score"
        return None

    def item(self, fields: dict[str, Any]) -> Item | str:
        """The two contexts differ, the continuation is shared."""
        if fields["answer"] not in ("1", "2"):
            return f'the answer is {fields["answer"]!r}, expected "1" or "2" (the published test split has none).'
        before, after = fields["sentence"].split("_")
        contexts = (before + fields["option1"], before + fields["option2"])
        gold, rest = int(fields["answer"]) - 1, f" {after.strip()}"
        return Item(contexts, (rest, rest), gold, f"{contexts[gold]}{rest}\n\n")
