"""Examples → tokens → batches.

Letters: B rows of a batch, L tokens. Labels are −100 wherever no loss counts: prompts and padding.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lyapft.data.examples import Example, Source
from lyapft.errors import InputError

IGNORE = -100
CHUNK = 2000  # examples tokenised in one call

Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]  # ids and which of them are targets


@dataclass
class TokenDataset(Dataset[dict[str, Tensor]]):
    """Tokenised rows, kept flat: row i is `ids[starts[i]:starts[i + 1]]`, `is_target` alike; `first` numbers them."""

    name: str
    hash: str
    ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]
    starts: NDArray[np.int64]
    pad_id: int
    ordered: bool = False
    rows_dropped: int = 0
    rows_truncated: int = 0
    rows_bad: int = 0
    first: int = 0

    @classmethod
    def of(cls, kept: Sequence[Tokens], **others: Any) -> "TokenDataset":
        """Rows one after the other, and the other fields."""
        return cls(
            ids=np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in kept)]),
            is_target=np.concatenate([np.empty(0, np.bool_), *(is_target for _, is_target in kept)]),
            starts=np.cumsum([0, *(len(ids) for ids, _ in kept)], dtype=np.int64),
            **others,
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels` of one row, int64, and `row`, its number."""
        row = slice(self.starts[index], self.starts[index + 1])
        ids = torch.from_numpy(self.ids[row].astype(np.int64))
        labels = ids.masked_fill(~torch.from_numpy(self.is_target[row]), IGNORE)
        return {"input_ids": ids, "labels": labels, "row": torch.tensor([self.first + index])}

    def split(self, held_out: int) -> tuple["TokenDataset", "TokenDataset | None"]:
        """All rows but the last `held_out`, and those; None where none are held out.

        Raises:
            InputError: too few rows for that.
        """
        if not held_out:
            return self, None
        if held_out >= len(self):
            raise InputError(
                f"trainer.validation_rows={held_out} leaves nothing of the {len(self)} rows of {self.name} to train on"
            )
        cut = len(self) - held_out
        middle = self.starts[cut]
        first = replace(self, ids=self.ids[:middle], is_target=self.is_target[:middle], starts=self.starts[: cut + 1])
        last = replace(
            self,
            ids=self.ids[middle:],
            is_target=self.is_target[middle:],
            starts=self.starts[cut:] - middle,
            first=self.first + cut,
        )
        return first, last

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows padded on the right to the longest: `input_ids`, `attention_mask` and `labels`, each (B, L); `rows`."""
        shape = len(rows), max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE),
            "rows": torch.cat([row["row"] for row in rows]),
        }
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = row["input_ids"]
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, :length] = row["labels"]
        return batch

    def record(self) -> dict[str, Any]:
        """What a cell's record says of its data."""
        return {
            "name": self.name,
            "hash": self.hash,
            "rows": len(self),
            "rows_dropped": self.rows_dropped,
            "rows_truncated": self.rows_truncated,
            "rows_bad": self.rows_bad,
            "tokens": len(self.ids),
            "target_tokens": self.target_tokens,
        }

    @property
    def target_tokens(self) -> int:
        """Those that the loss can count: the first token of a row has nothing before it to be predicted from."""
        return int(self.is_target.sum() - self.is_target[self.starts[:-1]].sum())

    def batches(self, batch_size: int, steps: int, seed: int) -> "Batches":
        """See the function of this name."""
        return batches(self, batch_size, steps, seed)


def build(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    fingerprint: str | None = None,
    progress: bool = False,
) -> TokenDataset:
    """Tokenise a source into rows of at most `max_length` tokens.

    A longer example loses its right end; one that keeps no target is dropped. Packed sources are joined and cut into
    full blocks instead (the last one may be shorter). Every loss is counted.

    Args:
        fingerprint: of the source, if it is known already.
        progress: show a bar, once it takes longer than two seconds.
    Raises:
        InputError: the tokenizer has no end-of-text token, or no row is left.
    """
    bar = tqdm(source.examples(), f"tokens of {source.name}", unit=" rows", delay=2, leave=False, disable=not progress)
    counts = {"rows_dropped": 0, "rows_truncated": 0}
    kept = token_rows(bar, tokenizer, max_length, source.packed, counts)
    if not kept:
        raise nothing_left(source.name, max_length, counts["rows_dropped"], source.rows_bad)
    return TokenDataset.of(
        kept,
        name=source.name,
        hash=source.fingerprint() if fingerprint is None else fingerprint,
        pad_id=pad_id(tokenizer),
        ordered=source.ordered,
        rows_bad=source.rows_bad,
        **counts,
    )


def nothing_left(name: str, max_length: int, dropped: int, bad: int) -> InputError:
    """Why there is no row to train on."""
    return InputError(
        f"data {name}: no row is left to train on ({dropped} lost their whole response to "
        f"max_length={max_length}, {bad} had bad fields): raise data.max_length or check data.path"
    )


