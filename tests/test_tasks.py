"""Few-shot tasks: queries as published, likelihoods equal to a one-row float64 loop, every fault of the input named."""

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torchmetrics.functional.classification import multiclass_accuracy
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lyapft import config, tasks
from lyapft.errors import InputError
from lyapft.tasks.base import Query, Task, content_hash, first_n
from lyapft.tasks.encoding import Pair, encode_pairs
from lyapft.tasks.metrics import ChoiceAccuracy
from lyapft.tasks.scoring import batches, log_likelihoods, share_rows
from tests.tolerances import TOL

FIXTURES = Path(__file__).parent / "fixtures"
MMLU, WINOGRANDE = str(FIXTURES / "mmlu"), str(FIXTURES / "winogrande.jsonl")
HELLASWAG, PIQA, ARC = (str(FIXTURES / f"{name}.jsonl") for name in ("hellaswag", "piqa", "arc"))
SINGLE_SPLIT = {tasks.Winogrande: WINOGRANDE, tasks.Hellaswag: HELLASWAG, tasks.Piqa: PIQA, tasks.Arc: ARC}
VOCAB = 300
SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "use_cache": False}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 4096}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **ATTENTION),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=4096),
    "gpt_neox": GPTNeoXConfig(**SMALL, **ATTENTION),
    "mamba": MambaConfig(**SMALL, state_size=4),
    "mamba2": Mamba2Config(**SMALL, state_size=4, head_dim=8, num_heads=4, n_groups=1, chunk_size=8),
}


def random_model(name: str, spread: float = 4.0, **changes: Any) -> PreTrainedModel:
    """A random model whose likelihoods differ clearly between tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | changes)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, spread / 4)
    return model


def byte_tokenizer(bos: bool = False, texts: tuple[str, ...] = (), vocabulary: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the spot; `bos` puts a beginning-of-text token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eot>", "<bot>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        texts or ("Answer: A Answer: B Answer: C Answer: D", "the of and a b c ->") * 20, trainer
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bot> $A", special_tokens=[("<bot>", 1)])
    special = {"eos_token": "<eot>"} | ({"bos_token": "<bot>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


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


class Recorder(torch.nn.Module):
    """A stand-in for a model: logits from a table by the last token, and the shape of every call."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        super().__init__()
        self.logits_V, self.shapes, self.kept = torch.nn.Parameter(logits_V), [], []

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool, logits_to_keep: int = 0
    ) -> SimpleNamespace:
        self.shapes.append(tuple(input_ids.shape))
        self.kept.append(logits_to_keep)
        assert not use_cache
        return SimpleNamespace(logits=self.logits_V.expand(*input_ids[:, -logits_to_keep:].shape, -1))


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


# --- the tasks -------------------------------------------------------------------------------------------------------


def test_mmlu_asks_as_published() -> None:
    first = tasks.Mmlu("mmlu", MMLU, [1]).queries(1)[0]
    expected = (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        "Which of these bodies gives off its own light?\n"
        "A. A moon\nB. A star\nC. A comet\nD. An asteroid\nAnswer: B\n\n"
        "What does a light year measure?\n"
        "A. Time\nB. Distance\nC. Brightness\nD. Mass\nAnswer:"
    )
    assert first.contexts == (expected,) * 4
    assert (first.continuations, first.gold, first.subset) == ((" A", " B", " C", " D"), 1, "astronomy")


def test_mmlu_keeps_subjects_apart_and_limits_each() -> None:
    asked = tasks.Mmlu("mmlu", MMLU, [0], limit=3).queries(0)
    assert [(q.subset, q.item_id) for q in asked] == [
        (s, i) for s in ("astronomy", "computer_security") for i in range(3)
    ]
    assert "about computer security." in asked[-1].contexts[0]
    assert {q.subset for q in tasks.Mmlu("mmlu", MMLU, [0], subjects=["computer_security"]).queries(0)} == {
        "computer_security"
    }


