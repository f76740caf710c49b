"""The rules, the split, the episodes and the query sets of the embedded skills."""

import random
from collections import Counter
from itertools import pairwise, permutations
from string import ascii_lowercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapft.data.skills import (
    BASE_RULES,
    NEW_RULES,
    RULES,
    Skills,
    episode,
    inputs,
    query_set,
    split_of,
)
from lyapft.errors import InputError

EXPECTED = {  # of ("a", "z", "m"), by hand
    "copy": "a z m",
    "reverse": "m z a",
    "next": "b a n",
    "upper": "A Z M",
    "rotate": "z m a",
    "back": "m a z",
    "swap": "z a m",
    "tail": "a m z",
    "previous": "z y l",
    "skip": "c b o",
    "title": "A z m",
    "flip": "M Z A",
}


def asked(query) -> tuple[str, ...]:
    return tuple(query.prompt.removesuffix(" ->").split()[-3:])


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_does_what_its_name_says(rule):
    assert " ".join(RULES[rule](("a", "z", "m"))) == EXPECTED[rule]


def test_no_input_leaves_two_rules_with_the_same_answer():
    for x in permutations(ascii_lowercase, 3):
        assert len({rule(x) for rule in RULES.values()}) == len(RULES), x


def test_the_base_does_not_know_the_new_rules():
    assert not set(BASE_RULES) & set(NEW_RULES)


def test_the_split_depends_on_the_input_alone_and_is_complete():
    test, train = set(inputs("test")), set(inputs("train"))
    assert not test & train
    assert test | train == set(permutations(ascii_lowercase, 3))
    assert all(split_of(x) == "test" for x in test)
    with pytest.raises(ValueError, match="dev"):
        inputs("dev")


def test_a_tenth_of_the_inputs_is_held_out():
    train, test = inputs("train"), inputs("test")
    assert len(train) + len(test) == 26 * 25 * 24
    assert 0.08 < len(test) / (26 * 25 * 24) < 0.12


@settings(max_examples=40)
@given(
    rule=st.sampled_from(list(RULES)),
    shots=st.integers(0, 8),
    seed=st.integers(0, 2**32),
    split=st.sampled_from(["train", "test"]),
    named=st.booleans(),
)
def test_every_line_of_an_episode_follows_its_rule_on_different_inputs_of_its_split(rule, shots, seed, split, named):
    lines = episode(rule, shots, random.Random(seed), split, named)
    assert len(lines) == shots + 1
    seen = set()
    for solved in lines:
        words = solved.prompt.split()
        assert words[-1] == "->"
        assert words[0] == rule if named else len(words) == 4
        x = tuple(words[-4:-1])
        assert split_of(x) == split
        assert solved.answer.split() == list(RULES[rule](x))
        seen.add(x)
    assert len(seen) == shots + 1


def test_queries_are_the_same_at_every_shot_count_and_for_the_same_seed():
    queries = query_set(NEW_RULES, 40, 5, seed=3)
    assert queries == query_set(NEW_RULES, 40, 5, seed=3) != query_set(NEW_RULES, 40, 5, seed=4)
    for query in queries:
        contexts = [query.context(k) for k in range(6)]
        assert all(context.endswith(query.prompt) for context in contexts)
        assert [context.count("\n") for context in contexts] == list(range(6))
        # fewer shots are the first of more
        assert all(b.startswith(a.removesuffix(query.prompt)) for a, b in pairwise(contexts))
    with pytest.raises(ValueError, match="6 shots"):
        queries[0].context(6)


@pytest.mark.parametrize("named", [False, True])
def test_wrong_choices_are_other_rules_answers_of_the_same_length(named):
    queries = query_set(BASE_RULES, 80, 5, named=named)
    assert Counter(query.rule for query in queries) == dict.fromkeys(BASE_RULES, 20)
    for query in queries:
        x = asked(query)
        assert split_of(x) == "test"
        assert all(split_of(tuple(line.prompt.split()[-4:-1])) == "test" for line in query.shots)
        answers = {" " + " ".join(RULES[rule](x)) for rule in BASE_RULES}
        assert set(query.choices) == answers
        assert len(query.choices) == 4
        assert {len(choice) for choice in query.choices} == {6}
        assert query.choices[query.gold] == " " + " ".join(RULES[query.rule](x))
    assert len({query.gold for query in queries}) == 4


def test_distractors_may_come_from_other_rules():
    queries = query_set(NEW_RULES, 60, 0, distractors=[*NEW_RULES, *BASE_RULES])
    wrong = {
        rule
        for query in queries
        for rule in RULES
        if " " + " ".join(RULES[rule](asked(query))) in query.choices and rule != query.rule
    }
    assert wrong == {*NEW_RULES, *BASE_RULES}


def test_a_guess_that_ignores_the_shots_is_right_a_quarter_of_the_time():
    queries = query_set(BASE_RULES, 4000, 0)
    always_reverse = [query.choices[query.gold] == " " + " ".join(RULES["reverse"](asked(query))) for query in queries]
    assert sum(always_reverse) == 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: query_set(["copy", "mirror"], 4, 2), "mirror.*use one or more of copy"),
        (lambda: query_set(["copy", "next"], 4, 2), "4 choices need 3 other rules"),
        (lambda: Skills(rules=["turn"]), "turn"),
        (lambda: Skills(rules=[]), "none given"),
        (lambda: Skills(rows=0, named_fraction=2.0), r"data.rows=0.*\n.*data.named_fraction=2.0"),
        (lambda: Skills(path="x.json"), "data.path=x.json"),
        (lambda: Skills(shots=[-1]), "data.shots"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_training_episodes_keep_to_the_train_split_and_train_every_answer():
    source = Skills(rows=30, shots=[0, 3], named_fraction=0.5)
    examples = list(source.examples())
    assert len(examples) == 30
    assert {len(e.segments) for e in examples} == {2, 8}
    for example in examples:
        prompts, answers = example.segments[::2], example.segments[1::2]
        assert not any(p.target or p.end for p in prompts)
        assert all(a.target for a in answers)
        assert [a.end for a in answers] == [False] * (len(answers) - 1) + [True]
        assert all(split_of(tuple(p.text.split()[-4:-1])) == "train" for p in prompts)
    assert len(list(Skills(rows=30, limit=7).examples())) == 7


def test_the_fingerprint_follows_the_content():
    assert Skills(rows=20).fingerprint() == Skills(rows=20, max_length=32).fingerprint()
    assert len({Skills(rows=20, data_seed=seed).fingerprint() for seed in range(3)}) == 3
