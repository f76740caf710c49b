"""Scores of the reference that are not shown to lie above blind guessing: where both sides guess, they agree anyway."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import norm

from lyapft.verdict.evidence import Evidence, ScoreKey, Settings, is_own_counterpart


@dataclass(frozen=True)
class AtChance:
    """The reference's scores on one data set and task that guessing might have given.

    `guessed` holds each one's mean over seeds beside the accuracy of guessing, as fractions; `of` counts all scores of
    which the accuracy of guessing is known.
    """

    setting: tuple[str, str, str]
    guessed: Mapping[ScoreKey, tuple[float, float]]
    of: int


def at_chance(evidence: Evidence, settings: Settings) -> list[AtChance]:
    """Settings with such scores.

    Each score is tested by itself, one-sided at `settings.alpha`, by the normal approximation to the binomial of its
    items: seeds answer the same ones, so more seeds are not more items. Without a correction, which would find more
    scores to be like guesses: this warns, and claims nothing.
    """
    found = []
    for recipe in evidence.recipes:
        if not is_own_counterpart(recipe):
            continue
        values: dict[ScoreKey, list[float]] = {}
        items: dict[ScoreKey, int] = {}
        chance: dict[ScoreKey, float] = {}
        for run in recipe.runs:
            own = evidence.scores(run)
            chance |= own.chance
            for key in filter(own.chance.__contains__, own.values):
                values.setdefault(key, []).append(own.values[key])
                items[key] = min(items.get(key, own.items[key]), own.items[key])
        means = {key: math.fsum(own) / len(own) for key, own in values.items()}
        guessed = {
            key: (mean, chance[key])
            for key, mean in means.items()
            if not _above(mean, chance[key], items[key], settings.alpha)
        }
        if guessed:
            found.append(AtChance(recipe.setting, guessed, len(means)))
    return found


def _above(score: float, chance: float, items: int, alpha: float) -> bool:
    """Whether so many right answers are too many for guessing.

    >>> _above(0.31, 0.25, 200, 0.05), _above(0.28, 0.25, 200, 0.05)
    (True, False)
    """
    return bool((score - chance) / math.sqrt(chance * (1 - chance) / items) > norm.isf(alpha))
