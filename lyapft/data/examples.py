"""What every source yields: examples made of segments of text, of which only some are to be learned."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text.

    Args:
        text: tokenised by itself, so that a token never straddles a prompt and its answer.
        target: whether its tokens count in the loss.
        end: an end-of-text token follows, a target exactly if the segment is one.
    """

    text: str
    target: bool
    end: bool = False


@dataclass(frozen=True)
class Example:
    """One sequence before tokenisation.

    Args:
        id: names its row in messages.
        begins: a text begins here, and with it a begin-of-text token where the tokenizer has one.
    """

    id: str
    segments: tuple[Segment, ...]
    begins: bool = True


class Source(Protocol):
    """Where examples come from.

    `packed`: join the examples and cut the stream into full blocks (plain text) instead of one row per example.
    `ordered`: the order of the examples is part of the data (a curriculum): batches follow it instead of shuffling.
    `rows_bad`: rows that were left out because a field was missing or not a string; known once `examples` was called.
    """

    name: str
    packed: bool
    ordered: bool
    rows_bad: int

    def examples(self) -> Iterable[Example]:
        """Every example, in the source's own order."""

    def fingerprint(self) -> str:
        """SHA-256 of the content; it never depends on a path."""


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 over the segments of some examples, in order."""
    sha = hashlib.sha256()
    for example in examples:
        for segment in example.segments:
            sha.update(f"{len(segment.text)}:{segment.text}:{segment.target:d}{segment.end:d}\n".encode())
        sha.update(b"\0")
    return sha.hexdigest()
