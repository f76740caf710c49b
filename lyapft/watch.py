"""Rules about the numbers of a step: when one of them deserves an alert, or a guard's action. Pure, with a memory."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lyapft.errors import InputError

LEAST = 16  # values before a spike is judged: fewer have no standard deviation to speak of
WITHHELD = ("loss", "grad_norm")  # where these are not finite, the module withholds the update and records it
# The numbers that are the same whenever a cell runs, by the probe that measures them; None: known of every step. A
# name in front of a slash is the model's number, with what follows it a layer's.
REPEATABLE: dict[str | None, Sequence[str]] = {
    None: ("loss", "grad_norm", "learning_rate", "loss_scale", "tokens"),
    "lyapunov": (
        *("margin", "lambda_max", "lambda_mean", "norm_bound", "one_step_norm"),
        *("neutral_bf16", "neutral_fp16", "neutral_fp32"),
    ),
    "shadow": ("shadow_kl", "shadow_top1", "shadow_deviation"),
}


@dataclass(frozen=True)
class Event:
    """A number that broke a rule."""

    rule: str
    metric: str
    value: float
    limit: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"{self.rule}: {self.metric} is not a number; its limit is {self.limit:.4g}"
        side = "below" if self.value < self.limit else "above"
        return f"{self.rule}: {self.metric} is {self.value:.4g}, {side} {self.limit:.4g}"


class Rule:
    """One number and where it must not go.

    A rule with `sigma` looks for spikes: values more than that many standard deviations above the mean of the last
    `window` ones, the present one left out; one with `fall` for collapses: values more than that factor below the
    largest of them. A number that should be finite and is none (NaN) breaks every rule, except loss and gradient norm:
    the module withholds such a step and records it.

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
        fall: float | None = None,
        window: int = 128,
    ) -> None:
        """
        Raises:
            InputError: none of below, above, sigma and fall, or one of them that judges nothing.
        """
        if below is None and above is None and sigma is None and fall is None:
            raise InputError(f"rule {name} has none of below, above, sigma and fall: it would never speak")
        if sigma is not None and (sigma <= 0 or window < LEAST):
            raise InputError(f"rule {name}: sigma={sigma} must be above 0 and window={window} at least {LEAST}")
        if fall is not None and (fall <= 1 or window < 1):
            raise InputError(f"rule {name}: fall={fall} must be above 1 and window={window} at least 1")
        self.name, self.metric = name, metric
        self.below, self.above, self.sigma, self.fall = below, above, sigma, fall
        self.broken = False
        self._last: deque[float] = deque(maxlen=window)

    def look(self, numbers: Mapping[str, float]) -> Event | None:
        """The event of this step, if it breaks the rule; the number may be missing on a step."""
        value = numbers.get(self.metric)
        finite = value is not None and math.isfinite(value)
        if value is None or (self.metric in WITHHELD and not finite):
            return None
        limit = self._broken_limit(float(value))
        if finite:
            self._last.append(float(value))
        self.broken = limit is not None
        return None if limit is None else Event(self.name, self.metric, float(value), limit)

    def _broken_limit(self, value: float) -> float | None:
        lower = [] if self.below is None else [self.below]
        upper = [] if self.above is None else [self.above]
        if self.fall is not None and self._last:
            lower.append(max(self._last) / self.fall)
        if self.sigma is not None and len(self._last) >= LEAST:
            upper.append(statistics.fmean(self._last) + self.sigma * statistics.stdev(self._last))
        # "not inside" and not "outside": a NaN is neither
        broken = [limit for limit in lower if not value >= limit] + [limit for limit in upper if not value <= limit]
        return broken[0] if broken else None

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


def measured_by(metric: str) -> str | None:
    """The probe that measures a repeatable number; None where every step has it.

    Raises:
        InputError: no such number, or one that differs from run to run, as clocks and memory do.

    >>> measured_by("margin/backbone.layers.0.mixer"), measured_by("grad_norm")
    ('lyapunov', None)
    """
    base = metric.partition("/")[0]
    for probe, names in REPEATABLE.items():
        if base in names:
            return probe
    known = ", ".join(name for names in REPEATABLE.values() for name in names)
    raise InputError(f"{metric} is no number that is the same whenever a cell runs: use one of {known}")
