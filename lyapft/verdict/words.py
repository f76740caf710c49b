"""Numbers as sentences write them."""

import math

from lyapft.divergence import FEW_SEEDS, Comparison, Estimate
from lyapft.verdict.evidence import Settings


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


def seeds(n: int) -> str:
    """Number of seeds, labelled where they are few.

    >>> seeds(3), seeds(8)
    ('n = 3 seeds, preliminary', 'n = 8 seeds')
    """
    return f"n = {n} seed{'s' * (n != 1)}{', preliminary' * (n < FEW_SEEDS)}"


def interval(found: Estimate, form: str = "") -> str:
    """The 95% interval and its n, or why there is none."""
    if found.n < 2:
        return f"no interval, {seeds(found.n)}"
    low, high = (format(x, form).replace("-", "−") if form else signed(x) for x in (found.low, found.high))
    return f"95% {low} to {high}, {seeds(found.n)}"


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


def needed(found: Comparison, settings: Settings) -> str:
    """How many seeds would decide, or why that cannot be said."""
    if found.estimate.n < 2:
        return "one seed has no spread, so run at least three"
    count = found.seeds_needed(settings.alpha, settings.power)
    if count is None:
        return "its mean lies so near the margin that no number of seeds can be named"
    how = "that it is equivalent" if abs(found.estimate.mean) < found.margin else "that it is not"
    text = (
        f"about {max(count, found.estimate.n + 1)} seeds would show {how}, with {settings.power:.0%} chance, if mean "
        "and spread stay"
    )
    return f"{text}, a rough guess from {found.estimate.n}" if found.estimate.few else text


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
