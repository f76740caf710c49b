"""Arrays on disk that are made once, however many cells and processes ask for them.

A file is named by a hash of everything that its content depends on, so nothing in it can be out of date.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from lyapft import containment
from lyapft.records import write_atomically

log = logging.getLogger(__name__)
Made = TypeVar("Made")

ENTRY, DIGEST = "rows", "sha256"  # of the file's metadata: all that is no array, as JSON; of the arrays' bytes


@dataclass(frozen=True)
class Packed:
    """What is written of a value: arrays, and others that are plain JSON."""

    arrays: dict[str, NDArray[Any]]
    others: dict[str, Any] = field(default_factory=dict)


def cached(
    folder: Path,
    key: Mapping[str, Any],
    make: Callable[[], Made],
    pack: Callable[[Made], Packed],
    unpack: Callable[[Packed], Made],
) -> Made:
    """`make()`, or what an earlier call with this key left in the folder.

    Processes that ask for the same at the same time wait for the first one; a damaged file is made anew, with a
    warning.

    Args:
        folder: made if it is missing.
        key: all that the value depends on; JSON, or what has a telling `str`.
        unpack: the value that was packed; raises ValueError, TypeError, KeyError or IndexError for what cannot be one.
    Raises:
        InputError: the folder leads out of its parent; and whatever `make` raises, of which nothing is kept.
    """
    path = folder / f"{_name(key)}.safetensors"
    containment.check(folder.parent, [folder, path])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            try:
                return unpack(_read(path))
            except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
                log.warning("%s is damaged (%s): tokenising anew", path, error)
        made = make()
        _write(path, pack(made))
        return made


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that the ids of a text depend on, of a tokenizer with a Rust core (`is_fast`)."""
    added = tokenizer("")["input_ids"]  # first: a call sets what the core holds of truncation and padding
    core = tokenizer.backend_tokenizer.to_str()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, added]
    return {"core": hashlib.sha256(core.encode()).hexdigest(), "special": special}


def _name(key: Mapping[str, Any]) -> str:
    canonical = json.dumps(key, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _write(path: Path, packed: Packed) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in packed.arrays.items()}
    metadata = {ENTRY: json.dumps(packed.others), DIGEST: _digest(arrays)}
    write_atomically(path, lambda target: save_file(arrays, target, metadata=metadata))


def _read(path: Path) -> Packed:
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.offset_keys()}
        if file.metadata()[DIGEST] != _digest(arrays):
            raise ValueError("its arrays are not those that were written")
        return Packed(arrays, json.loads(file.metadata()[ENTRY]))


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()
