"""The embedded task: what does the rule of these lines make of three letters? New rules, and old ones (forgetting)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lyapft.data.skills import BASE_RULES, NEW_RULES, SkillQuery, query_set
from lyapft.errors import InputError
from lyapft.tasks.base import Query, Task, content_hash

MAX_SHOTS = 8  # each query carries this many, however few are shown: the queries do not change with task.shots
SHOT_RULE = "the first n of eight lines of the query's own rule, drawn with the query from the test split"


@dataclass
class SkillsTask(Task):
    """Two tasks, `skills_new` and `skills_old`; the wrong choices are what other rules of the set make of the letters.

    Args:
        new_rules, old_rules: the rule sets; an empty one is left out.
        items: queries per rule set; `limit` cuts them.
        named: write the rule's name in front of every line instead of leaving it to be inferred.
        task_seed: draws the queries.
    """

    new_rules: Sequence[str] = NEW_RULES
    old_rules: Sequence[str] = BASE_RULES
    items: int = 200
    named: bool = False
    task_seed: int = 0

    def __post_init__(self) -> None:
        Task.__post_init__(self)
        self.new_rules, self.old_rules = tuple(self.new_rules), tuple(self.old_rules)
        wrong = []
        if self.path is not None:
            wrong.append(
                f"task.path={self.path}: the skills are made up, not read; leave it out or choose another task="
            )
        if max(self.shots) > MAX_SHOTS:
            wrong.append(f"task.shots={self.shots}: the skills have at most {MAX_SHOTS} shots")
        if self.items < 1:
            wrong.append(f"task.items={self.items}: give a positive number of queries")
        if not self.new_rules and not self.old_rules:
            wrong.append("task.new_rules and task.old_rules are both empty: name at least four rules in one of them")
        if wrong:
            raise InputError("\n".join(wrong))

    @cached_property
    def _queries(self) -> dict[str, list[SkillQuery]]:
        # Different seeds: with one, both sets would ask about the same letters.
        sets = {"new": (self.new_rules, 2 * self.task_seed), "old": (self.old_rules, 2 * self.task_seed + 1)}
        drawn = {
            f"{self.name}_{name}": query_set(rules, self.items, MAX_SHOTS, seed, named=self.named)
            for name, (rules, seed) in sets.items()
            if rules
        }
        return {name: queries[: self.limit] for name, queries in drawn.items()}

    def queries(self, shots: int) -> list[Query]:
        """Queries of both rule sets; the subset is the rule."""
        return [
            Query(name, q.id, shots, (q.context(shots),) * len(q.choices), q.choices, q.gold, q.rule)
            for name, queries in self._queries.items()
            for q in queries
        ]

    def fingerprint(self) -> str:
        """sha256 of every query with all the shots that may be shown."""
        rows = [
            [name, q.id, q.context(max(self.shots)), list(q.choices), q.gold]
            for name, queries in self._queries.items()
            for q in queries
        ]
        return content_hash("skills", SHOT_RULE, rows)

    def record(self) -> dict[str, Any]:
        """Name, hash, counts and the shot rule."""
        rows = sum(map(len, self._queries.values()))
        return {
            "name": self.name,
            "hash": self.fingerprint(),
            "rows": rows,
            "rows_bad": 0,
            "subsets": list(self._queries),
            "shot_rule": SHOT_RULE,
        }
