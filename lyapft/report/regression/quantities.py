"""The numbers of a record by which two studies are compared."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lyapft.records import Record, costs, divergence_entry
from lyapft.report.cells import read
from lyapft.verdict.evidence import scores_of


@dataclass(frozen=True)
class Quantity:
    """A number of a record: where it is, which way is better, and whether it is compared as a ratio.

    Ratios are of costs, which another number of threads may change.
    """

    unit: str
    value: Callable[[Record], float | None]
    higher_is_better: bool
    ratio: bool = False

    def pair(self, old: Record, new: Record) -> tuple[float, float] | None:
        """The number of both, where both have it: finite, and of a ratio positive."""
        if self.value is _score:
            return _common_scores(old, new)
        before, after = self.value(old), self.value(new)
        if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
            return None
        return None if self.ratio and min(before, after) <= 0 else (before, after)

    def difference(self, pair: tuple[float, float]) -> float:
        """New minus old, of a ratio ln(new / old)."""
        before, after = pair
        return math.log(after / before) if self.ratio else after - before


def _field(*keys: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        found = read(record, *keys)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None

    return value


def _cost(key: str) -> Callable[[Record], float | None]:
    return lambda record: costs(record).get(key)


def _score(record: Record) -> float | None:
    found = scores_of(record).values
    return 100 * math.fsum(found.values()) / len(found) if found else None


def _common_scores(old: Record, new: Record) -> tuple[float, float] | None:
    """Mean scores over the tasks and shots that both were asked, so that an easier set is no progress."""
    before, after = scores_of(old).values, scores_of(new).values
    both = before.keys() & after.keys()
    if not both:
        return None
    first, second = (100 * math.fsum(side[key] for key in both) / len(both) for side in (before, after))
    return first, second


def _divergence(record: Record) -> float | None:
    found = (divergence_entry(record, "paper") or {}).get("mean_abs_points")
    return None if found is None else float(found)


QUANTITIES = {
    "score": Quantity("points", _score, higher_is_better=True),
    "loss": Quantity("nats/token", _field("training", "loss_mean_last_10pct"), higher_is_better=False),
    "divergence": Quantity("points", _divergence, higher_is_better=False),
    "margin": Quantity("nats/token", _field("stability", "margin"), higher_is_better=True),
    "tokens_per_s": Quantity("ratio", _cost("tokens_per_s"), higher_is_better=True, ratio=True),
    "peak_bytes_per_token": Quantity("ratio", _cost("peak_bytes_per_token"), higher_is_better=False, ratio=True),
}
