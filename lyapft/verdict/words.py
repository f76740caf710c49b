"""Numbers as sentences write them."""

import math
from dataclasses import dataclass

from lyapft.divergence import FEW_SEEDS, MOST_SEEDS, Comparison, Estimate
from lyapft.verdict.evidence import PAPER, PRECISION_ONLY, ScoreKey, Settings

REFERENCE = "full-precision fine-tuning of all weights"
BASE = "the full-precision base"  # where nothing was trained
AGAINST = {PAPER: REFERENCE, PRECISION_ONLY: "full precision with the same peft"}
NO_ITEMS = "a base is one cell whatever the seed, and its single answers are not at hand"
MOST_LISTED = 3
ALONE = "Every p is after Holm's correction; the interval beside it is of that one comparison alone, uncorrected."
EMULATED = "(emulated)"  # beside every cost of a run whose half precision was
EMULATED_MEANS = (
    f"{EMULATED}: half precision ran in software; such speed, and a cost that counts it, is not that of hardware that "
    "has it."
)


@dataclass(frozen=True)
class Section:
    """A heading and its sentences."""

    title: str
    lines: tuple[str, ...]


def signed(value: float) -> str:
    """A difference in points with its sign.

    >>> signed(-0.123), signed(0.001)
    ('−0.12', '0.00')
    """
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def p_value(p: float) -> str:
    """A p value, never as 0.

    >>> p_value(0.0123), p_value(1e-9)
    ('p = 0.012', 'p < 0.001')
    """
    if math.isnan(p):
        return "no p value"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def against(counterpart: str, trained: bool) -> str:
    """What a recipe is compared with, where something was trained and where only bases are.

    >>> against(PAPER, False)
    'the full-precision base'
    """
    return AGAINST[counterpart] if trained else BASE


def counted(found: Estimate) -> str:
    """How many seeds an estimate rests on, or items where a seed changes nothing.

    >>> counted(Estimate(0.1, -0.2, 0.4, 320, "items"))
    'n = 320 items'
    """
    return seeds(found.n) if found.unit == "seeds" else f"n = {found.n} items"


def seeds(n: int) -> str:
    """Number of seeds, labelled where they are few.

    >>> seeds(3), seeds(8)
    ('n = 3 seeds, preliminary', 'n = 8 seeds')
    """
    return f"n = {n} seed{'s' * (n != 1)}{', preliminary' * (n < FEW_SEEDS)}"


def interval(found: Estimate, form: str = "") -> str:
    """The 95% interval and its n, or why there is none."""
    if found.n < 2:
        return f"no interval, {seeds(found.n) if found.unit == 'seeds' else NO_ITEMS}"
    low, high = (format(x, form).replace("-", "−") if form else signed(x) for x in (found.low, found.high))
    return f"95% {low} to {high}, {counted(found)}"


def difference(found: Comparison) -> str:
    """A signed difference in points with its interval."""
    return f"{signed(found.estimate.mean)} points ({interval(found.estimate)})"


def size(found: Estimate) -> str:
    """A mean absolute difference, which has no sign to test; its seeds are named beside it.

    >>> size(Estimate(1.5, 1.0, 2.0, 8))
    '1.50 points (1.00 to 2.00)'
    """
    reach = f" ({found.low:.2f} to {found.high:.2f})" if found.n > 1 else ""
    return f"{found.mean:.2f} points{reach}"


def needed(found: Comparison, settings: Settings, conditions: bool = True) -> str:
    """How many seeds would decide, or items where a seed changes nothing, or why that cannot be said.

    Args:
        conditions: whether to add what the number rests on (see `chance`).
    """
    how = "that it is equivalent" if abs(found.estimate.mean) < found.margin else "that it is not"
    count = found.seeds_needed(settings.alpha, settings.power)
    return seeds_that_show(how, count, found.estimate, chance(settings) if conditions else "")


def seeds_that_show(how: str, count: int | None, found: Estimate, conditions: str = "") -> str:
    """How many seeds would show something, or items where a seed changes nothing, planned from what does not show it.

    Args:
        how: what they would show. count: None where even MOST_SEEDS would not do. conditions: what the number rests on;
            without them it is said briefly.

    >>> seeds_that_show("that it is not", 2, Estimate(3.0, -9.0, 15.0, 2))
    'about 3 seeds would show that it is not (guessed from 2)'
    """
    if found.n < 2:
        one_cell = found.unit == "items"
        return f"no seed can decide it: {NO_ITEMS}" if one_cell else "one seed has no spread, so run at least three"
    if found.low == found.high:
        return "its seeds do not differ, so they have no spread to plan by"
    if count:
        text = f"about {more_than_now(count, found)} {found.unit} would show {how}"
    else:
        text = f"over {MOST_SEEDS:,} {found.unit} would be needed" + f" to show {how}" * bool(conditions)
    if not conditions:
        return text + f" (guessed from {found.n})" * found.few
    return f"{text}, with {conditions}" + f", a rough guess from {found.n}" * found.few


def more_than_now(count: int, found: Estimate) -> int:
    """Seeds that would decide, of which there are at least one more than those that have not."""
    return max(count, found.n + 1)


def chance(settings: Settings) -> str:
    """What the number of seeds that would decide rests on.

    >>> chance(Settings())
    '80% chance, if mean and spread stay'
    """
    return f"{settings.power:.0%} chance, if mean and spread stay"


def margin(settings: Settings) -> str:
    """The margin in points.

    >>> margin(Settings())
    '±1 point'
    """
    return f"±{settings.margin:g} point{'s' * (settings.margin != 1)}"


def ratio(value: float) -> str:
    """A ratio to three digits.

    >>> ratio(1.6234)
    '1.62 ×'
    """
    return "not measured" if math.isnan(value) else f"{value:.3g} ×"


def joined(parts: list[str]) -> str:
    """Parts as one enumeration.

    >>> joined(["a", "b", "c"])
    'a, b and c'
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def where_of(setting: tuple[str, str, str]) -> str:
    """Model, data and task.

    >>> where_of(("m", "alpaca", "mmlu")), where_of(("m", "skills", "skills"))
    ('m on alpaca, scored on mmlu', 'm on skills')
    """
    model, data, task = setting
    return f"{model} on {data}, scored on {task}" if data != task else f"{model} on {data}"


def scored(key: ScoreKey) -> str:
    """A task and its number of shots.

    >>> scored(("mmlu", 5))
    'mmlu 5-shot'
    """
    return f"{key[0]} {key[1]}-shot"


def raw(score: float, other: float) -> str:
    """Two scores side by side, as fractions.

    >>> raw(0.5, 0.25)
    '0.500 against 0.250'
    """
    return f"{score:.3f} against {other:.3f}"


def beyond(count: int, total: int) -> str:
    """A label where scores are also of texts that are longer than what the base model was trained on.

    >>> beyond(0, 8), beyond(2, 8)
    ('', ' (2 of its 8 scores beyond the trained length)')
    """
    return f" ({count} of its {total} scores beyond the trained length)" if count else ""
