"""Procedural skills: same-length rules on three letters, taught and asked by examples in the prompt.

An episode is a few solved lines and a query of the same rule, `a b c -> c b a`. The rule is to be inferred from the
lines, or it is named in front of each (`reverse a b c -> c b a`). Answers are exact, all choices have the same length,
and train and test inputs are disjoint: the split holds for the shots as it does for the queries.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations
from string import ascii_lowercase

from lyapft.data.examples import Example, Segment, digest
from lyapft.errors import InputError

Letters = tuple[str, str, str]
TEST_SHARE = 26 / 256  # of all inputs, by hash
SPLITS = ("train", "test")


def _shift(by: int) -> Callable[[Letters], Letters]:
    """Each letter moved `by` places in the alphabet, around its end."""

    def rule(x: Letters) -> Letters:
        a, b, c = (ascii_lowercase[(ascii_lowercase.index(letter) + by) % 26] for letter in x)
        return a, b, c

    return rule


RULES: dict[str, Callable[[Letters], Letters]] = {
    "copy": lambda x: x,
    "reverse": lambda x: (x[2], x[1], x[0]),
    "next": _shift(1),
    "upper": lambda x: (x[0].upper(), x[1].upper(), x[2].upper()),
    "rotate": lambda x: (x[1], x[2], x[0]),
    "back": lambda x: (x[2], x[0], x[1]),
    "swap": lambda x: (x[1], x[0], x[2]),
    "tail": lambda x: (x[0], x[2], x[1]),
    "previous": _shift(-1),
    "skip": _shift(2),
    "title": lambda x: (x[0].upper(), x[1], x[2]),
    "flip": lambda x: (x[2].upper(), x[1].upper(), x[0].upper()),
}
BASE_RULES = ("copy", "reverse", "next", "upper")  # what the shipped checkpoints know
NEW_RULES = ("rotate", "previous", "flip", "title")  # what the default cell teaches them


@dataclass(frozen=True)
class Line:
    """One solved example: the prompt ends in `->`, the answer begins with a space."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class SkillQuery:
    """A query with its shots; the same query is asked at every shot count.

    Args:
        id: place in its query set.
        rule: what maps the prompt to the gold choice.
        shots: solved lines of the same rule; the first k of them are shown at k shots.
        prompt: the unsolved line.
        choices: the right answer among other rules' answers, all different, all three letters long.
        gold: index of the right one.
    """

    id: int
    rule: str
    shots: tuple[Line, ...]
    prompt: str
    choices: tuple[str, ...]
    gold: int

    def context(self, shots: int) -> str:
        """The prompt behind its first `shots` solved lines."""
        if not 0 <= shots <= len(self.shots):
            raise ValueError(f"{shots} shots asked of a query that has {len(self.shots)}")
        return "".join(f"{line.prompt}{line.answer}\n" for line in self.shots[:shots]) + self.prompt


def split_of(x: Letters) -> str:
    """`train` or `test`, from a hash of the input alone.

    >>> split_of(("a", "b", "c")), split_of(("c", "b", "a"))
    ('test', 'train')
    """
    return "test" if hashlib.sha256(" ".join(x).encode()).digest()[0] < 256 * TEST_SHARE else "train"


