"""Several tasks as one: a cell trains once and is scored on all of them."""

from dataclasses import dataclass, field
from typing import Any

from lyapft.errors import InputError
from lyapft.tasks.base import Query, Task, content_hash


@dataclass
class Suite(Task):
    """The queries of several tasks, each under its own name; scores are per task, as if each had been asked alone.

    Args:
        tasks: by name.
        names: which of them; None for all.
        path: none of its own; each task has one.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    names: list[str] | None = None

    def __post_init__(self) -> None:
        Task.__post_init__(self)
        if self.path is not None:
            raise InputError(
                f"task.path={self.path}: a suite has no file of its own, set task.tasks.NAME.path of its tasks: "
                f"{', '.join(self.tasks)}"
            )
        wanted = list(self.tasks) if self.names is None else list(self.names)
        if unknown := [name for name in wanted if name not in self.tasks]:
            raise InputError(f"task.names: {', '.join(unknown)} not in this suite; it has {', '.join(self.tasks)}")
        if not wanted:
            raise InputError(f"task.names is empty: name one or more of {', '.join(self.tasks)}")
        self.tasks = {name: self.tasks[name] for name in wanted}

    def queries(self, shots: int) -> list[Query]:
        """Queries of all tasks, in the suite's order."""
        return [query for task in self.tasks.values() for query in task.queries(shots)]

    def fingerprint(self) -> str:
        """sha256 of the tasks' contents."""
        return content_hash("suite", {name: task.fingerprint() for name, task in self.tasks.items()})

    def record(self) -> dict[str, Any]:
        """What was read of each task, and the counts of all."""
        parts = {name: task.record() for name, task in self.tasks.items()}
        counts = {key: sum(part[key] for part in parts.values()) for key in ("rows", "rows_bad")}
        return {"name": self.name, "hash": self.fingerprint()} | counts | {"tasks": parts}
