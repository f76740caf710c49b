"""Accuracy over multiple-choice items, with its standard error, accumulated across batches and processes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Accuracy(NamedTuple):
    """Share of right choices, its standard error (NaN for fewer than two items) and the number of items."""

    value: Tensor
    stderr: Tensor
    n: Tensor


class ChoiceAccuracy(Metric):
    """Accuracy and its standard error, sqrt(p (1 − p) / (n − 1)): lm-eval's `acc` and `acc_stderr`.

    >>> metric = ChoiceAccuracy()
    >>> metric.update(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 3]))
    >>> metric.compute().value, metric.compute().stderr
    (tensor(0.7500, dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # torchmetrics' own
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, choice: Tensor, gold: Tensor) -> None:
        """Count items: `choice` and `gold` are indices of equal shape; a choice of −1 is never right."""
        self.correct += (choice == gold).sum()
        self.total += gold.numel()

    def compute(self) -> Accuracy:
        """The accuracy so far."""
        p = self.correct.double() / self.total
        return Accuracy(p, (p * (1 - p) / (self.total - 1)).sqrt(), self.total)