def test_winogrande_fills_the_blank_and_never_shows_the_scored_row() -> None:
    task = tasks.Winogrande("winogrande", WINOGRANDE, [5])
    zero, five = task.queries(0), task.queries(5)
    assert zero[1].contexts == ("Ben lent Carl his coat because Ben", "Ben lent Carl his coat because Carl")
    assert zero[1].continuations == (" was freezing in the wind.",) * 2
    for query in five:
        shown, _, asked = query.contexts[0].rpartition("\n\n")
        assert len(shown.split("\n\n")) == 5
        assert not any(line.startswith(asked.removesuffix(" Ben")) for line in shown.split("\n\n"))
    assert "jug" not in five[6].contexts[0].rpartition("\n\n")[0]  # row 7 repeats row 1: neither is shown to the other
    assert five[0].contexts[0].startswith("Ben lent Carl his coat because Carl was freezing in the wind.\n\n")


@pytest.mark.parametrize(
    ("make", "context", "continuations", "gold"),
    [
        (
            tasks.Hellaswag,
            "Home and Garden: How to plant tulips. Choose the place Tulips like sun.",
            (
                "  Dig holes of a hand's depth.",  # the marks' spaces stay, as in lm-eval
                " Freeze the sun for later.. Wait",
                " Sell the garden.",
                "  Never use soil",
            ),
            0,
        ),
        (tasks.Piqa, "Question: chair\nAnswer:", (" can be mended with a carrot", " can be mended with wood glue"), 1),
        (
            tasks.Arc,
            "Question: Which force pulls an apple to the ground?\nAnswer:",
            (" gravity", " friction", " magnetism"),
            0,
        ),
    ],
)
def test_answers_follow_their_prompt_as_published(
    make: type[Task], context: str, continuations: tuple[str, ...], gold: int
) -> None:
    asked = make("x", SINGLE_SPLIT[make], [0]).queries(0)
    (query,) = [q for q in asked if q.contexts[0] == context]
    assert query.contexts == (context,) * len(continuations)
    assert (query.continuations, query.gold) == (continuations, gold)
    assert query.lengths == tuple(len(text) - 1 for text in continuations)


@pytest.mark.parametrize("make", SINGLE_SPLIT)
def test_the_first_rows_are_the_shots_and_never_the_scored_one(make: type[Task]) -> None:
    task = make("x", SINGLE_SPLIT[make], [0, 4])
    bare, shown = task.queries(0), task.queries(4)
    for zero, four in zip(bare, shown, strict=True):
        heads = {four.contexts[i].removesuffix(zero.contexts[i]) for i in range(len(zero.contexts))}
        (head,) = heads
        solved = zero.contexts[zero.gold] + zero.continuations[zero.gold] + "\n\n"
        assert head.count("\n\n") == 4
        assert solved not in head
        firsts = [q.contexts[q.gold] + q.continuations[q.gold] + "\n\n" for q in bare]
        assert head == "".join([text for text in firsts if text != solved][:4])


