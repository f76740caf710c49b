"""Records of a large study in little time and memory: a part that was seen before is not decoded again.

A record of 15 kB of JSON takes 40 kB of Python objects, and most of it (versions, formats, settings, scores that take
few values) is the same text in many cells. `records.save_json` begins a line with every member, indented by its depth,
and no JSON string holds a raw line break: so the text can be cut into its members without decoding it. A cut in a
wrong place leaves a bracket open, which the decoder refuses; such a text is then decoded as a whole.
Nobody who reads a study changes its records, so they can share their parts.
"""

import json
import sys
from typing import Any

DECODE = json.JSONDecoder().raw_decode
# parts of which a study has few different ones
COMMON = frozenset(
    {
        "schema_version", "paths", "overrides", "choices", "seed", "replicate", "environment", "files", "model",
        "precision", "recurrences_unknown", "data", "tasks", "peft", "kernels", "kernel_fallbacks", "error", "study",
        "status", "role", "resumed", "nonfinite", "scaler_skips",
    }
)  # fmt: skip
COMMON_OF_DIVERGENCE = frozenset({"counterpart", "reference_id", "status", "mean_abs_points"})


class Reader:
    """Decodes the records of a study; equal parts are one object."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[str, Any]] = {}  # text of a member: its name and value
        self._objects: dict[str, Any] = {}

    def decode(self, text: str) -> Any:
        """What `json.loads` gives, but of the recurrent layers' worst numbers only the worst layer's.

        Raises:
            ValueError, RecursionError: as `json.loads`.
        """
        try:
            made = self._object(text.rstrip(), 0, COMMON)
        except ValueError:  # not as lyapft lays it out, or no JSON at all
            made = json.loads(text)
        if isinstance(made, dict) and isinstance(stability := made.get("stability"), dict):
            made["stability"] = _worst_only(stability)
        return made

    def _object(self, text: str, depth: int, common: frozenset[str] | None = None) -> Any:
        """An object that begins at this depth of indentation; members of the names in `common` (None: all) are kept."""
        line = "\n" + "  " * (depth + 1) + '"'
        known, made = self._members, {}
        for member in _inside(text, "{" + line, "\n" + "  " * depth + "}").split("," + line):
            found = known.get(member)
            if found is None:
                found = self._member(member, depth)
                if common is None or found[0] in common:
                    known[member] = found
            made[found[0]] = found[1]
        return made

    def _member(self, text: str, depth: int) -> tuple[str, Any]:
        """Name and value of a member that was not kept."""
        name, colon, value = text.partition('": ')
        if not colon or "\\" in name:
            raise ValueError(f"no member: {text:.40}")
        name = sys.intern(name)
        if depth == 0 and name == "config":
            return name, self._object(value, 1)
        if depth == 0 and name == "divergence":
            return name, [self._object("{" + entry, 2, COMMON_OF_DIVERGENCE) for entry in _entries(value, 1)]
        if name in ("scores", "per_score"):
            known = self._objects
            return name, [known.get(entry) or self._new(entry) for entry in _entries(value, depth + 1)]
        return name, _named(_decoded(value))

    def _new(self, entry: str) -> Any:
        """The object of an entry that was not met before."""
        return self._objects.setdefault(entry, _decoded("{" + entry))


def _decoded(text: str) -> Any:
    """What `json.loads` gives, of a text without blanks around it: it looks for those for longer than it decodes.

    Raises:
        ValueError: no JSON, or blanks around it.
    """
    value, end = DECODE(text)
    if end != len(text):
        raise ValueError(f"laid out otherwise: {text:.40}")
    return value


def _entries(text: str, depth: int) -> list[str]:
    """Texts of the objects in a list that begins at this depth of indentation, without their first bracket.

    Raises:
        ValueError: not laid out as `records.save_json` does.
    """
    if text == "[]":
        return []
    line = "\n" + "  " * (depth + 1) + "{"
    return _inside(text, "[" + line, "\n" + "  " * depth + "]").split("," + line)


def _inside(text: str, first: str, last: str) -> str:
    if not (text.startswith(first) and text.endswith(last)):
        raise ValueError(f"laid out otherwise: {text:.40}")
    return text[len(first) : -len(last)]


def _named(part: Any) -> Any:
    """The same, the names of an object kept once: the decoder makes new ones for every record."""
    return {sys.intern(key): value for key, value in part.items()} if isinstance(part, dict) else part


def _worst_only(stability: dict[str, Any]) -> dict[str, Any]:
    """Without the layers but the one with the smallest margin."""
    layers = stability.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        return stability
    measured = [layer for layer in layers if isinstance(layer.get("margin"), int | float)]
    worst = [min(measured, key=lambda layer: float(layer["margin"]))] if measured else layers[:1]
    return stability | {"layers": [{key: layer.get(key) for key in ("layer", "margin")} for layer in worst]}