def token_rows(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packed: bool,
    counts: dict[str, int],
) -> list[Tokens]:
    """The rows that some examples make; what is lost is added to `counts`.

    Raises:
        InputError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json")
    tokenised = _tokenise(examples, tokenizer)
    return list(_blocks(tokenised, max_length) if packed else _cut(tokenised, max_length, counts))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that rows are padded with."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return cast(int, token)


def _tokenise(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Each example's tokens, segment by segment, behind a begin-of-text token where the tokenizer adds one."""
    eos = tokenizer.eos_token_id
    prefix = _prefix(tokenizer)
    examples = iter(examples)
    while chunk := list(islice(examples, CHUNK)):
        texts = list({segment.text: None for example in chunk for segment in example.segments})
        encoded = dict(zip(texts, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True))
        for example in chunk:
            ids = list(prefix) if example.begins else []
            is_target = [False] * len(ids)
            for segment in example.segments:
                piece = encoded[segment.text] + [eos] * segment.end
                ids += piece
                is_target += [segment.target] * len(piece)
            yield np.array(ids, dtype=np.int32), np.array(is_target, dtype=np.bool_)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of every text; asked of it, since tokenizers declare it in different ways."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return list(whole[:start])


def _cut(tokenised: Iterable[Tokens], max_length: int, counts: dict[str, int]) -> Iterator[Tokens]:
    """One row per example, its right end cut off where it is too long; rows without a target to predict are dropped."""
    for ids, is_target in tokenised:
        too_long = len(ids) > max_length
        ids, is_target = ids[:max_length], is_target[:max_length]
        if not is_target[1:].any():
            counts["rows_dropped"] += 1
            continue
        counts["rows_truncated"] += too_long
        yield ids, is_target


def _blocks(tokenised: Iterable[Tokens], max_length: int) -> Iterator[Tokens]:
    """The examples as one stream, in blocks of `max_length` tokens; a last one of a single token teaches nothing."""
    pairs = list(tokenised)
    if not pairs:
        return
    ids, is_target = (np.concatenate(column) for column in zip(*pairs, strict=True))
    for start in range(0, len(ids), max_length):
        block = slice(start, start + max_length)
        if is_target[block][1:].any():
            yield ids[block], is_target[block]


class Order(Sampler[list[int]]):
    """`steps` batches of row numbers, from the seed alone; every row once per pass, passes joined without a gap.

    Of several processes each takes every `ranks`th batch, from its `rank` on: together they draw what one would draw.
    """

    def __init__(
        self, rows: int, batch_size: int, steps: int, seed: int, shuffle: bool = True, rank: int = 0, ranks: int = 1
    ) -> None:
        """
        Args:
            steps: batches in all, a multiple of `ranks`.
        """
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle
        self.steps, self.rank, self.ranks = steps // ranks, rank, ranks
        self.first = 0  # the batch that the next iteration starts with
        self.drawn = 0  # batches that the last iteration has given, those before its first included

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        self.drawn = self.first
        epoch, row = divmod(self.first * self.ranks * self.batch_size, self.rows)
        stream = islice(self._rows(epoch), row, None)
        while self.drawn < self.steps:
            self.drawn += 1
            batches = [list(islice(stream, self.batch_size)) for _ in range(self.ranks)]
            yield batches[self.rank]

    def _rows(self, epoch: int) -> Iterator[int]:
        while True:
            yield from shuffled(self.rows, self.seed, epoch) if self.shuffle else range(self.rows)
            epoch += 1


def shuffled(rows: int, seed: int, *of: int) -> list[int]:
    """The numbers of some rows in an order that a seed and the numbers of an epoch (and a part of it) give."""
    order = list(range(rows))
    random.Random(" ".join(map(str, ("order", seed, *of)))).shuffle(order)
    return order


class Batches(DataLoader[dict[str, Tensor]]):
    """A loader that Lightning can stop between two batches and take up there."""

    batch_sampler: Order
    dataset: TokenDataset

    def share(self, rank: int, ranks: int) -> "Batches":
        """What one of several processes takes of these batches."""
        whole = self.batch_sampler
        own = Order(whole.rows, whole.batch_size, whole.steps, whole.seed, whole.shuffle, rank, ranks)
        return _loader(self.dataset, own)

    def state_dict(self) -> dict[str, int]:
        """Batches given so far: without workers none is drawn ahead."""
        return {"drawn": self.batch_sampler.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start behind them; its length stays that of the whole."""
        self.batch_sampler.first = state["drawn"]


def batches(dataset: TokenDataset, batch_size: int, steps: int, seed: int) -> Batches:
    """`steps` batches of `input_ids`, `attention_mask` and `labels`, each (B, L), padded on the right.

    The order depends on the seed and the number of rows only; a source whose order is part of the data keeps it.
    """
    return _loader(dataset, Order(len(dataset), batch_size, steps, seed, shuffle=not dataset.ordered))


def _loader(dataset: TokenDataset, order: Order) -> Batches:
    # a generator of its own, or the loader would draw from the global one and shift whatever is drawn after it
    generator = torch.Generator().manual_seed(order.seed)
    return Batches(dataset, batch_sampler=order, collate_fn=dataset.collate, generator=generator)