def test_arc_reads_its_authors_layout_and_number_labels(tmp_path: Path) -> None:
    def nested(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
        choices = [{"text": text, "label": label} for text, label in pairs]
        return {
            "id": row["id"],
            "question": {"stem": row["question"], "choices": choices},
            "answerKey": row["answerKey"],
        }

    rows = [json.loads(line) for line in Path(ARC).read_text(encoding="utf-8").splitlines()]
    other = tmp_path / "arc.jsonl"
    other.write_text("".join(json.dumps(nested(row)) + "\n" for row in rows), encoding="utf-8")
    flat, theirs = tasks.Arc("arc", ARC, [0, 3]), tasks.Arc("arc", str(other), [0, 3])
    assert flat.queries(3) == theirs.queries(3)
    assert flat.fingerprint() == theirs.fingerprint()
    assert sorted({len(q.continuations) for q in flat.queries(0)}) == [3, 4, 5]
    assert [flat.queries(0)[i].gold for i in (1, 6)] == [2, 1]  # labelled 1 to 4


def test_piqa_reads_its_authors_labels_beside_the_rows(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(PIQA).read_text(encoding="utf-8").splitlines()]
    bare = tmp_path / "valid.jsonl"
    texts = [{k: v for k, v in row.items() if k != "label"} for row in rows]
    bare.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    labels = tmp_path / "valid-labels.lst"
    labels.write_text("".join(f"{row['label']}\n" for row in rows), encoding="utf-8")
    assert tasks.Piqa("p", str(bare), [2]).fingerprint() == tasks.Piqa("p", PIQA, [2]).fingerprint()
    labels.write_text("0\n1\n", encoding="utf-8")
    with pytest.raises(InputError, match="2 labels for 8 rows"):
        tasks.Piqa("p", str(bare), [0]).queries(0)
    labels.unlink()
    with pytest.raises(InputError, match="column label is missing"):
        tasks.Piqa("p", str(bare), [0]).queries(0)


def test_the_normalised_choice_is_the_likeliest_per_character(tokenizer: Any) -> None:
    task = tasks.Arc("arc", ARC, [0])
    scores, items = tasks.evaluate(random_model("llama"), tokenizer, task, progress=False)
    lengths = [np.array(q.lengths) for q in task.queries(0)]
    expected = [int(np.argmax(np.array(row) / n)) for row, n in zip(items.logprobs, lengths, strict=True)]
    assert items.choice_norm.tolist() == expected != items.choice.tolist()
    assert [(s.metric, s.n) for s in scores] == [("acc", 8), ("acc_norm", 8)]
    assert scores[1].value == (items.choice_norm == items.gold).mean()
    (score, _), items = tasks.evaluate(Recorder(torch.full((VOCAB,), math.nan)), tokenizer, task, progress=False)
    assert (score.nonfinite, set(items.choice_norm)) == (8, {-1})


def test_skills_ask_new_and_old_rules_with_one_right_choice_each() -> None:
    task = tasks.SkillsTask("skills", shots=[0, 3], items=40)
    asked = {shots: task.queries(shots) for shots in (0, 3)}
    assert {q.task for q in asked[0]} == {"skills_new", "skills_old"}
    for bare, shown in zip(asked[0], asked[3], strict=True):
        assert shown.contexts[0].endswith(bare.contexts[0])
        assert shown.contexts[0].count("\n") == 3
        assert (bare.continuations, bare.gold, bare.item_id) == (shown.continuations, shown.gold, shown.item_id)
        assert len(set(bare.continuations)) == 4
        assert {len(choice) for choice in bare.continuations} == {6}
    golds = (
        np.bincount([q.gold for q in tasks.SkillsTask("skills", shots=[0], items=2000).queries(0)], minlength=4) / 4000
    )
    assert np.abs(golds - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / 4000)
    new, old = ({q.contexts[0] for q in asked[0] if q.task == name} for name in ("skills_new", "skills_old"))
    assert len(new & old) < 10  # 40 each of 1,600 inputs: by chance about one


def test_skill_queries_do_not_change_with_the_shots_or_the_limit() -> None:
    few, many = tasks.SkillsTask("skills", shots=[0], limit=5), tasks.SkillsTask("skills", shots=[0, 8])
    of = {(q.task, q.item_id): q for q in many.queries(0)}
    assert few.queries(0) == [of[q.task, q.item_id] for q in few.queries(0)]
    assert few.fingerprint() != many.fingerprint()


@pytest.mark.parametrize("make", [tasks.Mmlu, *SINGLE_SPLIT])
def test_the_fingerprint_is_of_content_never_of_path(make: type[Task], tmp_path: Path) -> None:
    source, name = (Path(MMLU), "test/astronomy_test.csv") if make is tasks.Mmlu else (Path(SINGLE_SPLIT[make]), "")
    copy = tmp_path / "elsewhere"
    for file in [source] if source.is_file() else source.rglob("*.csv"):
        target = copy / file.relative_to(source) if source.is_dir() else copy
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    before = make("x", str(source), [0, 2]).fingerprint()
    assert make("x", str(copy), [0, 2]).fingerprint() == before
    changed = copy / name if name else copy
    changed.write_text(changed.read_text(encoding="utf-8").replace(" the ", " one "), encoding="utf-8")
    assert make("x", str(copy), [0, 2]).fingerprint() != before


def test_first_n_and_hash_are_plain_functions_of_their_input() -> None:
    assert first_n([1, 2, 2, 3], 2, excluded=2) == [1, 3]
    assert first_n([1], 2) == [1]
    assert content_hash("é", 1) == content_hash("é", 1) != content_hash("e", 1)


CHOICES = {"skills": None, "mmlu": MMLU, "winogrande": WINOGRANDE, "hellaswag": HELLASWAG, "piqa": PIQA}
CHOICES |= {"arc_easy": ARC, "arc_challenge": ARC}


def test_every_choice_of_conf_is_tested(root: Path) -> None:
    assert {path.stem for path in (root / "conf" / "task").glob("*.yaml")} == {*CHOICES, "paper"}  # test_study_presets


@pytest.mark.parametrize(("name", "path"), CHOICES.items())
def test_every_choice_of_conf_makes_its_task(name: str, path: str | None, root: Path) -> None:
    config.register()
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        node = compose(overrides=[f"+task={name}", *([f"task.path={path}"] if path else [])]).task
    task = instantiate(node)
    assert (type(task).__name__.removesuffix("Task").lower(), task.name) == (name.split("_")[0], name)
    assert tasks.faults(node) == []
    if name.startswith("arc"):
        assert task.hub() == (
            "allenai/ai2_arc",
            {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}[name],
            "test",
        )


# --- bad input -------------------------------------------------------------------------------------------------------

CSV_ROW = "What?,a,b,c,d,A\n"
GOOD_LINE = '{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}\n'


def mmlu_folder(tmp_path: Path, test: str, dev: str | None = None) -> str:
    for split, text in (("test", test), ("dev", dev)):
        if text is not None:
            (tmp_path / split).mkdir()
            (tmp_path / split / f"logic_{split}.csv").write_text(text, encoding="utf-8")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("test", "dev", "shots", "message"),
    [
        ("", None, [0], r"logic_test\.csv: the file is empty"),
        ("What?,a,b,c,A\n", None, [0], "line 1: 5 fields, expected 6"),
        (CSV_ROW + "What?,a,b,c,d,E\n", None, [0], "line 2: the answer is 'E', expected one of A, B, C, D"),
        ("question,A,B,C,D,answer\n" + CSV_ROW, None, [0], "line 1: .*no header row: remove it"),
        (
            CSV_ROW * 3 + ",a,b,c,d,A\n",
            None,
            [0],
            "1 of 4 rows cannot be used, first logic: row 4 of test: the question is empty",
        ),
        (CSV_ROW, None, [0, 1], r"logic_dev\.csv: no such file"),
        (CSV_ROW, CSV_ROW, [0, 2], "subject logic has only 1 dev rows"),
    ],
)
def test_bad_mmlu_files_are_named(tmp_path: Path, test: str, dev: str | None, shots: list[int], message: str) -> None:
    task = tasks.Mmlu("mmlu", mmlu_folder(tmp_path, test, dev), shots)
    with pytest.raises(InputError, match=message):
        task.queries(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        (GOOD_LINE + "{oops\n", "line 2: invalid JSON"),
        (GOOD_LINE + "[1]\n", "line 2: expected a JSON object, found list"),
        ('{"text": "a _ b"}\n', "sentence, option1, option2, answer is missing. Expected .*; found text"),
        (GOOD_LINE.replace('"1"', '""'), "line 1: the answer is ''"),
        (GOOD_LINE.replace('"x"', "null"), "1 of 1 rows cannot be used, first line 1: option1 is None"),
        (GOOD_LINE * 4 + GOOD_LINE.replace("_", ""), "1 of 5 rows .*line 5: the sentence has 0 blanks"),
        (GOOD_LINE * 4 + GOOD_LINE.replace("_ b", "_"), "line 5: nothing follows the blank"),
        (GOOD_LINE, "has 1 usable rows, too few to show 1"),
        (GOOD_LINE * 3, "fewer than 1 rows differ from row 1"),
    ],
)
def test_bad_winogrande_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    task = tasks.Winogrande("winogrande", str(path), [1])
    with pytest.raises(InputError, match=message):
        task.queries(1)


