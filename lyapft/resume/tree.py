"""A nested state as JSON beside flat tensors, and back: what safetensors can hold, and nothing that could run code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

KIND = "#"  # key of the JSON objects that stand for something else than a dict with text keys


def pack(state: Any) -> tuple[str, dict[str, Tensor]]:
    """Nested dicts, lists, tuples, numbers, text, arrays and tensors as JSON text, and the tensors by number.

    Raises:
        TypeError: anything else, with its place.

    >>> text, tensors = pack({"rate": 0.1, 3: (torch.tensor([1.0]), None)})
    >>> unpack(text, tensors)
    {'rate': 0.1, 3: (tensor([1.]), None)}
    """
    tensors: dict[str, Tensor] = {}
    return json.dumps(_encoded(state, "state", tensors)), tensors


def unpack(text: str, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given; numbers keep every bit, tuples stay tuples."""
    return _decoded(json.loads(text), tensors)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the text and every tensor's name, format, shape and bytes."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _encoded(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        name = str(len(tensors))
        tensors[name] = _own(value if isinstance(value, Tensor) else torch.from_numpy(value))
        return {KIND: "tensor" if isinstance(value, Tensor) else "array", "name": name}
    if isinstance(value, np.generic):
        return _encoded(value.item(), place, tensors)
    if isinstance(value, list | tuple):
        items = [_encoded(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {KIND: "tuple", "items": items}
    if isinstance(value, Mapping):
        pairs = [[key, _encoded(item, f"{place}[{key!r}]", tensors)] for key, item in value.items()]
        wrong = [key for key, _ in pairs if not isinstance(key, str | int)]
        if wrong:
            raise TypeError(f"{place} has the key {wrong[0]!r}: a checkpoint knows text and integers")
        return {KIND: "dict", "items": pairs}
    raise TypeError(f"{place} is a {type(value).__name__}: a checkpoint holds numbers, text, lists, dicts and tensors")


def _own(tensor: Tensor) -> Tensor:
    """The tensor in CPU memory that is no other's: safetensors refuses views of one storage."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value[KIND] == "tensor":
        return tensors[value["name"]]
    if value[KIND] == "array":
        return tensors[value["name"]].numpy()
    if value[KIND] == "tuple":
        return tuple(_decoded(item, tensors) for item in value["items"])
    return {key: _decoded(item, tensors) for key, item in value["items"]}
