"""Sources, their errors, tokens and batches."""

import ast
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from lyapft import config
from lyapft.data import Alpaca, Example, Mixture, Pydoc, Segment, Sharegpt, Skills, TextFile, pydoc
from lyapft.data.batches import IGNORE, Order, batches, build
from lyapft.data.examples import digest
from lyapft.data.skills import BASE_RULES, RULES, split_of
from lyapft.data.tokenizer import train
from lyapft.errors import InputError

GOOD = {"instruction": "Say hello", "input": "", "output": "Hello"}
CHOICES = ("skills", "mixture", "pydoc", "alpaca", "sharegpt", "text")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; 256 ends a text, 257 pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>", pad_token="<pad>")


class Made:
    """A source of given examples."""

    name, ordered, rows_bad = "made", False, 0

    def __init__(self, examples: list[Example], packed: bool = False) -> None:
        self.made, self.packed = examples, packed

    def examples(self) -> list[Example]:
        return self.made

    def fingerprint(self) -> str:
        return digest(self.made)


def example(prompt: str, answer: str, end: bool = True) -> Example:
    return Example("x", (Segment(prompt, target=False), Segment(answer, target=True, end=end)))


def write(folder: Path, name: str, content: object) -> str:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


def text_of(example: Example) -> str:
    return "".join(segment.text for segment in example.segments)


# sources


@pytest.mark.parametrize("layout", ["list", "lines"])
def test_alpaca_puts_the_loss_on_the_output(tmp_path, layout):
    rows = [GOOD, {"instruction": "Add", "input": "1 2", "output": "3", "extra": 7}]
    content = rows if layout == "list" else "\n".join(map(json.dumps, rows)) + "\n\n"
    source = Alpaca("alpaca", write(tmp_path, "a.json", content))
    first, second = source.examples()
    assert text_of(first) == "### Instruction:\nSay hello\n\n### Response:\nHello"
    assert text_of(second) == "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3"
    assert [s.target for s in second.segments] == [False, True]
    assert second.segments[1].end
    assert source.rows_bad == 0


def test_sharegpt_puts_the_loss_and_an_end_on_every_assistant_turn(tmp_path):
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "See you")]
    weights = iter([1, "one", None, [], {}])  # a key of no concern, with another type in every turn
    row = {"id": 3, "conversations": [{"from": who, "value": said, "weight": next(weights)} for who, said in turns]}
    (only,) = Sharegpt("sharegpt", write(tmp_path, "s.jsonl", json.dumps(row))).examples()
    assert text_of(only) == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant: See you"
    assert [s.text for s in only.segments if s.target] == [" Hello", " See you"]
    assert [s.text for s in only.segments if s.end] == [" Hello", " See you"]


def test_text_keeps_every_character_and_no_line_is_cut(tmp_path):
    content = "".join(f"line {i} of a longer text, with ünïcode\n" for i in range(900))
    (only,) = TextFile("text", write(tmp_path, "t.txt", content)).examples()
    assert len(only.segments) > 2
    assert text_of(only) == content
    assert all(s.target and s.text.endswith("\n") for s in only.segments)
    assert [s.end for s in only.segments] == [False] * (len(only.segments) - 1) + [True]


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    write(tmp_path, "b.jsonl", {**GOOD, "output": "second"})
    write(tmp_path, "a.json", [{**GOOD, "output": "first"}])
    write(tmp_path, "c.txt", "not read")
    assert [e.segments[1].text for e in Alpaca("alpaca", str(tmp_path)).examples()] == ["first", "second"]


def test_the_fingerprint_depends_on_content_never_on_the_path(tmp_path):
    rows = [GOOD, {**GOOD, "output": "Hi"}]
    (tmp_path / "deep").mkdir()
    one, other = write(tmp_path, "a.json", rows), write(tmp_path / "deep", "b.json", rows)
    changed = write(tmp_path, "c.json", [GOOD, {**GOOD, "output": "Hi!"}])
    prints = [Alpaca("alpaca", path).fingerprint() for path in (one, other, changed)]
    assert prints[0] == prints[1] != prints[2]


def test_few_bad_rows_are_counted_and_left_out_and_many_stop_the_run(tmp_path, caplog):
    rows = [GOOD] * 200
    rows[16], rows[90] = {**GOOD, "output": None}, {**GOOD, "instruction": 5}
    path = write(tmp_path, "a.json", rows)
    source = Alpaca("alpaca", path)
    assert len(list(source.examples())) == 198
    assert source.rows_bad == 2
    assert "2 of 200 rows (1.0%)" in caplog.text
    assert "row 17 (output is null)" in caplog.text
    rows[3] = {"instruction": "no output", "input": ""}
    path = write(tmp_path, "b.json", rows)
    stop = r"3 of 200 rows \(1.5%\).*row 4 \(output is missing\).*data.max_bad_fraction=0.02"
    with pytest.raises(InputError, match=stop):
        Alpaca("alpaca", path).fingerprint()
    assert Alpaca("alpaca", path, max_bad_fraction=0.02).rows_bad == 3
    assert [e.id for e in Alpaca("alpaca", path, max_bad_fraction=1.0, limit=4).examples()][-1] == "row 5"


