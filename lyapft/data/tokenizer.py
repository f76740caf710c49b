"""The shipped checkpoints' tokenizer: byte-level BPE in which every letter of an episode is one token.

`python -m lyapft.data.tokenizer FOLDER` trains it again on the running Python's documentation.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from string import ascii_letters

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lyapft.data import pydoc
from lyapft.data.skills import RULES
from lyapft.errors import InputError

VOCABULARY = 1024
END, PAD = "<|endoftext|>", "<|padding|>"
# often enough to be among the merges that the vocabulary has room for
FORCED_REPEATS = 20_000


def _forced() -> dict[str, int]:
    """Words that have to be single tokens, with the number of times that they are shown to the trainer."""
    letters = {f" {letter}": FORCED_REPEATS for letter in ascii_letters}
    names = {form: FORCED_REPEATS // 4 for rule in RULES for form in (rule, f" {rule}")}
    return {**letters, " ->": FORCED_REPEATS, **names}


def train(texts: Iterator[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE with end-of-text and padding tokens.

    Raises:
        InputError: the vocabulary is too small for the forced tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(texts), trainer)
    split = [word for word in _forced() if len(tokenizer.encode(word).ids) != 1]
    if split:
        raise InputError(f"a vocabulary of {vocabulary} has no room for {split}: enlarge it")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD)


def _corpus(texts: Iterator[str]) -> Iterator[str]:
    yield from texts
    for word, count in _forced().items():
        yield from _repeated(word, count)


def _repeated(word: str, count: int, at_once: int = 1000) -> Iterator[str]:
    # a line break keeps the repeats of a word that does not begin with a space apart
    joint = "" if word.startswith(" ") else "\n"
    for _ in range(count // at_once):
        yield joint.join([word] * at_once)


if __name__ == "__main__":
    train(iter(pydoc.texts())).save_pretrained(Path(sys.argv[1]))
