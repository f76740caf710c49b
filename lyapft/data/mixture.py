"""The diet of the shipped checkpoints: skill episodes with a curriculum, a little English, some questions."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lyapft.data import pydoc
from lyapft.data.examples import Example, Segment, digest
from lyapft.data.skills import BASE_RULES, check_rules, episode, episode_example
from lyapft.errors import InputError

TEXT_CHARACTERS = 400  # cut from a document at random; more than max_length tokens hold


@dataclass
class Mixture:
    """Pretraining examples in a fixed order: `lyapft.data.Mixture`.

    Args:
        rows: examples; steps × batch size of them are one pass.
        rules: what the episodes teach.
        shots: solved lines before the last, one of these numbers per episode.
        text_fraction: share of the examples that are running text of the interpreter's documentation.
        pairs_fraction: share that are questions and answers about the standard library.
        inferred_first, inferred_second: in the first and the second half, the share of the episodes whose rule has to
            be inferred from the shots; the others name it.
        data_seed: draws the examples.
    """

    name: str = "mixture"
    path: str | None = None
    max_length: int = 64
    packing: bool = False
    max_bad_fraction: float = 0.01
    limit: int | None = None
    streaming: bool = False
    rows: int = 72_000
    rules: Sequence[str] = BASE_RULES
    shots: Sequence[int] = (6,)
    text_fraction: float = 0.05
    pairs_fraction: float = 0.02
    inferred_first: float = 0.7
    inferred_second: float = 0.9
    data_seed: int = 0
    packed: bool = field(default=False, init=False)
    ordered: bool = field(default=True, init=False)
    rows_bad: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_rules(self.rules)
        faults = [
            f"data.{key}={getattr(self, key)} must lie between 0 and 1"
            for key in ("text_fraction", "pairs_fraction", "inferred_first", "inferred_second")
            if not 0 <= getattr(self, key) <= 1
        ]
        if self.text_fraction + self.pairs_fraction > 1:
            faults.append("data.text_fraction and data.pairs_fraction together must not exceed 1")
        if self.rows <= 0:
            faults.append(f"data.rows={self.rows} must be greater than 0")
        if not self.shots or min(self.shots) < 0:
            faults.append(f"data.shots={list(self.shots)} must be one or more numbers, none negative")
        if faults:
            raise InputError("\n".join(faults))

    def examples(self) -> Iterator[Example]:
        """The examples in their order, which is the curriculum."""
        rng = random.Random(f"mixture {self.data_seed}")
        rows = self.rows if self.limit is None else min(self.rows, self.limit)
        for i in range(rows):
            kind = rng.random()
            if kind < self.text_fraction:
                yield self._text(i, rng)
            elif kind < self.text_fraction + self.pairs_fraction:
                yield pydoc.pair_example(f"pair {i}", *rng.choice(pydoc.pairs()))
            else:
                named = rng.random() >= (self.inferred_first if i < self.rows / 2 else self.inferred_second)
                rule, shots = rng.choice(list(self.rules)), rng.choice(list(self.shots))
                yield episode_example(f"episode {i}", episode(rule, shots, rng, "train", named))

    def _text(self, i: int, rng: random.Random) -> Example:
        document = rng.choice(pydoc.texts())
        start = rng.randrange(max(1, len(document) - TEXT_CHARACTERS))
        return Example(f"text {i}", (Segment(document[start : start + TEXT_CHARACTERS], target=True),))

    def fingerprint(self) -> str:
        """SHA-256 of the examples; it differs between Python versions, as the documentation does."""
        return digest(self.examples())
