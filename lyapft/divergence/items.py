"""Answers of a cell beside those of its counterpart, item by item: far less noisy than the difference of two scores.

Letters: I items, C choices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

ITEM_KEYS = ["task", "subset", "item", "shots"]


@dataclass(frozen=True)
class Flips:
    """Items, present on both sides, whose chosen answer differs.

    A score can stay the same while answers change in both directions: this is far less noisy than its difference.
    """

    n: int  # items that both sides answered
    flipped: int  # of these, chosen answer differs
    gained: int  # wrong at the counterpart, right here
    lost: int  # right at the counterpart, wrong here
    unpaired: int  # items that only one side answered

    @property
    def rate(self) -> float:
        """Share of the paired items whose chosen answer differs, 0..1."""
        return self.flipped / self.n


def item_flips(items: pd.DataFrame, counterpart_items: pd.DataFrame) -> Flips:
    """Count the items whose chosen answer differs between a cell and its counterpart.

    Args:
        items, counterpart_items: tables with columns `task, subset, item, shots, choice, correct`, one row per item.
    Raises:
        ValueError: a column is missing, an item appears twice on one side, or no item is on both.
    """
    both = _joined(items, counterpart_items, ["choice", "correct"])
    right, was_right = both["correct_cell"].astype(bool), both["correct_counterpart"].astype(bool)
    return Flips(
        n=len(both),
        flipped=int((both["choice_cell"] != both["choice_counterpart"]).sum()),
        gained=int((right & ~was_right).sum()),
        lost=int((~right & was_right).sum()),
        unpaired=len(items) + len(counterpart_items) - 2 * len(both),
    )


@dataclass(frozen=True)
class AnswerShift:
    """How far the likelihoods of the answers moved, also where no choice flipped; in nats."""

    n: int  # items that both sides answered with finite likelihoods
    kl: float  # mean KL(counterpart ‖ cell) of the distribution over an item's choices, ≥ 0
    nll_gold: float  # mean of −ln p(right answer), cell minus counterpart: > 0 is a less likely right answer
    left_out: int  # paired items with a likelihood that is not finite


def answer_shift(items: pd.DataFrame, counterpart_items: pd.DataFrame) -> AnswerShift:
    """Mean KL divergence of the answer distributions and mean difference in the right answer's NLL.

    The distribution of an item is the softmax of its choices' log-likelihoods: p_i ∝ exp(logprobs_i).

    Args:
        items, counterpart_items: tables with columns `task, subset, item, shots, logprobs, nll_gold`.
    Raises:
        ValueError: a column is missing, an item appears twice on one side, no item is on both, or an item has another
            number of choices.
    Source: Kullback & Leibler 1951; accuracy alone hides such changes: Dutta et al. 2024 (arXiv 2407.09141).
    """
    both = _joined(items, counterpart_items, ["logprobs", "nll_gold"])
    ours, theirs = (list(both[f"logprobs_{side}"]) for side in ("cell", "counterpart"))
    choices = [len(row) for row in ours]
    if choices != [len(row) for row in theirs]:
        raise ValueError("an item has different numbers of choices on the two sides")
    kl = _kl(_padded(theirs, max(choices)), _padded(ours, max(choices)), np.array(choices))
    shift = (both["nll_gold_cell"] - both["nll_gold_counterpart"]).to_numpy(float)
    kept = np.isfinite(kl) & np.isfinite(shift)
    n = int(kept.sum())
    mean_kl, mean_shift = (float(values[kept].mean()) if n else math.nan for values in (kl, shift))
    return AnswerShift(n, mean_kl, mean_shift, len(both) - n)


def _padded(rows: list[Sequence[float]], width: int) -> np.ndarray[Any, Any]:
    """Rows of log-likelihoods as one table, impossible choices added to the shorter ones."""
    table_IC = np.full((len(rows), width), -np.inf)
    for row, values in zip(table_IC, rows, strict=True):
        row[: len(values)] = values
    return table_IC


def _kl(log_p_IC: Any, log_q_IC: Any, choices_I: Any) -> np.ndarray[Any, Any]:
    """KL(p ‖ q) of each item's unnormalised log-distributions; NaN where a likelihood is not finite."""
    real_IC = np.arange(log_p_IC.shape[1]) < choices_I[:, None]
    finite_I = ((np.isfinite(log_p_IC) & np.isfinite(log_q_IC)) | ~real_IC).all(axis=1)
    log_p_IC, log_q_IC = (np.where(finite_I[:, None], table, 0.0) for table in (log_p_IC, log_q_IC))
    log_p_IC, log_q_IC = (t - np.logaddexp.reduce(t, axis=1, keepdims=True) for t in (log_p_IC, log_q_IC))
    ratio_IC = np.subtract(log_p_IC, log_q_IC, out=np.zeros_like(log_p_IC), where=real_IC)
    return np.where(finite_I, (np.exp(log_p_IC) * ratio_IC).sum(axis=1), math.nan)


def _joined(items: pd.DataFrame, counterpart_items: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The items that are on both sides, with `columns` of each side."""
    ours, theirs = (_checked(side, columns) for side in (items, counterpart_items))
    ours = ours.rename(columns={column: f"{column}_cell" for column in columns})
    theirs = theirs.rename(columns={column: f"{column}_counterpart" for column in columns})
    if len(ours) == len(theirs) and all(np.array_equal(ours[key], theirs[key]) for key in ITEM_KEYS):
        both = pd.concat([ours, theirs.drop(columns=ITEM_KEYS)], axis=1)  # the usual case needs no search
    else:
        both = ours.merge(theirs, on=ITEM_KEYS)
    if both.empty:
        raise ValueError("the two item tables have no item in common")
    return both


def _checked(items: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The keys and `columns`, every item once."""
    missing = [column for column in [*ITEM_KEYS, *columns] if column not in items.columns]
    if missing:
        raise ValueError(f"the item table lacks the columns {missing}")
    # An absent subset is None in one table and NaN in another, and neither equals itself.
    subset = items["subset"].astype(object).where(items["subset"].notna(), "")
    keyed = items[[*ITEM_KEYS, *columns]].assign(subset=subset).reset_index(drop=True)
    if (twice := keyed.duplicated(ITEM_KEYS)).any():
        raise ValueError(f"item {keyed.loc[twice, ITEM_KEYS].iloc[0].to_dict()} appears twice")
    return keyed
