"""Few-shot multiple choice: tasks make queries, `evaluate` makes scores and keeps every item."""

from lyapft.tasks.arc import Arc
from lyapft.tasks.base import Query, Score, Task
from lyapft.tasks.evaluation import context_faults, evaluate, faults
from lyapft.tasks.hellaswag import Hellaswag
from lyapft.tasks.mmlu import Mmlu
from lyapft.tasks.piqa import Piqa
from lyapft.tasks.skills import SkillsTask
from lyapft.tasks.suite import Suite
from lyapft.tasks.winogrande import Winogrande

__all__ = [
    "Arc",
    "Hellaswag",
    "Mmlu",
    "Piqa",
    "Query",
    "Score",
    "SkillsTask",
    "Suite",
    "Task",
    "Winogrande",
    "context_faults",
    "evaluate",
    "faults",
]
