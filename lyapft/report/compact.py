"""Records of a large study in little memory: what is equal in many of them is kept once.

A record of 12 KB of JSON takes 40 KB of Python objects, and most of it (versions, formats, settings, scores that take
few values) is the same in many cells. Nobody who reads a study changes its records, so they can share it.
"""

import marshal
import sys
from typing import Any

from lyapft.records import Record

# parts of which a study has few different ones
COMMON = (
    "paths", "overrides", "choices", "environment", "files", "model", "precision", "recurrences_unknown", "data",
    "tasks", "peft", "kernels", "kernel_fallbacks", "error", "study", "status", "role",
)  # fmt: skip
NUMBERS = ("training", "stability", "cost", "shadow")  # different in every cell


class Pool:
    """The values seen so far, each once."""

    def __init__(self) -> None:
        self._seen: dict[bytes, Any] = {}

    def one(self, value: Any) -> Any:
        """The first value that was equal to this one."""
        return self._seen.setdefault(marshal.dumps(value, 2), value)  # bytes to compare by: nothing is loaded from them

    def shared(self, record: Record) -> Record:
        """The record with its parts replaced by equal ones of the records before it.

        Of the recurrent layers' worst numbers only the worst layer's are kept: no report shows the others.
        """
        made = {sys.intern(key): self.one(value) if key in COMMON else value for key, value in record.items()}
        for key in NUMBERS:
            if isinstance(part := made.get(key), dict):
                made[key] = _named(part)
        if isinstance(config := made.get("config"), dict):
            made["config"] = {sys.intern(key): self.one(value) for key, value in config.items()}
        if scores := made.get("scores"):
            made["scores"] = [self.one(score) for score in scores]
        if divergence := made.get("divergence"):
            made["divergence"] = [self._entry(entry) for entry in divergence]
        if layers := (made.get("stability") or {}).get("layers"):
            worst = _worst(layers)
            made["stability"]["layers"] = [{key: layer.get(key) for key in ("layer", "margin")} for layer in worst]
        return made

    def _entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        made = {
            key: self.one(value) if isinstance(value, str) else _named(value) if isinstance(value, dict) else value
            for key, value in _named(entry).items()
        }
        return made | {"per_score": [self.one(score) for score in entry.get("per_score") or []]}


def _named(part: dict[str, Any]) -> dict[str, Any]:
    """The same, its names kept once: the decoder makes new ones for every record."""
    return {sys.intern(key): value for key, value in part.items()}


def _worst(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    measured = [layer for layer in layers if isinstance(layer.get("margin"), int | float)]
    return [min(measured, key=lambda layer: float(layer["margin"]))] if measured else layers[:1]
