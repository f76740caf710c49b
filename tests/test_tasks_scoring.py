"""Likelihoods equal to a one-row float64 loop; text to tokens; choices and scores."""

import json
import math
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy
from transformers import PreTrainedModel

from lyapft import tasks
from lyapft.errors import InputError
from lyapft.tasks.base import Query
from lyapft.tasks.encoding import Pair, encode_pairs
from lyapft.tasks.metrics import ChoiceAccuracy
from lyapft.tasks.scoring import batches, log_likelihoods, share_rows
from tests.tiny import CONFIGS, MMLU, VOCAB, WINOGRANDE, Recorder, byte_tokenizer, random_model
from tests.tolerances import TOL


def random_pairs(seed: int, n: int = 12) -> list[Pair]:
    """Pairs in groups: contexts that repeat and continue each other, continuations of one to four tokens."""
    rng = np.random.default_rng(seed)
    contexts = [tuple(rng.integers(2, VOCAB, rng.integers(1, 12)).tolist()) for _ in range(3)]
    contexts.append(contexts[0] + contexts[1])
    return [
        Pair(contexts[rng.integers(len(contexts))], tuple(rng.integers(2, VOCAB, rng.integers(1, 5)).tolist()))
        for _ in range(n)
    ]


def one_at_a_time(model: PreTrainedModel, pair: Pair) -> float:
    """ln p of the continuation, token by token, in float64: the slow reference."""
    ids, total = list(pair.context), 0.0
    for token in pair.continuation:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += float(logits[token] - torch.logsumexp(logits, 0))
        ids.append(token)
    return total


# --- likelihoods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_likelihoods_equal_those_of_one_row_at_a_time(name: str, batch_tokens: int) -> None:
    model, pairs = random_model(name), random_pairs(1)
    expected = [one_at_a_time(model, pair) for pair in pairs]
    found = log_likelihoods(model, pairs, batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, expected, **TOL[torch.float32])


def test_a_likelihood_does_not_depend_on_what_it_is_batched_with() -> None:
    model, pairs = random_model("mamba"), random_pairs(2)
    alone = [log_likelihoods(model, [pair])[0] for pair in pairs]
    together = log_likelihoods(model, pairs)
    long = Pair(tuple(range(2, 90)), (5, 6))
    np.testing.assert_allclose(together, alone, **TOL[torch.float32])
    np.testing.assert_allclose(log_likelihoods(model, [*pairs, long])[:-1], alone, **TOL[torch.float32])


def test_the_left_is_cut_where_positions_end() -> None:
    model, pair = random_model("gpt2"), Pair(tuple(range(2, 40)), (7, 8))
    kept = Pair(
        pair.context[-9:], pair.continuation
    )  # 9 context tokens and the first of the continuation: 10 positions
    found = log_likelihoods(model, [pair], max_positions=10)
    np.testing.assert_allclose(found, [one_at_a_time(model, kept)], **TOL[torch.float32])


def test_single_token_choices_share_one_row_and_only_read_logits_are_computed(tokenizer: Any) -> None:
    model = Recorder(torch.zeros(VOCAB))
    tasks.evaluate(model, tokenizer, tasks.Mmlu("mmlu", MMLU, [0], batch_tokens=1), progress=False)
    assert [shape[0] for shape in model.shapes] == [1] * 10
    assert model.kept == [1] * 10


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12))
def test_rows_hold_every_input_as_a_prefix_and_none_is_spare(inputs: list[tuple[int, ...]]) -> None:
    rows, row_of = share_rows(inputs)
    assert all(rows[row][: len(ids)] == ids for ids, row in zip(inputs, row_of, strict=True))
    assert not any(i != j and b[: len(a)] == a for i, a in enumerate(rows) for j, b in enumerate(rows))
    assert [len(row) for row in rows] == sorted(map(len, rows), reverse=True)
    assert set(rows) <= set(inputs)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 50))
def test_batches_cover_all_rows_within_the_budget(lengths: list[int], batch_tokens: int) -> None:
    lengths = sorted(lengths, reverse=True)
    cuts = batches(lengths, batch_tokens)
    assert [row for cut in cuts for row in cut] == list(range(len(lengths)))
    assert all(len(cut) == 1 or len(cut) * lengths[cut.start] <= batch_tokens for cut in cuts)


# --- text to tokens --------------------------------------------------------------------------------------------------


def query(contexts: tuple[str, ...], continuations: tuple[str, ...]) -> Query:
    return Query("t", 0, 0, contexts, continuations, 0, "s")


def test_space_at_the_end_of_a_context_belongs_to_the_continuation(tokenizer: Any) -> None:
    moved, plain = encode_pairs(tokenizer, [query(("the ", "the"), ("cat", " cat"))])[0]
    assert moved == plain
    assert tokenizer.decode(moved.continuation) == " cat"


