"""Recipes that differ in one setting alone, seed by seed: what the setting does to the scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lyapft.divergence import Comparison, adjusted, compare, paired_divergence
from lyapft.records import accuracies
from lyapft.verdict.evidence import Evidence, Recipe, ScoreKey, Settings, seed_of
from lyapft.verdict.pairing import Pair, mean_scores_of, resolution, shared_keys

# What a study may vary to be told its effect: the setting's name, the value that is asked about, and the one beside it.
ASKED = (("peft.memory_buffer", "tied", "untied"),)


@dataclass(frozen=True)
class Ablation:
    """One value of a setting against another one, everything else equal: value minus other, in points.

    `key` is the task and number of shots, None for the mean over all of them.
    """

    setting: tuple[str, str, str]
    recipe: str
    name: str
    value: str
    other: str
    key: ScoreKey | None
    score: float
    other_score: float
    comparison: Comparison
    beyond: int  # scores of items that are longer than what the base model was trained on
    scores: int  # of how many

    def outcome(self, settings: Settings) -> Literal["equivalent", "value", "other", "undecided"]:
        """Whether the two are equivalent, or which one is shown to score higher; one seed shows nothing."""
        if self.comparison.p_equivalent <= settings.alpha:
            return "equivalent"
        if self.comparison.p_different <= settings.alpha:
            return "value" if self.comparison.estimate.mean > 0 else "other"
        return "undecided"


def ablations(evidence: Evidence, settings: Settings) -> list[Ablation]:
    """Every pair of recipes that differ in one of the settings asked about: first all means, then each task and shots.

    The means and the single scores are families of their own: details must not blur the answer.
    """
    raw = [
        one
        for name, value, other in ASKED
        for ours, theirs in _pairs(evidence, name, value, other)
        for one in _compared(_by_seed(evidence, ours, theirs), ours, (name, value, other), settings)
    ]
    return _adjusted([one for one in raw if one.key is None]) + _adjusted([one for one in raw if one.key is not None])


def _adjusted(raw: Sequence[Ablation]) -> list[Ablation]:
    comparisons = adjusted([one.comparison for one in raw])
    return [replace(one, comparison=new) for one, new in zip(raw, comparisons, strict=True)]


def _pairs(evidence: Evidence, name: str, value: str, other: str) -> Iterator[tuple[Recipe, Recipe]]:
    """Recipes that have the one value and the other, all else equal."""
    group, _, field = name.partition(".")
    having: dict[str, list[Recipe]] = {value: [], other: []}
    for recipe in evidence.recipes:
        chosen = ((recipe.runs[0].get("config") or {}).get(group) or {}).get(field) if recipe.runs else None
        if chosen in having:
            having[chosen].append(recipe)
    if not all(having.values()):  # nearly every study: the rest would take time
        return
    rest = {recipe.key: _without(recipe, name) for own in having.values() for recipe in own}
    for ours in having[value]:
        for theirs in having[other]:
            if ours.setting == theirs.setting and rest[ours.key] == rest[theirs.key]:
                yield ours, theirs


def _without(recipe: Recipe, name: str) -> dict[str, str]:
    return {key: value for key, value in recipe.settings.items() if key != name}


def _compared(own: Sequence[Pair], ours: Recipe, asked: tuple[str, str, str], settings: Settings) -> Iterator[Ablation]:
    """The mean over all tasks and shots, then each of them."""
    name, value, other = asked
    keys = shared_keys(own)
    for kept in (None, *keys) if own else ():
        wanted = keys if kept is None else [kept]
        used = [pair for pair in own if kept is None or kept in pair.signed]
        grain = max(map(resolution, used)) * (1 if kept is None else max(len(pair.signed) for pair in used))
        score, other_score = mean_scores_of(used, wanted)
        yield Ablation(
            setting=ours.setting,
            recipe=" · ".join(part for part in ours.label.split(" · ") if not part.startswith(f"{name}=")),
            name=name,
            value=value,
            other=other,
            key=kept,
            score=score,
            other_score=other_score,
            comparison=compare([pair.mean_over(wanted) for pair in used], settings.margin, grain),
            beyond=len({key for pair in used for key in pair.ours.beyond if key in wanted}),
            scores=len(wanted),
        )


def _by_seed(evidence: Evidence, ours: Recipe, theirs: Recipe) -> list[Pair]:
    """The runs of two recipes that share a seed and scores, the second ones as counterparts."""
    others = {seed_of(run): run for run in theirs.runs}
    found = []
    for run in ours.runs:
        other = others.get(seed_of(run))
        if other is None:
            continue
        sides = evidence.scores(run), evidence.scores(other)
        if not sides[0].values.keys() & sides[1].values.keys():
            continue
        apart = paired_divergence(accuracies(run), accuracies(other))
        signed = {(score.task, score.shots): score.signed_points for score in apart.per_score}
        found.append(Pair(seed_of(run), run, other, signed, *sides))
    return found
