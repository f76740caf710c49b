"""Answers of a cell beside those of its counterpart, item by item: far less noisy than the difference of two scores.

Letters: I items, C choices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from lyapft.divergence.decisions import MARGIN_POINTS, Comparison, compare

ITEM_KEYS = ["task", "subset", "item", "shots"]
CORRECTNESS = (*ITEM_KEYS, "correct")  # columns that a comparison over items needs
LEAST_ITEMS = 2.0  # a standard error is never below what these many items are worth: as 2 + 2 of Agresti & Coull 1998


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


def over_items(
    items: pd.DataFrame, counterpart_items: pd.DataFrame, margin: float = MARGIN_POINTS
) -> Comparison | None:
    """The mean difference of all scores in points, tested over items: for cells whose seed changes nothing.

    An item is asked at every number of shots, so that its answers are one value and not several: with d_is ∈ {−1, 0, 1}
    what item i gained at s shots, n_s the items of that score, K the scores and n the items of all tasks,

        x_i = 100 n Σ_s d_is / (K n_s),

    whose mean is the mean over the K scores of their differences, and whose t interval and tests are then McNemar's,
    with clusters. Few answers that changed do not show that few would: the spread is at least that of a difference as
    large as the margin (the mean square of d is no less than its mean), and see LEAST_ITEMS.

    Args:
        items, counterpart_items: tables with columns `task, subset, item, shots, correct`, one row per item.
        margin: points; inside ± this a difference does not matter.
    Returns:
        None where an item is on one side only, or twice on one: such scores are not paired.
    """
    try:
        both = _joined(items, counterpart_items, ["correct"])
    except ValueError:
        return None
    if not len(both) == len(items) == len(counterpart_items):
        return None
    gained_I, worth_I = shares(both, both["correct_cell"].astype(float) - both["correct_counterpart"].astype(float))
    points_I, least, share = 100.0 * gained_I, 100.0 * least_spread(worth_I), min(margin / 100.0, 0.5)
    sd = max(float(points_I.std(ddof=1)), 100.0 * float(worth_I.max()) * math.sqrt(share * (1.0 - share)))
    found = compare(points_I, margin, max(sd, least))
    estimate = replace(found.estimate, unit="items")
    return replace(found, estimate=estimate, sd=sd, least=least * math.sqrt(len(points_I)))


def shares(rows: pd.DataFrame, values: "pd.Series[float]") -> tuple["pd.Series[float]", "pd.Series[float]"]:
    """Each item's value, whose mean over items is that over tasks and shots, and the same of a 1 in every row.

    Args:
        rows: with columns `task, subset, item, shots`. values: one for each row.
    Returns:
        Both by (task, subset, item), in its order.
    """
    size = rows.groupby(["task", "shots"])["item"].transform("size")
    weight = 1.0 / (size * len(rows[["task", "shots"]].drop_duplicates()))
    item = [rows[name] for name in ITEM_KEYS if name != "shots"]
    summed = pd.DataFrame({"value": values * weight, "worth": weight}).groupby(item).sum()
    return summed["value"] * len(summed), summed["worth"] * len(summed)


def least_spread(worth_I: "pd.Series[float]") -> float:
    """The least standard deviation over items that is believed (see LEAST_ITEMS)."""
    return LEAST_ITEMS * float(worth_I.max()) / math.sqrt(len(worth_I))


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
