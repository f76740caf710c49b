"""What fits on one page: of every topic the most important lines, and of the others how many there are."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat, zip_longest
from typing import TypeVar

from lyapft.verdict.words import Section

WORDS = 560  # of a page with its headings and bullets: one sheet, one screen
MOST = 20  # lines of one topic that are written at all: more never fit
MOST_KINDS = 4  # by which the lines that are left out are counted
T = TypeVar("T")


@dataclass(frozen=True)
class Topic:
    """Lines under a heading, the most important first, and what is said of those that there is no room for."""

    title: str
    lines: tuple[str, ...]  # at most MOST
    kinds: tuple[str, ...]  # of all, by which they are counted
    noun: str = "notes"  # what they are
    least: int = 1  # lines that come before more of others

    def shown(self, count: int) -> list[str]:
        """The first lines; where these are not all, how many there are of each kind, and how many are left."""
        left = len(self.kinds) - count
        if not left:
            return list(self.lines)
        kinds = set(self.kinds)
        tally = f"Of {len(self.kinds)} {self.noun}: {_tally(self.kinds)}."
        if not count:
            return [f"{tally} All below." if any(kinds) else f"{self.noun.capitalize()}: {left}, below."]
        alike = f" {kinds.pop()}".rstrip() if len(kinds) == 1 else ""
        return [*[tally] * bool(kinds), *self.lines[:count], f"And {left} more{alike}, below."]


def line(title: str, text: str) -> Topic:
    """A topic of one line that says all."""
    return Topic(title, (text,), ("",))


def topic(
    title: str,
    found: Sequence[T],
    say: Callable[[T], str],
    noun: str,
    kind: Callable[[T], str] | None = None,
    least: int = 1,
) -> Topic:
    """A topic of a line for each of what was found."""
    kinds = tuple(map(kind, found)) if kind else ("",) * len(found)
    return Topic(title, tuple(map(say, found[:MOST])), kinds, noun, least)


def _tally(kinds: Sequence[str]) -> str:
    """How many there are of each kind, the most frequent first.

    >>> _tally(["worse", "better", "worse"])
    '2 worse, 1 better'
    """
    counts = Counter(kinds).most_common()
    named = [f"{count} {kind}" for kind, count in counts[:MOST_KINDS]]
    if rest := sum(count for _, count in counts[MOST_KINDS:]):
        named.append(f"{rest} otherwise")
    return ", ".join(named)


def by_turns(found: Sequence[T], kind: Callable[[T], str], size: Callable[[T], float], few: int = 1) -> Sequence[T]:
    """The largest of each kind, then the second largest of each: no kind hides the others. A few stay as they are."""
    if len(found) <= few:
        return found
    kinds: dict[str, list[T]] = {}
    for one in sorted(found, key=size, reverse=True):
        kinds.setdefault(kind(one), []).append(one)
    return [one for turn in zip_longest(*kinds.values()) for one in turn if one is not None]


def fitted(topics: Sequence[Topic], titles: Sequence[str]) -> tuple[Section, ...]:
    """A page of at most WORDS words: the least that each topic should say, then in turn a line more of each.

    Args:
        topics: the most important first. titles: the headings in the order of the page.
    """
    counts = [0] * len(topics)
    least = [place for place, one in enumerate(topics) for _ in range(one.least)]
    for turn in chain([least], repeat(range(len(topics)))):
        before = counts
        for place in turn:
            counts = _grown(topics, counts, place, titles)
        if counts == before:
            break
    return _sections(topics, counts, titles)


def _grown(topics: Sequence[Topic], counts: list[int], place: int, titles: Sequence[str]) -> list[int]:
    """The same with one more line of a topic, if there is one and room for it."""
    more = [count + (at == place) for at, count in enumerate(counts)]
    fits = more[place] <= len(topics[place].lines) and words(_sections(topics, more, titles)) <= WORDS
    return more if fits else counts


def words(sections: Sequence[Section]) -> int:
    """Words of a page, a mark before each line and each heading included."""
    return sum(len(text.split()) + 1 for section in sections for text in (section.title, *section.lines))


def _sections(topics: Sequence[Topic], counts: Sequence[int], titles: Sequence[str]) -> tuple[Section, ...]:
    lines: dict[str, list[str]] = {title: [] for title in titles}
    for one, count in zip(topics, counts, strict=True):
        lines[one.title] += one.shown(count)
    return tuple(Section(title, tuple(own)) for title, own in lines.items() if own)
