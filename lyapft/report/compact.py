"""Records of a large study in little memory: what is equal in many of them is kept once.

A record of 12 KB of JSON takes 40 KB of Python objects, and most of it (versions, formats, settings, scores that take
few values) is the same in many cells. Nobody who reads a study changes its records, so they can share it.
"""

from collections.abc import Hashable
from typing import Any

from lyapft.records import Record

# parts of which a study has few different ones
COMMON = (
    "paths", "overrides", "choices", "environment", "files", "model", "precision", "recurrences_unknown", "data",
    "tasks", "peft", "kernels", "kernel_fallbacks", "error",
)  # fmt: skip


class Pool:
    """The values seen so far, each once."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, Any] = {}

    def one(self, value: Any) -> Any:
        """The first value that was equal to this one."""
        return self._seen.setdefault(repr(value), value)

    def shared(self, record: Record) -> Record:
        """The record with its parts replaced by equal ones of the records before it, in place.

        Of the recurrent layers' worst numbers only the worst layer's are kept: no report shows the others.
        """
        for key in COMMON:
            if key in record:
                record[key] = self.one(record[key])
        if isinstance(config := record.get("config"), dict):
            record["config"] = {key: self.one(value) for key, value in config.items()}
        if scores := record.get("scores"):
            record["scores"] = [self.one(score) for score in scores]
        for entry in record.get("divergence") or []:
            entry["per_score"] = [self.one(score) for score in entry.get("per_score") or []]
        if (layers := (record.get("stability") or {}).get("layers")) and len(layers) > 1:
            record["stability"]["layers"] = _worst(layers)
        return record


def _worst(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    measured = [layer for layer in layers if isinstance(layer.get("margin"), int | float)]
    return [min(measured, key=lambda layer: float(layer["margin"]))] if measured else layers[:1]
