"""Encoded queries on disk: a task is tokenised once, however many cells and processes are scored on it."""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lyapft.cache import Packed, cached, tokenizer_key
from lyapft.tasks.base import Query, content_hash
from lyapft.tasks.encoding import Pair, encode_pairs

FORMAT = 1  # raise it when the same queries give other pairs than before


def encoded(tokenizer: PreTrainedTokenizerBase, queries: Sequence[Query], folder: Path | None) -> list[list[Pair]]:
    """`encode_pairs`, or what an earlier call of it left in the folder (see `cached`).

    The key is what is encoded, the texts themselves: whatever changes them, be it data, wording, shots, their choice or
    a limit, changes it too. A tokenizer that cannot be written down (one without a Rust core) is used anew each time.

    Args:
        folder: made if it is missing; None keeps nothing.
    Raises:
        InputError: as `encode_pairs`.
    """
    if folder is None or not tokenizer.is_fast:
        return encode_pairs(tokenizer, queries)
    texts = content_hash("queries", [[query.contexts, query.continuations] for query in queries])
    key = {"format": FORMAT, "queries": texts, "tokenizer": tokenizer_key(tokenizer)}
    choices = [len(query.contexts) for query in queries]
    return cached(
        folder, key, lambda: encode_pairs(tokenizer, queries), _packed, lambda packed: _pairs(packed, choices)
    )


def _packed(pairs: Sequence[Sequence[Pair]]) -> Packed:
    """Each different sequence of ids once, one after the other, and for each pair the places of its two."""
    places: dict[tuple[int, ...], int] = {}
    halves = [
        places.setdefault(ids, len(places))
        for choices in pairs
        for pair in choices
        for ids in (pair.context, pair.continuation)
    ]
    flat = np.fromiter((token for ids in places for token in ids), np.int32)
    starts = np.cumsum([0, *map(len, places)], dtype=np.int64)
    return Packed({"ids": flat, "starts": starts, "halves": np.array(halves, np.int32)})


def _pairs(packed: Packed, choices: Sequence[int]) -> list[list[Pair]]:
    ids, starts, halves = (packed.arrays[name] for name in ("ids", "starts", "halves"))
    if len(halves) != 2 * sum(choices) or len(ids) != starts[-1]:
        raise ValueError("its arrays do not fit together")
    bounds = starts.tolist()
    sequences = [tuple(ids[a:b].tolist()) for a, b in pairwise(bounds)]
    flat: Iterator[Pair] = (Pair(sequences[a], sequences[b]) for a, b in halves.reshape(-1, 2).tolist())
    return [list(islice(flat, n)) for n in choices]
