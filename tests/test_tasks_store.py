"""Encoded queries on disk: the same pairs, made once over cells, never taken for another's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

from lyapft import cache, cell, records, tasks
from lyapft.errors import InputError
from lyapft.tasks import store
from lyapft.tasks.base import Query, Task
from lyapft.tasks.encoding import encode_pairs
from lyapft.tasks.store import encoded
from tests.test_cell import prepared
from tests.tiny import HELLASWAG, MMLU, PIQA, WINOGRANDE, byte_tokenizer, random_model

TASKS: tuple[Task, ...] = (
    tasks.Mmlu("mmlu", MMLU, [0, 1, 2]),
    tasks.Winogrande("winogrande", WINOGRANDE, [0, 1]),
    tasks.Hellaswag("hellaswag", HELLASWAG, [0, 1]),
)


def never(*_: object) -> None:
    raise AssertionError("encoded anew")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("bos", [False, True])
def test_what_is_read_is_what_was_encoded(
    task: Task, bos: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = byte_tokenizer(bos)
    for shots in task.shots:
        queries = task.queries(shots)
        expected = encode_pairs(own, queries)
        assert encoded(own, queries, tmp_path / "tokens") == expected
        with monkeypatch.context() as patch:
            patch.setattr(store, "encode_pairs", never)
            assert encoded(byte_tokenizer(bos), task.queries(shots), tmp_path / "tokens") == expected
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == len(task.shots)


def test_whatever_changes_a_query_is_another_entry(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    task = tasks.Piqa("piqa", PIQA, [0])
    queries = task.queries(0)
    first, *rest = queries
    other_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<bot>")
    asked: list[tuple[PreTrainedTokenizerFast, list[Query]]] = [
        (tokenizer, queries),
        (tokenizer, task.queries(1)),
        (tokenizer, tasks.Piqa("piqa", PIQA, [0], limit=1).queries(0)),
        (tokenizer, queries[::-1]),
        (tokenizer, [replace(first, continuations=(f"{first.continuations[0]}.", *first.continuations[1:])), *rest]),
        # the same text, cut at another place
        (tokenizer, [replace(first, contexts=tuple(f"{text} x" for text in first.contexts)), *rest]),
        (tokenizer, [replace(first, continuations=tuple(f" x{text}" for text in first.continuations)), *rest]),
        (other_end, queries),
        (byte_tokenizer(bos=True), queries),
        (byte_tokenizer(texts=(first.contexts[0],)), queries),
    ]
    for own, some in asked:
        assert encoded(own, some, tmp_path) == encode_pairs(own, some)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(asked)
    renamed = [replace(query, task="another", gold=1, subset="x", item_id=7) for query in queries]
    assert encoded(tokenizer, renamed, tmp_path) == encode_pairs(tokenizer, queries)  # no part of what is encoded
    assert len(list(tmp_path.glob("*.safetensors"))) == len(asked)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "pickle", "other"])
def test_a_damaged_file_is_made_anew(
    damage: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    queries = TASKS[0].queries(1)
    expected = encoded(tokenizer, queries, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    if damage == "other":
        packed = cache._read(path)
        cache._write(path, cache.Packed(packed.arrays | {"halves": np.array([0, 1], np.int32)}))
    else:
        parts = {"cut": whole[:-4], "empty": b"", "flipped": whole[:-1] + b"\x07", "pickle": b"\x80\x04N."}
        path.write_bytes(parts[damage])
    assert encoded(tokenizer, queries, tmp_path) == expected
    assert "is damaged" in caplog.text
    caplog.clear()
    assert encoded(tokenizer, queries, tmp_path) == expected
    assert not caplog.text


def test_what_cannot_be_encoded_leaves_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    wrong = Query("made", 0, 0, ("a",), ("",), 0, "all")
    for _ in range(2):
        with pytest.raises(InputError, match="no token of its own"):
            encoded(tokenizer, [wrong], tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_scores_are_those_without_a_folder_to_the_bit(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_model("llama")
    scores, items = tasks.evaluate(model, tokenizer, TASKS, max_positions=4096, progress=False)
    for _ in range(2):
        again = tasks.evaluate(model, tokenizer, TASKS, max_positions=4096, folder=tmp_path, progress=False)
        assert again[0] == scores
        assert items.equals(again[1])


def test_a_task_is_encoded_once_for_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that it fits the model among them; what is read back gives the answers of what was encoded."""
    setting = ("model=llama_tiny", "trainer.steps=0", "reference=off")
    first = prepared(tmp_path / "runs", *setting, "precision=fp32")
    checked = {path.name for path in first.tokens.glob("*.safetensors")}
    assert len(checked) == 1  # the most shots
    assert cell.ensure(first)["status"] == "ok"
    assert first.tokens == tmp_path / "runs" / ".tokens"
    kept = {path.name for path in first.tokens.glob("*.safetensors")}
    assert checked < kept
    monkeypatch.setattr(store, "encode_pairs", never)
    again = prepared(tmp_path / "runs", *setting, "precision=fp32", "replicate=1")
    assert cell.ensure(again)["status"] == "ok"
    assert {path.name for path in first.tokens.glob("*.safetensors")} == kept
    tables = [pd.read_parquet(one.folder / records.ITEMS) for one in (first, again)]
    assert tables[0].equals(tables[1])
    assert again.folder != first.folder


def test_what_is_refused_keeps_no_queries(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        prepared(tmp_path / "runs", "model=llama_tiny", "study.name=../x")
    assert not any(tmp_path.iterdir())
