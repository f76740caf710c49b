"""Tokenised data on disk: a data set is tokenised once, however many cells and processes train on it."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lyapft.cache import Packed, cached, tokenizer_key
from lyapft.data.batches import TokenDataset, build
from lyapft.data.examples import Source

FORMAT = 2  # raise it when the same text gives other rows than before
ARRAYS = ("ids", "is_target", "starts")


def tokenised(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    settings: Mapping[str, Any],
    folder: Path,
    progress: bool = False,
) -> TokenDataset:
    """`build`, or what an earlier call of it left in the folder (see `cached`).

    A tokenizer that cannot be written down (one without a Rust core) is used anew each time.

    Args:
        settings: of the data, its `content` among them: all that the rows depend on beside tokenizer and length.
        folder: made if it is missing.
    Raises:
        InputError: as `build`.
    """
    content = str(settings["content"])

    def make() -> TokenDataset:
        return build(source, tokenizer, max_length, content, progress)

    if not tokenizer.is_fast:
        return make()
    key = {"format": FORMAT, "data": settings, "max_length": max_length, "tokenizer": tokenizer_key(tokenizer)}
    return cached(folder, key, make, _packed, _rows)


def _packed(rows: TokenDataset) -> Packed:
    others = {f.name: getattr(rows, f.name) for f in fields(rows) if f.name not in ARRAYS}
    return Packed({name: getattr(rows, name) for name in ARRAYS}, others)


def _rows(packed: Packed) -> TokenDataset:
    everything: dict[str, Any] = packed.others | packed.arrays
    rows = TokenDataset(**everything)
    if not len(rows.ids) == len(rows.is_target) == rows.starts[-1]:
        raise ValueError("its arrays do not fit together")
    return rows
