"""Tokenised data on disk: a data set is tokenised once, however many cells and processes train on it."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from lyapft import containment
from lyapft.data.batches import TokenDataset, build
from lyapft.data.examples import Source
from lyapft.records import write_atomically

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same text gives other rows than before
ARRAYS = ("ids", "is_target", "starts")
ENTRY = "rows"  # of the file's metadata: everything of a TokenDataset that is no array, as JSON


def tokenised(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    settings: Mapping[str, Any],
    folder: Path,
    progress: bool = False,
) -> TokenDataset:
    """`build`, or what an earlier call of it left in the folder.

    Processes that ask for the same rows at the same time wait for the first one. A tokenizer that cannot be written
    down (one without a Rust core) is used anew each time.

    Args:
        settings: of the data, its `content` among them: all that the rows depend on beside tokenizer and length.
        folder: made if it is missing.
    Raises:
        InputError: as `build`.
    """
    content = str(settings["content"])
    if not tokenizer.is_fast:
        return build(source, tokenizer, max_length, content, progress)
    path = folder / f"{_key(tokenizer, max_length, settings)}.safetensors"
    containment.check(folder.parent, [folder, path])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        found = _read(path) if path.exists() else None
        if found is None:
            found = build(source, tokenizer, max_length, content, progress)
            _write(path, found)
        return found


def _key(tokenizer: PreTrainedTokenizerBase, max_length: int, settings: Mapping[str, Any]) -> str:
    core = tokenizer.backend_tokenizer.to_str()
    parts = {
        "format": FORMAT,
        "data": settings,
        "max_length": max_length,
        "tokenizer": hashlib.sha256(core.encode()).hexdigest(),
        "special": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer("")["input_ids"]],
    }
    canonical = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _write(path: Path, rows: TokenDataset) -> None:
    entry = {f.name: getattr(rows, f.name) for f in fields(rows) if f.name not in ARRAYS}
    arrays = {name: np.ascontiguousarray(getattr(rows, name)) for name in ARRAYS}
    write_atomically(path, lambda target: save_file(arrays, target, metadata={ENTRY: json.dumps(entry)}))


def _read(path: Path) -> TokenDataset | None:
    """The rows of a file; None, with a warning, for one that is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            rows = TokenDataset(
                **json.loads(file.metadata()[ENTRY]), **{name: file.get_tensor(name) for name in ARRAYS}
            )
            if not len(rows.ids) == len(rows.is_target) == rows.starts[-1]:
                raise ValueError("its arrays do not fit together")
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        log.warning("%s is damaged (%s): tokenising anew", path, error)
        return None
    return rows
