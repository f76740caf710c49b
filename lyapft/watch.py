"""Rules about the numbers of a step: when one of them deserves an alert, or a guard's action. Pure, with a memory."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lyapft.errors import InputError

LEAST = 16  # values before a spike is judged: fewer have no standard deviation to speak of


@dataclass(frozen=True)
class Event:
    """A number that broke a rule."""

    rule: str
    metric: str
    value: float
    limit: float

    def __str__(self) -> str:
        side = "below" if self.value < self.limit else "above"
        return f"{self.rule}: {self.metric} is {self.value:.4g}, {side} {self.limit:.4g}"


class Rule:
    """One number and where it must not go.

    A rule with `sigma` looks for spikes: values more than that many standard deviations above the mean of the last
    `window` ones, the present one left out. Values that are not finite break no rule: the module withholds such steps.

    Attributes:
        broken: whether the last value broke the rule.
    """

    def __init__(
        self,
        name: str,
        metric: str,
        below: float | None = None,
        above: float | None = None,
        sigma: float | None = None,
        window: int = 128,
    ) -> None:
        """
        Raises:
            InputError: none of below, above and sigma, or a window or sigma that judges nothing.
        """
        if below is None and above is None and sigma is None:
            raise InputError(f"rule {name} has none of below, above and sigma: it would never speak")
        if sigma is not None and (sigma <= 0 or window < LEAST):
            raise InputError(f"rule {name}: sigma={sigma} must be above 0 and window={window} at least {LEAST}")
        self.name, self.metric, self.below, self.above, self.sigma = name, metric, below, above, sigma
        self.broken = False
        self._last: deque[float] = deque(maxlen=window)

    def look(self, numbers: Mapping[str, float]) -> Event | None:
        """The event of this step, if it breaks the rule; the number may be missing on a step."""
        value = numbers.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        limit = self._broken_limit(float(value))
        self._last.append(float(value))
        self.broken = limit is not None
        return None if limit is None else Event(self.name, self.metric, float(value), limit)

    def _broken_limit(self, value: float) -> float | None:
        if self.below is not None and value < self.below:
            return self.below
        if self.above is not None and value > self.above:
            return self.above
        if self.sigma is None or len(self._last) < LEAST:
            return None
        limit = statistics.fmean(self._last) + self.sigma * statistics.stdev(self._last)
        return limit if value > limit else None

    def state(self) -> dict[str, Any]:
        """What the rule remembers."""
        return {"broken": self.broken, "last": list(self._last)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` gave."""
        self.broken = bool(state["broken"])
        self._last.clear()
        self._last.extend(state["last"])


def rules(settings: Mapping[str, Mapping[str, Any]]) -> list[Rule]:
    """Rules by name from their settings.

    >>> [event.rule for r in rules({"edge": {"metric": "margin", "below": 0.1}}) if (event := r.look({"margin": 0.05}))]
    ['edge']
    """
    return [Rule(str(name), **{str(key): value for key, value in one.items()}) for name, one in settings.items()]


def look(watched: Iterable[Rule], numbers: Mapping[str, float]) -> list[Event]:
    """The events of one step."""
    return [event for rule in watched if (event := rule.look(numbers)) is not None]
