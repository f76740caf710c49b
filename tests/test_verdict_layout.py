"""What fits on one page, on made-up topics: the limit, the order, and the count of what is left out."""

import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lyapft.verdict.page.layout import MOST, WORDS, Topic, by_turns, fitted, words

sentences = st.integers(1, 60).map(lambda n: " ".join(["w"] * n))


def made_up(title: str, own: list[str], more: int) -> Topic:
    """A topic of these lines, and where they are as many as are written at all, of more that are not."""
    kinds = [f"kind {len(one) % 5}" for one in own] + ["kind 0"] * (more if len(own) == MOST else 0)
    return Topic(title, tuple(own), tuple(kinds), "things")


topics = st.builds(
    made_up,
    st.sampled_from(["a", "b", "c"]),
    st.lists(sentences, max_size=MOST),
    st.integers(min_value=0, max_value=200),
)


@given(st.lists(topics, max_size=10))
def test_a_page_keeps_to_its_words_leaves_no_room_and_counts_the_rest(given_: list[Topic]) -> None:
    page = fitted(given_, ("a", "b", "c"))
    assert words(page) <= WORDS
    titles = [section.title for section in page]
    assert titles == sorted(titles)
    said = [line for section in page for line in section.lines]
    counts = Counter(line for line in said if line.startswith("w"))
    left = sum(int(re.findall(r"\d+", line)[0]) for line in said if line.endswith("below."))
    assert sum(counts.values()) + left == sum(len(one.kinds) for one in given_)
    if words(page) < WORDS - 80:  # even the longest line would have fitted
        assert sum(counts.values()) == sum(len(one.lines) for one in given_)


def test_turns_go_round_the_kinds_largest_first() -> None:
    found = [("a", 1), ("b", 9), ("a", 5), ("a", 7), ("c", 2)]
    assert by_turns(found, lambda one: one[0], lambda one: one[1]) == [
        ("b", 9), ("a", 7), ("c", 2), ("a", 5), ("a", 1),
    ]  # fmt: skip


def test_many_kinds_are_summed_up() -> None:
    kinds = tuple(f"of kind {n}" for n in range(6) for _ in range(6 - n))
    found = Topic("title", ("a", "b"), kinds, "things")
    tally = "Of 21 things: 6 of kind 0, 5 of kind 1, 4 of kind 2, 3 of kind 3, 3 otherwise."
    assert found.shown(2) == [tally, "a", "b", "And 19 more, below."]
    assert found.shown(0) == [f"{tally} All below."]
    undecided = Topic("title", ("a",), ("undecided",) * 3, "things")
    assert undecided.shown(1) == ["a", "And 2 more undecided, below."]
    assert undecided.shown(0) == ["Of 3 things: 3 undecided. All below."]
    alike = Topic("title", ("a",), ("", ""), "things")
    assert alike.shown(1) == ["a", "And 1 more, below."]
    assert alike.shown(0) == ["Things: 2, below."]
