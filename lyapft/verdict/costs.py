"""What recipes cost beside their counterparts, and which costs the seeds tell apart."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lyapft.divergence import Estimate, estimate, holm, p_different, seeds_to_decide, spread
from lyapft.records import costs
from lyapft.verdict.evidence import Settings
from lyapft.verdict.pairing import Pair

Costs = Mapping[str, Any]  # of one run, as its record has them


@dataclass(frozen=True)
class Cost:
    """What a recipe needs, as ratios to its counterpart: geometric means over seeds, n = 0 where not measured."""

    speed: Estimate  # × tokens/s: above 1 is faster
    memory: Estimate  # × peak bytes per token in flight: below 1 is leaner
    index: Estimate  # weighted geometric mean of time and memory: below 1 is cheaper
    logs: Mapping[int, float]  # ln of the index by seed: what two recipes' costs are compared by
    emulated: bool  # half precision was emulated: its speed is not that of hardware that has it
    halved: int  # pairs in which memory ran out, left out of all three
    p: float  # two-sided, of a t test that ln of the index is 0; NaN for one seed
    family: int = 1  # recipes whose costs share the error rate

    def saves(self, alpha: float) -> bool:
        """Whether it is shown to be below that of its counterpart; one seed shows nothing."""
        return self.p <= alpha and self.index.mean < 1

    def exceeds(self, alpha: float) -> bool:
        """Whether it is shown to be above that of its counterpart."""
        return self.p <= alpha and self.index.mean > 1

    @property
    def alike(self) -> bool:
        """Whether it is that of its counterpart on every seed, but for rounding; one seed shows nothing."""
        return len(self.logs) > 1 and max(map(abs, self.logs.values())) <= sys.float_info.epsilon

    def undecided(self, alpha: float) -> bool:
        """Whether the seeds do not tell if it is below that of its counterpart."""
        return not (self.saves(alpha) or self.exceeds(alpha) or self.alike)

    def seeds_needed(self, alpha: float, power: float) -> int | None:
        """Seeds that would show on which side of its counterpart's it lies, as `Comparison.seeds_needed`.

        A test against 0 is one against a margin of no width. None, too, where nothing was tested.
        """
        logs = list(self.logs.values())
        if math.isnan(self.p):
            return None
        mean, sd = math.fsum(logs) / len(logs), float(spread(logs, sys.float_info.epsilon))
        return seeds_to_decide(mean, sd, 0.0, alpha / self.family, power)


def jointly(costs_: Sequence[Cost]) -> list[Cost]:
    """The costs of recipes among which the cheap ones are looked for, every p adjusted by Holm over all of them."""
    adjusted = holm([cost.p for cost in costs_])
    return [replace(cost, p=p, family=len(costs_)) for cost, p in zip(costs_, adjusted, strict=True)]


def cost_of(own: Sequence[Pair], settings: Settings) -> Cost:
    """The cost of a recipe's pairs, by the reader's weights."""
    sides = [(pair.seed, costs(pair.run), costs(pair.counterpart)) for pair in own]
    speed, memory = (_log_ratios(sides, name) for name in ("tokens_per_s", "peak_bytes_per_token"))
    weights = (settings.speed_weight, settings.memory_weight)
    # Slower and larger are dearer; a part that does not count need not have been measured.
    parts = [
        (w, {k: sign * v for k, v in one.items()})
        for w, one, sign in zip(weights, (speed, memory), (-1, 1), strict=True)
        if w
    ]
    measured = set.intersection(*(set(one) for _, one in parts))
    index = {seed: sum(weight * one[seed] for weight, one in parts) / sum(weights) for seed in measured}
    emulated = any((pair.run.get("precision") or {}).get("emulated") for pair in own)
    halved = sum(bool(pair.run.get("oom") or pair.counterpart.get("oom")) for pair in own)
    speeds, memories, costs_ = (_geometric_mean(logs) for logs in (speed, memory, index))
    return Cost(speeds, memories, costs_, index, emulated, halved, _p(index))


def _log_ratios(sides: Sequence[tuple[int, Costs, Costs]], name: str) -> dict[int, float]:
    """ln(run / counterpart) by seed, where both were measured."""
    measured = {seed: (ours.get(name), theirs.get(name)) for seed, ours, theirs in sides}
    return {seed: math.log(ours / theirs) for seed, (ours, theirs) in measured.items() if ours and theirs}


def _p(logs: dict[int, float]) -> float:
    """Of no saving; bytes may well be the same on every seed, so that rounding alone is their spread."""
    return float(p_different(list(logs.values()), sys.float_info.epsilon)) if logs else math.nan


def _geometric_mean(logs: dict[int, float]) -> Estimate:
    found = estimate(list(logs.values()))
    return Estimate(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.n)


def told_apart(ours: Cost, theirs: Cost, confidence: float) -> bool:
    """Whether the seeds that both were measured on show that the two cost differently: by a paired t interval.

    One common seed, or none, tells nothing.
    """
    common = ours.logs.keys() & theirs.logs.keys()
    apart = [theirs.logs[seed] - ours.logs[seed] for seed in common]
    found = estimate(apart, sys.float_info.epsilon, confidence)  # equal bytes may differ by rounding
    return found.n > 1 and not found.low <= 0 <= found.high
