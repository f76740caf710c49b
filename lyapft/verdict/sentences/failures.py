"""Where recipes fail and what is to blame, as sentences."""

from collections.abc import Sequence
from itertools import groupby

from lyapft.divergence import is_spike
from lyapft.verdict.blame import Inquiry, blame, remedy
from lyapft.verdict.evidence import PAPER, Recipe, Settings
from lyapft.verdict.failures import Failures
from lyapft.verdict.recipes import Row
from lyapft.verdict.sentences.advice import scores_of
from lyapft.verdict.sentences.single_scores import single_scores
from lyapft.verdict.spikes import Spikes, worth_of_an_answer
from lyapft.verdict.words import (
    ALONE,
    against,
    difference,
    joined,
    margin,
    p_value,
    raw,
    scored,
    where_of,
)

MOST_SPIKES = 2
NOISE = {"seeds": "another seed", "threads": "other thread count", "replicate": "same again"}


def failures(
    outside: Failures, found: Sequence[Row], recipes: Sequence[Recipe], spikes: Sequence[Spikes], settings: Settings
) -> list[str]:
    """Recipes and single scores that lie outside the margin, whose doing it is, and trainings that broke down.

    Args:
        found: rows against the paper's counterpart.
    """
    lines = [_failure(one, settings) for one in outside.whole]
    lines += [single_scores(group, settings) for group in outside.single]
    if lines:
        lines.append(ALONE)
    elif found:
        lines.append(none_outside(found, settings))
    lines += [f"{recipe.name}: {joined(broken)}." for recipe in recipes if (broken := recipe.breakdowns())]
    return [*lines, *_spikes(found, spikes, settings)]


def none_outside(found: Sequence[Row], settings: Settings) -> str:
    """That nothing is shown to fail, which is not that all agree."""
    undecided = sum(row.outcome(settings) == "undecided" for row in found)
    agree = f"; {undecided} of {len(found)} are undecided, which does not mean that they agree" if undecided else ""
    return f"No recipe is shown to lie outside {margin(settings)}{agree}."


def _failure(one: Inquiry, settings: Settings) -> str:
    row = one.row
    tried = remedy(one) if row.outcome(settings) == "worse" else ""
    return (
        f"{row.recipe.name} is {row.outcome(settings)} than {against(PAPER, row.recipe.trained)} by more than "
        f"{settings.margin:g} point{'s' * (settings.margin != 1)}: {difference(row.comparison)}, "
        f"{p_value(row.comparison.p_outside)}; {scores_of(row)}.{blame(one, settings)}{tried}"
    )


def _spikes(found: Sequence[Row], spikes: Sequence[Spikes], settings: Settings) -> list[str]:
    """How many single scores lie far off, and for each model on which tasks, beside what noise alone does there."""
    total = sum(one.scores for one in spikes)
    if not total:
        return []
    grain = worth_of_an_answer(found)
    note = f"; one answer is worth {grain:.2f} points there, so few answers make one" if is_spike(grain, 0.2) else ""
    count = sum(one.spikes for one in spikes)
    lines = [
        f"Spikes: {count} of {total} single scores lie over {settings.spike:g} point{'s' * (settings.spike != 1)} "
        f"from their counterpart's{note}."
    ]
    for setting, group in groupby(spikes, key=lambda one: one.setting):
        worst = sorted((one for one in group if one.spikes), key=lambda one: (-one.spikes / one.scores, -one.mean_abs))
        if worst:
            shown = "; ".join(map(_spike, worst[:MOST_SPIKES]))
            more = f"; and {len(worst) - MOST_SPIKES} more" if len(worst) > MOST_SPIKES else ""
            lines.append(f"Spikes of {where_of(setting)}, most often at {shown}{more}.")
    return lines


def _spike(one: Spikes) -> str:
    noise = [f"{short} {one.floors[kind]:.2f}" for kind, short in NOISE.items() if kind in one.floors]
    beside = f"noise floor there: {', '.join(noise)}" if noise else "no noise floor measured there"
    label = " (beyond the trained length)" if one.beyond else ""
    return (
        f"{scored(one.key)}{label} {one.spikes} of {one.scores}, mean size {one.mean_abs:.2f} points, scores "
        f"{raw(one.score, one.counterpart_score)} ({beside})"
    )
