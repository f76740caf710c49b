"""Credentials in settings: found by the name of a field or the look of its value, refused, never repeated.

Settings are written into records, logs and dashboards; credentials belong in the environment (HF_TOKEN, WANDB_API_KEY),
which is written nowhere. Nothing here imports torch.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

HIDDEN = "(hidden)"
KEY = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE)
IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
# as the issuers of tokens mark them: Hugging Face, OpenAI and others, GitHub, AWS, private keys, W&B
VALUE = re.compile(
    r"\bhf_\w{20,}|\bsk-[\w-]{20,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bwandb_v\d_\w{20,}"
)
SHORTEST = 8  # characters of a variable's value: a shorter one could be an ordinary word


def faults(settings: Any, overrides: Iterable[str] = ()) -> list[str]:
    """One sentence for each setting that looks like a credential; its value is not in it.

    Args:
        settings: nested mappings and lists of plain values.
        overrides: `key=value` as typed, those of a sweep too.

    >>> faults({"model": {"dims": {"hub_token": "abc", "n_token": 3}}})[0].split(":")[0]
    'model.dims.hub_token looks like a credential'
    """
    known = _in_environment()
    names = [name for name, key, value in _leaves(settings) if _is_secret(key, value, known)]
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        if _is_secret(name.rpartition(".")[2], value, known):
            names.append(name)
    return [
        f"{name} looks like a credential: settings are written into records and logs. Take it out, and put it into the "
        "environment instead (HF_TOKEN, WANDB_API_KEY)"
        for name in dict.fromkeys(names)
    ]


def without(value: Any, key: str = "") -> Any:
    """The same nested value with everything that looks like a credential hidden.

    >>> without({"hub_token": "abc", "batch_tokens": 8192, "path": "https://me:pw@host/x"})
    {'hub_token': '(hidden)', 'batch_tokens': 8192, 'path': 'https://(hidden)@host/x'}
    """
    if isinstance(value, Mapping):
        return {str(name): without(inner, str(name)) for name, inner in value.items()}
    if value is not None and KEY.search(key):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [without(inner) for inner in value]
    if isinstance(value, str):
        name, equals, _ = value.partition("=")  # an override such as model.hub_token=abc
        if equals and KEY.search(name.rpartition(".")[2]):
            return f"{name}={HIDDEN}"
        return IN_URL.sub(HIDDEN, value)
    return value


def _leaves(value: Any, name: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted name, last key, value) of everything that is no container."""
    if isinstance(value, Mapping):
        for inner_key, inner in value.items():
            yield from _leaves(inner, f"{name}.{inner_key}".lstrip("."), str(inner_key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{index}]", key)
    else:
        yield name, key, value


def _is_secret(key: str, value: Any, known: set[str]) -> bool:
    """Numbers are settings (`experiment.token=8`); a text is a secret by its field, its look, or as a known one."""
    if not isinstance(value, str) or value in ("", "null"):
        return False
    named = bool(KEY.search(key)) and not re.fullmatch(r"[\d,\s.]+", value)
    return named or bool(VALUE.search(value) or IN_URL.search(value)) or any(secret in value for secret in known)


def _in_environment() -> set[str]:
    """Values of the variables that hold credentials by their names."""
    return {value for name, value in os.environ.items() if KEY.search(name) and len(value) >= SHORTEST}