HS = '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["x", "y"], "label": "0"}\n'
PQ = '{"goal": "g", "sol1": "x", "sol2": "y", "label": 0}\n'
AR = '{"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}\n'


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (
            tasks.Hellaswag,
            HS.replace('"0"', '""'),
            "line 1: the label is '', expected one of 0, 1 .*test split has none",
        ),
        (tasks.Hellaswag, HS.replace('"0"', "2"), "the label is 2"),
        (tasks.Hellaswag, HS.replace('"b"', "null"), "1 of 1 rows .*ctx_a is None"),
        (tasks.Hellaswag, HS.replace('["x", "y"]', '["x"]'), "at least two"),
        (tasks.Hellaswag, HS.replace('"y"', '"[step]"'), "nothing but layout marks"),
        (tasks.Piqa, PQ.replace(": 0", ": -1"), "the label is -1, expected 0 or 1"),
        (tasks.Piqa, PQ.replace('"y"', '" "'), "a choice is empty"),
        (tasks.Piqa, PQ.replace('"g"', "3"), "goal is 3, expected text"),
        (tasks.Arc, AR.replace('"answerKey": "A"', '"answerKey": "E"'), "the answerKey is 'E', expected one of A, B"),
        (tasks.Arc, AR.replace('["A", "B"]', '["A", "A"]'), "2 choices are labelled .*one label each"),
        (tasks.Arc, AR.replace('["A", "B"]', '["A"]'), "2 choices are labelled"),
        (tasks.Arc, AR.replace('"q"', "null"), "the question is None"),
        (tasks.Arc, AR.replace('"x"', "7"), "a choice is empty or no text"),
        (tasks.Arc, AR.replace('{"text": ["x", "y"], "label": ["A", "B"]}', '"x, y"'), "the choices are None"),
    ],
)
def test_bad_rows_of_the_other_tasks_are_named(tmp_path: Path, make: type[Task], text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        make("x", str(path), [0]).queries(0)


def test_a_few_bad_rows_are_counted_and_keep_the_others_in_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = Path(WINOGRANDE).read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([lines[0], GOOD_LINE.replace('"x"', "7"), *lines[1:]]), encoding="utf-8")
    task = tasks.Winogrande("winogrande", str(path), [0], max_bad_fraction=0.2)
    assert [q.item_id for q in task.queries(0)] == [0, *range(2, 11)]
    assert (task.record()["rows"], task.record()["rows_bad"]) == (10, 1)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"sentence": "caf\xe9 _"}')
    with pytest.raises(InputError, match="not UTF-8"):
        tasks.Winogrande("winogrande", str(path), [0]).queries(0)