BAD_FILES = {
    "invalid JSON list": (Alpaca, "a.json", '[\n{"instruction": "x",\n "input" 3}]', "a.json, line 3, .*invalid JSON"),
    "invalid JSON line": (Alpaca, "a.jsonl", f"{json.dumps(GOOD)}\n\n{{oops\n", r"a.jsonl, line 3, column 2: "),
    "empty": (Alpaca, "a.json", "", "a.json is empty"),
    "only blanks": (TextFile, "a.txt", " \n\n ", "a.txt is empty"),
    "no rows": (Alpaca, "a.json", "[]", "holds no rows"),
    "no objects": (Alpaca, "a.json", [[1, 2]], "row 1: expected an object"),
    "wrong columns": (Alpaca, "a.json", [{"prompt": "x", "output": "y"}], "no column instruction, input;.*prompt"),
    "wrong layout": (Sharegpt, "a.json", [GOOD], "no column conversations.*found instruction, input, output"),
    "no turns": (Sharegpt, "a.json", [{"conversations": []}], "conversations is not a list of turns"),
    "unknown speaker": (Sharegpt, "a.json", [{"conversations": [{"from": "cat", "value": ""}]}], "'cat' is"),
    "null turn": (Sharegpt, "a.json", [{"conversations": [{"from": "gpt", "value": None}]}], "1: value is null"),
    "all bad": (Alpaca, "a.json", [{**GOOD, "output": None}], "1 of 1 rows .100.0%."),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(tmp_path, case):
    kind, name, content, message = BAD_FILES[case]
    with pytest.raises(InputError, match=message):
        kind("x", write(tmp_path, name, content)).fingerprint()


def test_bad_paths_are_named(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    for source, message in [
        (Alpaca("alpaca"), "data=alpaca needs data.path"),
        (Alpaca("alpaca", "nowhere.json"), "data.path=nowhere.json does not exist"),
        (Alpaca("alpaca", str(tmp_path / "none")), "does not exist"),
        (Alpaca("alpaca", str(tmp_path)), "no .json or .jsonl or .parquet file"),
        (Alpaca("alpaca", "nobody/nothing"), r"nobody/nothing is no local file or folder.*check the path"),
        (TextFile("text", str(latin)), "byte 3: not UTF-8"),
    ]:
        with pytest.raises(InputError, match=message):
            source.fingerprint()
    with pytest.raises(InputError, match="max_bad_fraction=2"):
        Alpaca("alpaca", max_bad_fraction=2)


def test_every_choice_of_the_group_builds_its_source():
    config.register()
    cell = OmegaConf.create({"trainer": {"steps": 3000, "batch_size": 24}})  # the mixture is as long as the training
    built = {
        name: instantiate(OmegaConf.merge(cell, {"data": config.load_choice("data", name)}).data) for name in CHOICES
    }
    assert {name: type(source).__name__ for name, source in built.items()} == {
        "skills": "Skills",
        "mixture": "Mixture",
        "pydoc": "Pydoc",
        "alpaca": "Alpaca",
        "sharegpt": "Sharegpt",
        "text": "TextFile",
    }
    assert {source.name for source in built.values()} == set(CHOICES)
    assert [name for name, source in built.items() if source.ordered] == ["mixture"]
    # the defaults of the classes are those of the choices
    assert built["skills"] == Skills()
    assert built["mixture"] == Mixture()


# the interpreter's documentation


def test_docstrings_are_those_that_the_interpreter_shows():
    found = {doc.name: doc for doc in pydoc.docstrings()}
    assert found["json.dumps"].text == __import__("inspect").getdoc(json.dumps)
    assert found["json.dumps"].kind == "function"
    assert found["json"].kind == "module"
    assert found["ast.NodeVisitor"].kind == "class"
    assert found["ast.NodeVisitor"].text == __import__("inspect").getdoc(ast.NodeVisitor)


def test_pydoc_has_real_text_and_pairs_without_repeats():
    assert sum(map(len, pydoc.texts())) > 1_000_000
    answers = [answer for _, answer in pydoc.pairs()]
    assert len(answers) > 3000
    assert len(set(answers)) == len(answers)
    assert all(20 <= len(answer) <= 210 and "\n" not in answer for answer in answers)
    first = next(iter(Pydoc(limit=1).examples()))
    assert first.segments[0].text.startswith("Question: What does the Python ")
    assert first.segments[1].target
    assert not Pydoc().packed
    assert Pydoc(kind="text").packed
    for bad in ({"kind": "words"}, {"path": "x"}):
        with pytest.raises(InputError):
            Pydoc(**bad)


# the pretraining mixture


def test_the_mixture_has_its_shares_and_its_curriculum():
    source = Mixture(rows=3000, text_fraction=0.1, pairs_fraction=0.1)
    examples = list(source.examples())
    kinds = Counter(e.id.split()[0] for e in examples)
    assert len(examples) == 3000
    assert all(abs(kinds[k] / 3000 - 0.1) < 0.03 for k in ("text", "pair"))
    named = [(i, e.segments[0].text.split()[0] in RULES) for i, e in enumerate(examples) if e.id.startswith("episode")]
    for half, share in ((range(1500), 0.3), (range(1500, 3000), 0.1)):
        flags = [flag for i, flag in named if i in half]
        assert abs(np.mean(flags) - share) < 0.04
    episodes = [e for e in examples if e.id.startswith("episode")]
    assert all(split_of(tuple(s.text.split()[-4:-1])) == "train" for e in episodes[:200] for s in e.segments[::2])
    assert {e.segments[0].text.split()[0] for e in episodes} & set(RULES) == set(BASE_RULES)
    assert source.fingerprint() == digest(examples)


def test_the_mixture_names_its_faults():
    with pytest.raises(InputError, match=r"text_fraction=2.*\n.*together.*\n.*data.rows=0"):
        Mixture(rows=0, text_fraction=2)


# tokens


def test_only_targets_are_learned_and_responses_end(tokenizer):
    dataset = build(Made([example("ab", "cd"), example("e", "f", end=False)]), tokenizer, 10)
    ids = {i: tokenizer.convert_tokens_to_ids(i) for i in "abcdef"}
    first, second = dataset[0], dataset[1]
    end = tokenizer.eos_token_id
    assert first["input_ids"].tolist() == [ids["a"], ids["b"], ids["c"], ids["d"], end]
    assert first["labels"].tolist() == [IGNORE, IGNORE, ids["c"], ids["d"], end]
    assert second["labels"].tolist() == [IGNORE, ids["f"]]
    expected = {"rows": 2, "rows_dropped": 0, "rows_truncated": 0, "rows_bad": 0, "tokens": 7, "target_tokens": 4}
    assert dataset.record() == {"name": "made", "hash": dataset.hash, **expected}


def test_long_rows_lose_their_right_end_and_rows_without_a_response_are_dropped(tokenizer):
    rows = [example("12345", "67890"), example("1234567890", "x"), example("1", "2"), example("1234567", "8")]
    dataset = build(Made(rows), tokenizer, 8)
    assert [len(dataset[i]["input_ids"]) for i in range(3)] == [8, 3, 8]
    record = dataset.record()
    assert (record["rows"], record["rows_dropped"], record["rows_truncated"]) == (3, 1, 2)
    assert tokenizer.eos_token_id not in dataset[0]["input_ids"].tolist()
    with pytest.raises(InputError, match=r"no row is left.*max_length=2.*raise data.max_length"):
        build(Made([example("123", "4")]), tokenizer, 2)


def test_a_target_without_anything_before_it_is_not_counted(tokenizer):
    record = build(Made([Example("x", (Segment("abc", target=True),))]), tokenizer, 8).record()
    assert (record["tokens"], record["target_tokens"]) == (3, 2)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), max_length=st.integers(2, 12))
