"""Noise, gaps, labels and repetitions of a study, as sentences."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from lyapft.verdict.chance import AtChance
from lyapft.verdict.evidence import Recipe
from lyapft.verdict.floors import KINDS, Floor, measurable
from lyapft.verdict.gaps import Gap
from lyapft.verdict.recipes import ScoreRow
from lyapft.verdict.words import joined, raw, scored, where_of


def noise(found: Sequence[Floor], recipes: Sequence[Recipe]) -> list[str]:
    """How far runs lie apart that should not differ, or that this was not measured."""
    lines = []
    for setting, own in groupby(found, key=lambda floor: floor.setting):
        parts = [
            f"{KINDS[f.kind]} {f.mean_abs:.2f} points ({f.n} pair{'s' * (f.n != 1)}, scores {f.scores[0]:.3f} to "
            f"{f.scores[1]:.3f})"
            for f in own
        ]
        lines.append(f"Noise floor of {where_of(setting)}, mean size of a difference: {'; '.join(parts)}.")
    measured = {floor.kind for floor in found}
    if absent := [name for kind, name in measurable(recipes).items() if kind not in measured]:
        lines.append(f"Not measured: {joined(absent)}.")
    lines.append(
        "A mean size is positive even where nothing but noise differs: compare it with its floor. What is tested above "
        "are signed differences, which noise alone leaves at 0."
    )
    return lines


def missing(found: Sequence[Gap]) -> list[str]:
    """Runs and scores that the tables lack."""
    lines = []
    several = len({gap.recipe.setting[1:] for gap in found}) > 1
    for (*setting, label), group in groupby(found, key=lambda gap: (*gap.recipe.setting, gap.recipe.label)):
        model, data, task = setting
        name = f"{where_of((model, data, task))}, {label}" if several else f"{model} · {label}"
        parts = [
            f"{why} for seed{'s' * (len(own) > 1)} {', '.join(str(gap.seed) for gap in own)}"
            for why, rows in groupby(group, key=lambda gap: gap.why)
            if (own := list(rows))
        ]
        lines.append(f"{name}: {'; '.join(parts)}.")
    return lines or ["Nothing is missing: every recipe has every seed, with its counterparts and all of its scores."]


def repeated(found: Mapping[tuple[str, str, str, str], Recipe], recipes: Sequence[Recipe]) -> list[str]:
    """Recipes that are one thing under two names, with the layers that make them so."""
    alike: dict[tuple[tuple[str, str, str], frozenset[str]], list[Recipe]] = {}
    by_key = {recipe.key: recipe for recipe in recipes}
    for key, first in found.items():
        alike.setdefault((first.setting, first.adapted), []).extend((first, by_key[key]))
    return [
        f"{where_of(setting)}: {joined(_each(one.peft for one in own))} adapt the same layers "
        f"({', '.join(sorted(adapted))}) and are one recipe in {joined(_each(one.precision for one in own))}: where "
        "they came out alike they count once in every correction."
        for (setting, adapted), own in alike.items()
    ]


def _each(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def guessing(found: Sequence[AtChance]) -> list[str]:
    """Scores of the reference that are not shown to be better than guesses."""
    return [
        f"{where_of(one.setting)}: {len(one.guessed)} of {one.of} scores in full precision are not shown to lie above "
        f"guessing: {joined([f'{scored(key)} {raw(*both)}' for key, both in one.guessed.items()])}. That a recipe "
        "agrees there says little about it."
        for one in found
    ]


def beyond_training(scores: Sequence[ScoreRow]) -> list[str]:
    """Scores on texts that are longer than the sequences that the model was trained on."""
    lines = []
    for model, rows in groupby(scores, key=lambda score: score.row.recipe.model):
        found = {(s.task, s.shots): s for s in rows if s.beyond_trained_length}
        parts = [f"{scored(key)} ({s.beyond_trained_length} of {s.items})" for key, s in found.items()]
        if parts:
            lines.append(
                f"{model}: beyond the trained length: {', '.join(parts)} items are longer than the sequences that the "
                "base model was trained on; these scores also measure extrapolation."
            )
    return lines
