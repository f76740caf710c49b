"""Score a model on tasks, and say beforehand what would not fit."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from lyapft.errors import InputError, behind
from lyapft.tasks.base import Query, Score, Task
from lyapft.tasks.encoding import Pair
from lyapft.tasks.metrics import ChoiceAccuracy
from lyapft.tasks.scoring import Autocast, log_likelihoods, progress_bar
from lyapft.tasks.store import encoded

ITEM_COLUMNS = (
    "task",
    "subset",
    "item",
    "shots",
    "gold",
    "choice",
    "correct",
    "logprobs",
    "nll_gold",
    "tokens",
    "choice_norm",
)


def faults(cfg_task: DictConfig) -> list[str]:
    """Everything wrong with a task that its options and its data show; loads no tokenizer and no weights."""
    try:
        task: Task = instantiate(cfg_task)
        for shots in task.shots:
            task.queries(shots)
    except InputError as error:
        return str(error).splitlines()
    except InstantiationException as error:
        wrong = behind(error)
        if wrong is None:
            raise
        return str(wrong).splitlines()
    return []


def context_faults(
    tasks: Task | Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int | None,
    folder: Path | None = None,
) -> list[str]:
    """Shot counts whose longest query does not fit the model's positions; a task with `truncate` cuts instead.

    Args:
        folder: where encoded queries are kept; None keeps none.
    """
    found: list[str] = []
    if max_positions is None:
        return found
    for task in _several(tasks):
        most = max(task.shots)
        # A shot only lengthens a query, so where the most of them fit, nothing else needs to be measured.
        if task.truncate or _longest(task, most, tokenizer, folder) <= max_positions:
            continue
        lengths = {shots: _longest(task, shots, tokenizer, folder) for shots in sorted(task.shots)}
        over = {shots: n for shots, n in lengths.items() if n > max_positions}
        fitting = [shots for shots in lengths if shots not in over]
        found.append(
            f"task.shots={task.shots}: with {', '.join(map(str, over))} shots the longest query of {task.name} has "
            f"{max(over.values())} tokens, the model has {max_positions} positions. "
            + (f"Use task.shots={fitting}" if fitting else "Use a model with more positions")
            + " or task.truncate=true, which cuts the left as lm-eval does."
        )
    return found


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Task | Sequence[Task],
    *,
    batch_tokens: int | None = None,
    autocast: Autocast = nullcontext,
    trained_length: int | None = None,
    max_positions: int | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> tuple[list[Score], pd.DataFrame]:
    """Accuracy of every task at every number of shots, and every item behind it.

    The choice is the continuation with the highest log-likelihood, the first of equals (lm-eval's `acc`); with a NaN
    among them it is -1, which is wrong. Tasks whose queries carry `lengths` get a second score, `acc_norm`: the choice
    with the highest log-likelihood per character. The same inputs give the same scores; the model's mode is restored.

    Args:
        batch_tokens: padded tokens per forward pass; None takes each task's own.
        autocast: makes the context of a forward pass, such as a precision's `autocast` method.
        trained_length: longer items are counted in `Score.beyond_trained_length`.
        max_positions: where tasks with `truncate` cut.
        folder: where encoded queries are kept for other cells and processes; None keeps none.
    Returns:
        scores, and a frame with the columns ITEM_COLUMNS: `logprobs` are ln p per choice, `nll_gold` is -ln p of the
        right one, `tokens` the length of the longest choice's text, `choice_norm` the choice of acc_norm (missing
        where the task does not report it).
    Raises:
        InputError: a query does not fit, or its data is wrong.
    """
    if found := context_faults(tasks, tokenizer, max_positions, folder):
        raise InputError("\n".join(found))
    scores: list[Score] = []
    items: list[dict[str, Any]] = []
    with _evaluation_mode(model):
        for task in _several(tasks):
            for shots in task.shots:
                queries = task.queries(shots)
                pairs = encoded(tokenizer, queries, folder)
                flat = [pair for choices in pairs for pair in choices]
                cut = max_positions if task.truncate else None
                with progress_bar(len(flat), f"{task.name}, {shots} shots", progress) as bar:
                    values = log_likelihoods(
                        model,
                        flat,
                        batch_tokens=batch_tokens or task.batch_tokens,
                        max_positions=cut,
                        autocast=autocast,
                        progress=bar.update,
                    )
                rows = _items(queries, pairs, values)
                scores += _scores(rows, trained_length, cut)
                items += rows
    return scores, pd.DataFrame(items, columns=list(ITEM_COLUMNS)).astype({"choice_norm": "Int64"})


def _items(queries: Sequence[Query], pairs: Sequence[Sequence[Pair]], values: Sequence[float]) -> list[dict[str, Any]]:
    rows, start = [], 0
    for query, choices in zip(queries, pairs, strict=True):
        logprobs = list(values[start : start + len(choices)])
        start += len(choices)
        choice = _likeliest(logprobs)
        tokens = max(len(pair.model_input()) + 1 for pair in choices)
        row = (
            query.task,
            query.subset,
            query.item_id,
            query.shots,
            query.gold,
            choice,
            choice == query.gold,
            logprobs,
            -logprobs[query.gold],
            tokens,
            _likeliest(np.divide(logprobs, query.lengths)) if query.lengths else None,
        )
        rows.append(dict(zip(ITEM_COLUMNS, row, strict=True)))
    return rows


def _likeliest(values: Sequence[float] | np.ndarray) -> int:
    """Index of the highest value, the first of equals; -1 with a NaN among them."""
    return -1 if np.isnan(values).any() else int(np.argmax(values))


def _scores(rows: Sequence[dict[str, Any]], trained_length: int | None, cut: int | None) -> list[Score]:
    """Scores of each task name, acc first; rows of one task stand together and share their shots."""
    scores = []
    for _, group in groupby(rows, key=lambda row: row["task"]):
        items = list(group)
        scores.append(_score(items, "acc", "choice", trained_length, cut))
        if items[0]["choice_norm"] is not None:
            scores.append(_score(items, "acc_norm", "choice_norm", trained_length, cut))
    return scores


def _score(
    items: Sequence[dict[str, Any]], metric: str, choice: str, trained_length: int | None, cut: int | None
) -> Score:
    accuracy = ChoiceAccuracy(sync_on_compute=False)
    accuracy.update(torch.tensor([row[choice] for row in items]), torch.tensor([row["gold"] for row in items]))
    found = accuracy.compute()
    return Score(
        task=items[0]["task"],
        shots=items[0]["shots"],
        metric=metric,
        value=float(found.value),
        n=int(found.n),
        stderr=float(found.stderr) if found.n > 1 else None,
        chance=math.fsum(1 / len(row["logprobs"]) for row in items) / len(items),
        truncated=sum(cut is not None and row["tokens"] - 1 > cut for row in items),
        nonfinite=sum(row[choice] == -1 for row in items),
        beyond_trained_length=sum(trained_length is not None and row["tokens"] > trained_length for row in items),
    )


def _longest(task: Task, shots: int, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> int:
    pairs = encoded(tokenizer, task.queries(shots), folder)
    return max(len(pair.model_input()) for choices in pairs for pair in choices)


def _several(tasks: Task | Sequence[Task]) -> Sequence[Task]:
    return [tasks] if isinstance(tasks, Task) else tasks


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