@pytest.mark.parametrize("path", ["nowhere", MMLU])
def test_a_wrong_path_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=r"task\.path=.*file"):
        tasks.Winogrande("winogrande", path, [0]).queries(0)


def test_a_folder_without_subjects_and_an_unknown_subject_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no test/SUBJECT_test\.csv"):
        tasks.Mmlu("mmlu", str(tmp_path), [0]).queries(0)
    with pytest.raises(InputError, match=r"task\.subjects: alchemy not among .*astronomy, computer_security"):
        tasks.Mmlu("mmlu", MMLU, [0], subjects=["alchemy"]).queries(0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tasks.Winogrande, ("allenai/winogrande", "winogrande_xl", "validation")),
        (tasks.Hellaswag, ("Rowan/hellaswag", None, "validation")),
        (tasks.Piqa, ("baber/piqa", None, "validation")),
        (tasks.Arc, ("allenai/ai2_arc", "ARC-Easy", "test")),
    ],
)
def test_a_data_set_by_name_is_the_file_of_the_same_rows(
    make: type[Task], name: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in Path(SINGLE_SPLIT[make]).read_text(encoding="utf-8").splitlines()]
    asked: list[tuple[str | None, ...]] = []
    monkeypatch.setattr("lyapft.tasks.single_split.load_by_name", lambda *which: asked.append(which) or rows)
    task = make("x", None, [0, 2])
    assert task.fingerprint() == make("x", SINGLE_SPLIT[make], [0, 2]).fingerprint()
    assert asked == [name]
    rows[0].pop(next(iter(set(rows[0]) & set(task.COLUMNS))))
    with pytest.raises(InputError, match=f"{name[0]}: column .* is missing"):
        make("x", None, [0]).queries(0)