def test_blocks_hold_the_stream_in_order(tokenizer, lengths, max_length):
    texts = ["abcdefghijklmnopqrstuvwxyz"[: n % 26] + "." * (n // 26 + 1) for n in lengths]
    source = Made([Example("x", (Segment(text, target=True, end=True),)) for text in texts], packed=True)
    stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    dataset = build(source, tokenizer, max_length)
    kept = len(stream) - (len(stream) % max_length == 1)
    assert dataset.ids.tolist() == stream[:kept]
    assert dataset.is_target.all()
    assert all(len(dataset[i]["input_ids"]) == max_length for i in range(len(dataset) - 1))


def test_a_begin_token_goes_first_where_the_tokenizer_adds_one(tokenizer):
    copied = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    begins = PreTrainedTokenizerFast(tokenizer_object=copied, eos_token="<end>", bos_token="<begin>")
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begins.bos_token_id)]
    )
    row = build(Made([example("a", "b")]), begins, 8)[0]
    assert row["input_ids"][0] == begins.bos_token_id
    assert row["labels"].tolist()[:2] == [IGNORE, IGNORE]
    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(InputError, match="no end-of-text token"):
        build(Made([example("a", "b")]), endless, 8)


# batches


def made_rows(n: int) -> Made:
    return Made([example("a" * (1 + i % 5), f"{i} is the answer") for i in range(n)])


