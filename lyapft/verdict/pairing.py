"""Runs beside their counterparts, seed by seed: signed differences, and the raw scores that they come from."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lyapft.records import Record, divergence_entry
from lyapft.verdict.evidence import Evidence, Recipe, ScoreKey, Scores, score_key, seed_of


@dataclass(frozen=True)
class Pair:
    """A run beside its counterpart: signed differences in points by (task, shots), and the scores of both."""

    seed: int  # of both
    run: Record
    counterpart: Record
    signed: Mapping[ScoreKey, float]
    ours: Scores
    theirs: Scores

    @property
    def unpaired(self) -> tuple[ScoreKey, ...]:
        """The scores that only one of the two has."""
        ours, theirs = self.ours.values, self.theirs.values
        return () if len(ours) == len(theirs) == len(self.signed) else tuple(sorted(ours.keys() ^ theirs.keys()))

    @cached_property
    def fewest_items(self) -> int:
        """Items behind any score of the run."""
        return min(self.ours.items.values())

    @cached_property
    def mean_signed(self) -> float:
        """Mean difference over tasks and shots."""
        return self.mean_over(self.signed)

    @cached_property
    def mean_abs(self) -> float:
        """Mean size of the difference over tasks and shots: the paper's mean full-precision divergence."""
        return sum(map(abs, self.signed.values())) / len(self.signed)

    @cached_property
    def score(self) -> float:
        """Mean score of the run over what is compared, as a fraction; the counterpart's lies `mean_signed` below it."""
        return math.fsum([self.ours.values[key] for key in self.signed]) / len(self.signed)

    def mean_over(self, keys: Iterable[ScoreKey]) -> float:
        """Mean difference over some of its scores; NaN where it has none of them."""
        own = [self.signed[key] for key in keys if key in self.signed]
        return sum(own) / len(own) if own else math.nan


def pairs(evidence: Evidence, recipe: Recipe, counterpart: str) -> list[Pair]:
    """The recipe's runs with their counterparts, by seed; those that have none are left out (see `missing`)."""
    found = []
    for run in recipe.runs:
        entry = divergence_entry(run, counterpart)
        other = evidence.by_id.get(str(entry.get("reference_id"))) if entry else None
        if entry and entry.get("status") == "ok" and other is not None and entry["per_score"]:
            signed = {score_key(s): float(s["signed_points"]) for s in entry["per_score"]}
            found.append(Pair(seed_of(run), run, other, signed, evidence.scores(run), evidence.scores(other)))
    return sorted(found, key=lambda pair: pair.seed)


def shared_keys(own: Sequence[Pair]) -> list[ScoreKey]:
    """Every (task, shots) that any of the pairs has, in the order of their first appearance."""
    return list(dict.fromkeys(key for pair in own for key in pair.signed))


def mean_scores(own: Sequence[Pair]) -> tuple[float, float]:
    """Means over pairs and their scores: of the runs, and of their counterparts; fractions."""
    n = sum(len(pair.signed) for pair in own)
    score = math.fsum(pair.score * len(pair.signed) for pair in own) / n
    return score, score - math.fsum(math.fsum(pair.signed.values()) for pair in own) / n / 100.0


def mean_scores_of(own: Sequence[Pair], keys: Iterable[ScoreKey]) -> tuple[float, float]:
    """The same over some of the scores, which every pair has."""
    wanted = set(keys)
    return mean_scores([replace(p, signed={k: v for k, v in p.signed.items() if k in wanted}) for p in own])


def resolution(pair: Pair) -> float:
    """Points by which one changed answer moves the mean over tasks and shots; the largest, where scores differ in n."""
    return 100.0 / (pair.fewest_items * len(pair.signed))


def resolution_over(own: Sequence[Pair], keys: Collection[ScoreKey]) -> float:
    """Points by which one changed answer moves the mean over these scores; the largest of the pairs."""
    return 100.0 / (min(pair.fewest_items for pair in own) * len(keys))