def test_an_unknown_subset_of_arc_is_refused() -> None:
    with pytest.raises(InputError, match=r"task\.subset=hard: use one of ARC-Easy, ARC-Challenge"):
        tasks.Arc("arc", ARC, [0], subset="hard")


@pytest.mark.parametrize("make", [tasks.Mmlu, *SINGLE_SPLIT])
def test_a_data_set_by_name_without_a_network_says_so(make: type[Task]) -> None:
    with pytest.raises(InputError, match=r"could not be loaded by name \(the hub cannot be reached.*task\.path="):
        make("x", None, [0]).queries(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": []}, r"task\.shots=\[\]"),
        ({"shots": [0, -1]}, r"task\.shots=\[0, -1\]"),
        ({"shots": [2, 2]}, "different numbers"),
        ({"shots": [9]}, "at most 8 shots"),
        ({"limit": 0}, r"task\.limit=0"),
        ({"batch_tokens": 0}, r"task\.batch_tokens=0"),
        ({"max_bad_fraction": 2.0}, r"task\.max_bad_fraction=2"),
        ({"items": 0}, r"task\.items=0"),
        ({"path": "x"}, r"task\.path=x: the skills are made up"),
        ({"new_rules": [], "old_rules": []}, "both empty"),
        ({"new_rules": ["fly"]}, "fly"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    node = OmegaConf.create({"_target_": "lyapft.tasks.SkillsTask", "name": "skills", **options})
    assert any(re.search(message, fault) for fault in tasks.faults(node))


def test_shots_that_do_not_fit_are_refused_before_work_starts(tokenizer: Any) -> None:
    task = tasks.Mmlu("mmlu", MMLU, [0, 1, 5])
    longest = {
        k: max(len(p.model_input()) for c in encode_pairs(tokenizer, task.queries(k)) for p in c) for k in (0, 1, 5)
    }
    assert tasks.context_faults(task, tokenizer, longest[5]) == []
    assert tasks.context_faults(task, tokenizer, None) == []
    (fault,) = tasks.context_faults(task, tokenizer, longest[5] - 1)
    assert f"with 5 shots the longest query of mmlu has {longest[5]} tokens" in fault
    assert "Use task.shots=[0, 1]" in fault
    with pytest.raises(InputError, match=r"task\.truncate=true"):
        tasks.evaluate(Recorder(torch.zeros(VOCAB)), tokenizer, task, max_positions=10, progress=False)
    task.truncate = True
    scores, _ = tasks.evaluate(Recorder(torch.zeros(VOCAB)), tokenizer, task, max_positions=longest[0], progress=False)
    assert [(score.shots, score.truncated > 0) for score in scores] == [(0, False), (1, True), (5, True)]
    assert scores[2].truncated == 10
