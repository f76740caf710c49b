"""What a record may have built, wherever it came from: classes of lyapft's own kinds, no code that came with a model.

A record holds the settings that its cell was made from, names of classes included; one from elsewhere could name
anything.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import get_class

from lyapft.errors import InputError
from lyapft.peft import Strategy
from lyapft.records import Record
from lyapft.tasks import Task

KINDS = (Strategy, Task)


def check(record: Record, settings: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Refuse settings of a record that would run other code than lyapft's, before anything is built from them.

    Args:
        record: named in the error.
        settings: by group, the parts of it that something is built from.
        trust_remote_code: as the present command says, not the record.
    Raises:
        InputError: a class that is neither a strategy nor a task, an interpolation, or a model's own code.
    """
    found = [fault for group, node in settings.items() for fault in _faults(node, group)]
    if found:
        raise InputError(f"the record of {record['name']} is refused, nothing was run:\n" + "\n".join(found))
    if settings["model"].get("trust_remote_code") and not trust_remote_code:
        raise InputError(
            f"{record['name']} was trained with code that came with its model. Read that code, then allow it here too "
            "(evaluate.py trust_remote_code=true, lyapft.peft merge --trust-remote-code); experiments do not run it"
        )


def _faults(node: Any, place: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_" and not _is_ours(value):
                yield f"  - {place} names {value!r}, which is neither a method of peft nor a task"
            else:
                yield from _faults(value, f"{place}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _faults(value, f"{place}[{index}]")
    elif isinstance(node, str) and "${" in node:
        yield f"  - {place} is an interpolation: the settings of a record are values"


def _is_ours(name: Any) -> bool:
    """Whether a class is of a kind, without importing what is neither lyapft's nor in the process already."""
    module = str(name).rpartition(".")[0]
    if not module.startswith("lyapft.") and module not in sys.modules:
        return False
    try:
        return issubclass(get_class(name), KINDS)
    except Exception:  # noqa: BLE001 - whatever the name makes Python do, it is none of ours
        return False
