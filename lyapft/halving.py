"""Where memory runs out: half the rows at once, twice as often, from the last checkpoint on.

A cell that runs out of memory, if `trainer.oom` allows it, is taken up as one that was killed: from its last
checkpoint, on the same rows and random numbers, so that nothing of the broken step is left. The step at which memory
ran out, and all after it, send half as many rows through the model at once. Where that was is kept in the cell's
record, so that a later attempt does the same; the result depends on it, and on no clock.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
Entry = dict[str, Any]
log = logging.getLogger(__name__)
SELECTION, TRAINING, VALIDATION, EVALUATION = "selection", "training", "validation", "evaluation"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device's memory, or this machine's, did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Halvings:
    """How much of a batch goes through the model at once, step by step.

    Attributes:
        entries: each time that memory ran out, `during` what. In training: from which `step` on (as in the step
            series) how many `rows` at once, and so how many micro-batches a step (`accumulate`). In the steps before
            it by which a peft selects what to train: the same, from their first on. In the validation: `rows`. In the
            evaluation: `batch_tokens`.
        doing: what the cell is at: `selection`, `training`, `validation`, `evaluation`, or None, where nothing can be
            halved.
        step: of the training, from 1.
        allowed: whether to halve at all.
    """

    def __init__(
        self,
        entries: list[Entry],
        rows: int = 1,
        accumulate: int = 1,
        batch_tokens: int = 1,
        longest: int = 1,
        allowed: bool = True,
    ) -> None:
        """
        Args:
            entries: of earlier attempts.
            rows: of a batch. accumulate: batches of a step.
            batch_tokens: of a batch of the evaluation. longest: tokens of a row; fewer at once save nothing.
            allowed: whether to halve at all.
        """
        self.entries, self.allowed = entries, allowed
        self._rows, self._accumulate, self._batch_tokens, self._longest = rows, accumulate, batch_tokens, longest
        self.doing: str | None = None
        self.step = 1

    @property
    def rows(self) -> int:
        """How many go through the model at once, in what the cell is at."""
        mine = [e for e in self.entries if e["during"] == self.doing and e.get("step", 0) <= self.step]
        return min([self._rows] + [e["rows"] for e in mine if "rows" in e])

    @property
    def batch_tokens(self) -> int:
        """Of the evaluation."""
        return min([self._batch_tokens] + [e["batch_tokens"] for e in self.entries if "batch_tokens" in e])

    def micro_batches(self, batch: Batch, step: int) -> list[Batch]:
        """A batch of the training in the parts that fit; itself, where memory never ran out.

        Args:
            batch: tensors with a row for each row of the batch, and `rows`, their numbers in the data.
            step: from 1.

        >>> batch = {"input_ids": torch.arange(3), "rows": torch.arange(3)}
        >>> Halvings([{"during": "training", "step": 2, "rows": 2}], rows=3).micro_batches(batch, 2)
        [{'input_ids': tensor([0, 1])}, {'input_ids': tensor([2])}]
        """
        self.doing, self.step = TRAINING, step
        return self.parts(batch)

    def parts(self, batch: Batch) -> list[Batch]:
        """A batch in the parts that fit, in what the cell is at."""
        if self.rows >= self._rows:
            return [batch]
        parts = {name: tensor.split(self.rows) for name, tensor in batch.items() if name != "rows"}
        return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]

    def halve(self) -> bool:
        """Make the next attempt do with less; False where there is nothing left to halve."""
        if not self.allowed:
            return False
        if self.doing == EVALUATION and self.batch_tokens // 2 >= self._longest:
            self.entries.append({"during": EVALUATION, "batch_tokens": self.batch_tokens // 2})
        elif self.doing in (SELECTION, TRAINING, VALIDATION) and self.rows > 1:
            self.entries.append({"during": self.doing} | self._with_half_the_rows()[self.doing])
        else:
            return False
        what = ", ".join(f"{name} {value}" for name, value in self.entries[-1].items())
        log.warning("out of memory: going on from the last checkpoint with half as much at once (%s)", what)
        return True

    def _with_half_the_rows(self) -> dict[str, Entry]:
        rows = self.rows // 2
        times = -(-self._rows // rows)
        return {
            SELECTION: {"rows": rows, "accumulate": times},
            TRAINING: {"step": self.step, "rows": rows, "accumulate": times * self._accumulate},
            VALIDATION: {"rows": rows},
        }


def until_it_fits(attempt: Callable[[], None], halvings: Halvings, save: Callable[[], None]) -> None:
    """Make attempts until one does not run out of memory.

    Args:
        attempt: goes on where the one before had its last checkpoint.
        halvings: what it heeds.
        save: keeps `halvings.entries` for whoever goes on if this process is killed.
    Raises:
        OutOfMemory: there is nothing to halve (any more), or nothing shall be.
    """
    while True:
        halvings.doing = None
        try:
            return attempt()
        except Exception as error:
            if not out_of_memory(error):
                raise
            if not halvings.halve():
                raise OutOfMemory(_advice(str(error), halvings)) from error
        save()
        gc.collect()  # the attempt's tensors, which its exception held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class OutOfMemory(RuntimeError):
    """A cell does not fit in memory; the message says what to set."""


def _advice(text: str, halvings: Halvings) -> str:
    first = text.splitlines()[0] if text else "no more was said"
    if not halvings.allowed:
        return (
            f"out of memory ({first}): set trainer.oom=halve, and one process, to go on with half the rows at once, or "
            "a smaller trainer.batch_size or task.batch_tokens"
        )
    least = dict.fromkeys((SELECTION, TRAINING, VALIDATION), "with one row at once")
    least[EVALUATION] = f"with {halvings.batch_tokens} tokens at once"
    where = least.get(halvings.doing or "", "before the first step")
    return f"out of memory {where} ({first}): use a smaller model, data.max_length or adapter, or more memory"
