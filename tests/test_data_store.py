"""Tokenised data on disk: the same rows, made once over processes, never taken for another's."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lyapft import cache
from lyapft.data import Example, Segment, store, tokenised
from lyapft.data.batches import build
from tests.test_data import Made, example, tokenizer

__all__ = ["tokenizer"]  # a fixture

PROMPTS = st.text(st.characters(max_codepoint=127), max_size=6)  # that leave room for a response
SETTINGS = {"name": "made", "content": "1f"}


def same(a: object, b: object) -> None:
    assert vars(a).keys() == vars(b).keys()
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype, name
            np.testing.assert_array_equal(value, other, err_msg=name)
        else:
            assert value == other, name


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.tuples(PROMPTS, st.text(min_size=1, max_size=12)), min_size=1, max_size=6),
    packed=st.booleans(),
    max_length=st.integers(8, 30),
)
def test_what_is_read_is_what_was_built(tmp_path_factory, tokenizer, texts, packed, max_length):
    source, folder = Made([example("p" + a, b) for a, b in texts], packed), tmp_path_factory.mktemp("tokens")
    built = build(source, tokenizer, max_length, "1f")
    same(tokenised(source, tokenizer, max_length, SETTINGS, folder), built)
    unread = Made([])  # whoever asked it for examples would find none
    same(tokenised(unread, tokenizer, max_length, SETTINGS, folder), built)


def other_end(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="b", pad_token="<pad>")


def test_other_settings_tokenizers_and_lengths_are_other_rows(tmp_path, tokenizer):
    first = Made([example("abc", "defgh")])
    tokenised(first, tokenizer, 20, SETTINGS, tmp_path)
    for changed in (
        (tokenizer, 6, SETTINGS),
        (tokenizer, 20, SETTINGS | {"content": "2e"}),
        (tokenizer, 20, SETTINGS | {"template": "x"}),
        (other_end(tokenizer), 20, SETTINGS),
    ):
        same(tokenised(first, *changed, tmp_path), build(first, changed[0], changed[1], changed[2]["content"]))
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other"])
def test_a_damaged_file_is_made_anew(tmp_path, tokenizer, caplog, damage):
    source = Made([Example("x", (Segment("ab", target=False), Segment("cd", target=True)))])
    rows = tokenised(source, tokenizer, 20, SETTINGS, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    if damage == "other":
        rows.starts = np.array([0, 1])
        cache._write(path, store._packed(rows))
    elif damage == "flipped":
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    else:
        path.write_bytes(path.read_bytes()[: 40 * (damage == "cut")])
    same(tokenised(source, tokenizer, 20, SETTINGS, tmp_path), build(source, tokenizer, 20, "1f"))
    assert "is damaged" in caplog.text
    caplog.clear()
    tokenised(source, tokenizer, 20, SETTINGS, tmp_path)
    assert not caplog.text


class Counted(Made):
    """Leaves a file for each time that its examples are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__([example("abc", "defgh")])
        self.folder = folder

    def examples(self) -> list[Example]:
        (self.folder / f"read-{os.getpid()}").touch()
        time.sleep(0.2)
        return super().examples()


def ask(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenised(Counted(folder), tokenizer, 20, SETTINGS, folder / "tokens")


def test_of_many_processes_one_tokenises(tmp_path, tokenizer):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ask, args=(tmp_path, tokenizer)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("read-*"))) == 1
