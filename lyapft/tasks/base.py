"""What a few-shot multiple-choice task is: queries in, scores out. Nothing here knows a model."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lyapft.errors import InputError


@dataclass(frozen=True, slots=True)
class Query:
    """One item at one number of shots: which of the continuations does the model find most likely after its context?

    `contexts[i] + continuations[i]` is the text of choice i. The contexts are mostly equal; where the choice stands
    before the part that is scored (WinoGrande) the continuations are.
    """

    task: str
    item_id: int  # position in the subset's file, bad rows counted: the same at every number of shots
    shots: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    subset: str
    lengths: tuple[int, ...] = ()  # characters of each choice, where the task reports acc_norm


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over items, as a fraction 0..1, with its standard error (None for a single item).

    `metric` is `acc`, or `acc_norm` beside it where lm-eval reports that too: the choice with the highest
    log-likelihood per character.
    """

    task: str
    shots: int
    metric: str
    value: float
    n: int
    stderr: float | None
    chance: float  # the accuracy of a blind guess: mean of 1 / choices
    truncated: int = 0  # items that lost the left of their context to the model's positions
    nonfinite: int = 0  # items with a NaN likelihood: counted as wrong
    beyond_trained_length: int = 0  # items longer than the sequences that the model was trained on

    def as_dict(self) -> dict[str, Any]:
        """The score as plain JSON values."""
        return asdict(self)


@dataclass
class Task(ABC):
    """Base of the tasks: subclasses read rows when they are first needed, and say how to ask about one.

    Args:
        path: where the data is; None for the published data set by name.
        shots: solved examples before a query; one score for each number.
        limit: the first items of each subset only.
        batch_tokens: padded tokens in one forward pass.
        max_bad_fraction: share of rows that may be unusable.
        truncate: cut the left of a context that does not fit the model's positions, as lm-eval does, not refuse it.
    Raises:
        InputError: from the constructor for a wrong option; from any method for wrong data.
    """

    name: str
    path: str | None = None
    shots: list[int] = field(default_factory=lambda: [0, 1, 3, 5])
    limit: int | None = None
    batch_tokens: int = 8192
    max_bad_fraction: float = 0.01
    truncate: bool = False

    def __post_init__(self) -> None:
        # Hydra hands over its own list type; plain lists survive json and multiprocessing.
        self.shots = [int(k) for k in self.shots]
        wrong = []
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) != len(self.shots):
            wrong.append(f"task.shots={self.shots}: give different numbers of shots, each 0 or more, such as [0,5]")
        if self.limit is not None and self.limit < 1:
            wrong.append(f"task.limit={self.limit}: give a positive number of items, or null for all of them")
        if self.batch_tokens < 1:
            wrong.append(f"task.batch_tokens={self.batch_tokens}: give a positive number of tokens")
        if not 0 <= self.max_bad_fraction <= 1:
            wrong.append(f"task.max_bad_fraction={self.max_bad_fraction}: give a share between 0 and 1")
        if wrong:
            raise InputError("\n".join(wrong))

    @abstractmethod
    def queries(self, shots: int) -> list[Query]:
        """The queries with `shots` solved examples before each; the same items in the same order at every `shots`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 of the content that is scored and shown, never of its path."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What was read: name, hash, rows, rows_bad, and the rule that chooses shots."""


def content_hash(*parts: Any) -> str:
    """sha256 over JSON-able values, equal for equal content on every machine.

    >>> content_hash("task", [1, 2]) == content_hash("task", [1, 2])
    True
    """
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def refuse_bad_rows(bad: Sequence[str], total: int, max_fraction: float, where: str) -> None:
    """Stop when more than the allowed share of rows cannot be used.

    Raises:
        InputError: naming the first bad row, the count and the share.
    """
    if bad and len(bad) > max_fraction * total:
        raise InputError(
            f"{where}: {len(bad)} of {total} rows cannot be used, first {bad[0]}. More than {max_fraction:.1%} "
            "stops the run: mend the rows, or allow more with task.max_bad_fraction=…"
        )
    if total == len(bad):
        raise InputError(f"{where}: no usable row among {total}. Give a file with at least one item.")


def first_n(pool: Iterable[Any], shots: int, excluded: Any = None) -> list[Any]:
    """The first `shots` rows of the pool, skipping every row that equals the one being scored.

    Source: lm-eval's sampler `first_n` (its `FirstNSampler`), copies of the scored row included.

    >>> first_n([1, 2, 2, 3], 2, excluded=2)
    [1, 3]
    """
    chosen: list[Any] = []
    for row in pool:
        if len(chosen) == shots:
            break
        if excluded is None or row != excluded:
            chosen.append(row)
    return chosen