def test_batches_pad_on_the_right_and_padding_costs_nothing(tokenizer):
    dataset = build(made_rows(9), tokenizer, 32)
    (batch,) = batches(dataset, 9, 1, 0)
    rows = batch.pop("rows")
    assert sorted(rows.tolist()) == list(range(9))
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        assert torch.equal(ids[mask.bool()], dataset[int(row)]["input_ids"])
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (batch["input_ids"].shape, torch.int64)
    )
    for ids, mask, labels in zip(*batch.values(), strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert (ids[length:] == tokenizer.pad_token_id).all()
        assert (labels[length:] == IGNORE).all()
    logits = torch.randn(*batch["labels"].shape, len(tokenizer), dtype=torch.float64)
    padded = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)
    picked = logits.log_softmax(-1)[batch["labels"] != IGNORE]
    expected = -picked.gather(1, batch["labels"][batch["labels"] != IGNORE][:, None]).mean()
    torch.testing.assert_close(padded, expected)


def order(dataset, batch_size, steps, seed):
    return [tokens["input_ids"].tolist() for tokens in batches(dataset, batch_size, steps, seed)]


def test_the_order_comes_from_the_seed_alone(tokenizer):
    dataset = build(made_rows(11), tokenizer, 32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = order(dataset, 4, 6, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(3)
    assert order(dataset, 4, 6, seed=0) == first != order(dataset, 4, 6, seed=1)
    assert order(dataset, 4, 3, seed=0) == first[:3]


@given(
    rows=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    steps=st.integers(1, 20),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
)
def test_every_row_comes_once_per_pass(rows, batch_size, steps, seed, shuffle):
    drawn = list(Order(rows, batch_size, steps, seed, shuffle))
    assert [len(batch) for batch in drawn] == [batch_size] * steps
    stream = [row for batch in drawn for row in batch]
    for start in range(0, len(stream), rows):
        whole = stream[start : start + rows]
        assert len(set(whole)) == len(whole)
        assert shuffle or whole == list(range(len(whole)))


def test_a_source_whose_order_counts_is_not_shuffled(tokenizer):
    source = made_rows(8)
    source.ordered = True
    dataset = build(source, tokenizer, 32)
    (batch,) = batches(dataset, 8, 1, seed=5)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == [len(dataset[i]["input_ids"]) for i in range(8)]


# the shipped tokenizer and checkpoints


def test_a_trained_tokenizer_has_whole_letters_and_rule_names(monkeypatch):
    monkeypatch.setattr("lyapft.data.tokenizer.FORCED_REPEATS", 4000)  # enough beside so little text
    trained = train(iter(pydoc.texts()[:40]), 1024)
    for rule, line in (("reverse", "reverse a b c -> c B z"), ("flip", "flip x y z -> Z Y X")):
        assert trained.tokenize(line)[0] == rule
        assert len(trained.tokenize(line)) == 8
    text = "naïve — “quotes”\n\ttabs"
    assert trained.decode(trained(text)["input_ids"]) == text
    with pytest.raises(InputError, match="vocabulary of 300"):
        train(iter(["some words"]), 300)


@pytest.mark.parametrize("name", ["mamba_tiny", "mamba2_tiny", "pythia_tiny", "llama_tiny"])
def test_shipped_checkpoints_are_small_and_their_episodes_fit(root, name):
    from safetensors import safe_open
    from transformers import AutoTokenizer

    folder = root / "lyapft" / "checkpoints" / name
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 2_000_000
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert all(weights.get_tensor(key).dtype == torch.float32 for key in weights.keys())  # noqa: SIM118 - no mapping
    shipped = AutoTokenizer.from_pretrained(folder)
    assert len(shipped) == json.loads((folder / "config.json").read_text())["vocab_size"] == 1024
    record = build(Skills(rows=40, named_fraction=0.5), shipped, 64).record()
    assert (record["rows"], record["rows_truncated"], record["rows_dropped"]) == (40, 0, 0)
    assert (folder / "tokenizer.json").read_bytes() == (folder.parent / "mamba_tiny" / "tokenizer.json").read_bytes()


# real files


def test_real_files_build_at_size(shared_data, tokenizer):
    cases = [
        (Alpaca("alpaca", str(shared_data / "instruct/alpaca_en_demo.json")), 999),
        (Sharegpt("sharegpt", str(shared_data / "instruct/dummy_conversation.json")), 500),
    ]
    for source, rows in cases:
        record = build(source, tokenizer, 1024).record()
        assert record["rows"] + record["rows_dropped"] == rows
        assert record["rows_bad"] == 0
        assert 0 < record["target_tokens"] < record["tokens"]
    text = shared_data / "text/tinyshakespeare.txt"
    (whole,) = TextFile("text", str(text)).examples()
    assert text_of(whole) == text.read_text(encoding="utf-8")