@pytest.mark.parametrize("bos", [False, True])
def test_an_empty_context_is_the_beginning_or_the_end_of_text(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos)
    (pair,) = encode_pairs(tokenizer, [query(("",), ("the",))])[0]
    assert pair.context == (tokenizer.bos_token_id if bos else tokenizer.eos_token_id,)
    assert tokenizer.decode(pair.continuation) == "the"


def test_a_text_that_begins_with_bos_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer(bos=True)
    (pair,) = encode_pairs(tokenizer, [query(("<bot>the",), (" of",))])[0]
    assert pair.context.count(tokenizer.bos_token_id) == 1


def test_a_continuation_without_a_token_of_its_own_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"t, s, item 0.*no token of its own"):
        encode_pairs(tokenizer, [query(("the",), ("",))])


# --- metric and scores -----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40), st.integers(1, 7))
def test_accuracy_and_its_error_are_the_sample_mean_and_standard_error(rows: list[tuple[int, int]], step: int) -> None:
    choice, gold = torch.tensor(rows).T
    metric = ChoiceAccuracy()
    for start in range(0, len(rows), step):
        metric.update(choice[start : start + step], gold[start : start + step])
    correct = (choice == gold).double().numpy()
    found = metric.compute()
    assert found.n == len(rows)
    np.testing.assert_allclose(found.value, multiclass_accuracy(choice, gold, 4, average="micro"), **TOL[torch.float32])
    np.testing.assert_allclose(found.stderr, correct.std(ddof=1) / math.sqrt(len(rows)), **TOL[torch.float64])


def test_scores_are_the_means_of_the_items_and_the_run_repeats_bitwise(tokenizer: Any) -> None:
    model = random_model("llama").train()
    both = [tasks.Mmlu("mmlu", MMLU, [0, 2]), tasks.Winogrande("winogrande", WINOGRANDE, [1])]
    scores, items = tasks.evaluate(model, tokenizer, both, trained_length=200, progress=False)
    again, items_again = tasks.evaluate(model, tokenizer, both, trained_length=200, progress=False)
    assert model.training
    assert scores == again
    assert items.equals(items_again)
    assert [(s.task, s.shots, s.n) for s in scores] == [("mmlu", 0, 10), ("mmlu", 2, 10), ("winogrande", 1, 10)]
    for score in scores:
        own = items[(items.task == score.task) & (items.shots == score.shots)]
        assert score.value == own.correct.mean()
        assert score.stderr == pytest.approx(own.correct.std() / math.sqrt(score.n))
        assert score.beyond_trained_length == (own.tokens > 200).sum()
    assert scores[1].beyond_trained_length == 10
    for row in items.itertuples():
        assert row.choice == int(np.argmax(row.logprobs))
        assert row.nll_gold == -row.logprobs[row.gold]
    keys = (
        items[items.task == "mmlu"].groupby("shots").apply(lambda own: own[["subset", "item", "gold"]].values.tolist())
    )
    assert keys[0] == keys[2]


def test_equal_likelihoods_choose_the_first_and_nan_none(tokenizer: Any) -> None:
    task = tasks.Mmlu("mmlu", MMLU, [0])
    _, items = tasks.evaluate(Recorder(torch.zeros(VOCAB)), tokenizer, task, progress=False)
    assert set(items.choice) == {0}
    (score,), items = tasks.evaluate(Recorder(torch.full((VOCAB,), math.nan)), tokenizer, task, progress=False)
    assert (score.value, score.nonfinite, score.stderr) == (0.0, 10, 0.0)
    assert set(items.choice) == {-1}


def test_a_single_item_has_no_standard_error(tokenizer: Any) -> None:
    task = tasks.Mmlu("mmlu", MMLU, [0], limit=1, subjects=["astronomy"])
    (score,), _ = tasks.evaluate(Recorder(torch.zeros(VOCAB)), tokenizer, task, progress=False)
    assert (score.n, score.stderr) == (1, None)
    assert json.loads(json.dumps(score.as_dict()))["stderr"] is None


def test_every_forward_pass_runs_inside_the_given_precision(tokenizer: Any) -> None:
    entered = []

    @contextmanager
    def autocast() -> Any:
        entered.append(True)
        with torch.autocast("cpu", torch.bfloat16):
            yield

    model, task = random_model("llama"), tasks.Winogrande("winogrande", WINOGRANDE, [0], batch_tokens=64)
    _, exact = tasks.evaluate(model, tokenizer, task, progress=False)
    _, rounded = tasks.evaluate(model, tokenizer, task, autocast=autocast, progress=False)
    assert len(entered) > 1
    difference = np.abs(np.stack(exact.logprobs) - np.stack(rounded.logprobs))
    assert difference.max() > 0
    np.testing.assert_allclose(np.stack(rounded.logprobs), np.stack(exact.logprobs), **TOL[torch.bfloat16])
