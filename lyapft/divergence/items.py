"""Answers of a cell beside those of its counterpart, item by item: far less noisy than the difference of two scores."""

import math
from dataclasses import dataclass

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
    ours, theirs = list(both["logprobs_cell"]), list(both["logprobs_counterpart"])
    if any(len(a) != len(b) for a, b in zip(ours, theirs, strict=True)):
        raise ValueError("an item has different numbers of choices on the two sides")
    kl = np.array([_kl(np.asarray(b, float), np.asarray(a, float)) for a, b in zip(ours, theirs, strict=True)])
    shift = (both["nll_gold_cell"] - both["nll_gold_counterpart"]).to_numpy(float)
    kept = np.isfinite(kl) & np.isfinite(shift)
    n = int(kept.sum())
    mean_kl, mean_shift = (float(values[kept].mean()) if n else math.nan for values in (kl, shift))
    return AnswerShift(n, mean_kl, mean_shift, len(both) - n)


def _kl(log_p_C: np.ndarray, log_q_C: np.ndarray) -> float:
    """KL(p ‖ q) of two unnormalised log-distributions over the same choices."""
    if not (np.isfinite(log_p_C).all() and np.isfinite(log_q_C).all()):
        return math.nan
    log_p_C = log_p_C - np.logaddexp.reduce(log_p_C)
    log_q_C = log_q_C - np.logaddexp.reduce(log_q_C)
    return float(np.sum(np.exp(log_p_C) * (log_p_C - log_q_C)))


def _joined(items: pd.DataFrame, counterpart_items: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The items that are on both sides, with `columns` of each side."""
    ours, theirs = (_keyed(side, columns) for side in (items, counterpart_items))
    both = ours.add_suffix("_cell").join(theirs.add_suffix("_counterpart"), how="inner")
    if both.empty:
        raise ValueError("the two item tables have no item in common")
    return both


def _keyed(items: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """`columns` indexed by item; every item once."""
    missing = [column for column in [*ITEM_KEYS, *columns] if column not in items.columns]
    if missing:
        raise ValueError(f"the item table lacks the columns {missing}")
    # An absent subset is None in one table and NaN in another, and neither equals itself in an index join.
    subset = items["subset"].astype(object).where(items["subset"].notna(), "")
    keyed = items.assign(subset=subset).set_index(ITEM_KEYS)[columns]
    if not keyed.index.is_unique:
        twice = keyed.index[keyed.index.duplicated()][0]
        raise ValueError(f"item {dict(zip(ITEM_KEYS, twice, strict=True))} appears twice")
    return keyed