@cache
def inputs(split: str) -> tuple[Letters, ...]:
    """Every input of a split: three different letters, in alphabetical order (about 14,000 to train, 1,600 to test)."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use train or test")
    return tuple(x for x in permutations(ascii_lowercase, 3) if split_of(x) == split)


def line(rule: str, x: Letters, named: bool) -> Line:
    """`x` solved by a rule.

    >>> line("reverse", ("a", "b", "c"), named=True)
    Line(prompt='reverse a b c ->', answer=' c b a')
    """
    name = f"{rule} " if named else ""
    return Line(f"{name}{' '.join(x)} ->", " " + " ".join(RULES[rule](x)))


def episode(rule: str, shots: int, rng: random.Random, split: str = "train", named: bool = False) -> tuple[Line, ...]:
    """`shots` solved lines and one more, of one rule, on different inputs of one split."""
    return tuple(line(rule, x, named) for x in rng.sample(inputs(split), shots + 1))


def query_set(
    rules: Sequence[str],
    n: int,
    shots_max: int,
    seed: int = 0,
    split: str = "test",
    named: bool = False,
    distractors: Sequence[str] | None = None,
    choices: int = 4,
) -> list[SkillQuery]:
    """`n` multiple-choice queries, the rules in turn, deterministic from the seed.

    Args:
        rules: the rules asked about, each equally often.
        n: number of queries.
        shots_max: solved lines that each query carries.
        split: where queries and shots are drawn from.
        named: name the rule in front of each line.
        distractors: rules whose answers are the wrong choices; `rules` themselves by default.
        choices: answers per query, the right one included: chance is 1 / choices.
    Raises:
        InputError: an unknown rule, or too few rules for so many choices.
    """
    others = tuple(distractors if distractors is not None else rules)
    check_rules((*rules, *others))
    rng = random.Random(f"skills queries {seed}")
    queries = []
    for i in range(n):
        rule = rules[i % len(rules)]
        drawn = rng.sample(inputs(split), shots_max + 1)
        *shots, query = (line(rule, x, named) for x in drawn)
        wrong = sorted({line(other, drawn[-1], named).answer for other in others} - {query.answer})
        if len(wrong) < choices - 1:
            raise InputError(
                f"{choices} choices need {choices - 1} other rules than {rule}: {', '.join(others)} are too few"
            )
        shown = [*rng.sample(wrong, choices - 1), query.answer]
        rng.shuffle(shown)
        queries.append(SkillQuery(i, rule, tuple(shots), query.prompt, tuple(shown), shown.index(query.answer)))
    return queries


def check_rules(rules: Sequence[str]) -> None:
    """Refuse names that are no rule.

    Raises:
        InputError: names the unknown ones and the known ones.
    """
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown or not rules:
        raise InputError(f"rules {unknown or 'none given'}: use one or more of {', '.join(RULES)}")


def episode_example(id: str, lines: Sequence[Line]) -> Example:
    """An episode to train on: every answer is a target, shots' answers included, and the end of text after the last."""
    segments = []
    for i, solved in enumerate(lines):
        segments.append(Segment(("\n" if i else "") + solved.prompt, target=False))
        segments.append(Segment(solved.answer, target=True, end=i == len(lines) - 1))
    return Example(id, tuple(segments))


@dataclass
class Skills:
    """Training episodes, made up on the spot: `lyapft.data.Skills`.

    Args:
        rules: each episode follows one of them, drawn at random.
        rows: episodes.
        shots: solved lines before the last; a longer list gives episodes of several lengths.
        named_fraction: share of the episodes that name their rule.
        data_seed: draws the episodes (the cell's seed only orders them).
    """

    name: str = "skills"
    path: str | None = None
    max_length: int = 64
    packing: bool = False
    max_bad_fraction: float = 0.01
    limit: int | None = None
    streaming: bool = False
    rules: Sequence[str] = NEW_RULES
    rows: int = 3072
    shots: Sequence[int] = (6,)
    named_fraction: float = 0.0
    data_seed: int = 0
    packed: bool = field(default=False, init=False)
    ordered: bool = field(default=False, init=False)
    rows_bad: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_rules(self.rules)
        faults = []
        if self.path is not None:
            faults.append(
                f"data.path={self.path}: skills are made up, not read; leave data.path out or choose another data="
            )
        if self.rows <= 0:
            faults.append(f"data.rows={self.rows} must be greater than 0")
        if not self.shots or min(self.shots) < 0:
            faults.append(f"data.shots={list(self.shots)} must be one or more numbers, none negative")
        if not 0 <= self.named_fraction <= 1:
            faults.append(f"data.named_fraction={self.named_fraction} must lie between 0 and 1")
        if faults:
            raise InputError("\n".join(faults))

    def examples(self) -> Iterator[Example]:
        """The episodes in the order drawn."""
        rng = random.Random(f"skills episodes {self.data_seed}")
        for i in range(self.rows if self.limit is None else min(self.rows, self.limit)):
            rule, shots = rng.choice(list(self.rules)), rng.choice(list(self.shots))
            named = rng.random() < self.named_fraction
            yield episode_example(f"skills {i}", episode(rule, shots, rng, "train", named))

    def fingerprint(self) -> str:
        """SHA-256 of the episodes."""
        return digest(self.examples())
