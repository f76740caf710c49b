"""Single scores that lie far from their counterpart's, by task and shots, beside the noise floor of the same score."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from lyapft.divergence import is_spike
from lyapft.verdict.evidence import ScoreKey, Settings
from lyapft.verdict.floors import Floor
from lyapft.verdict.recipes import Row, once


@dataclass(frozen=True)
class Spikes:
    """Of one task and number of shots, over all recipes and seeds of a setting; sizes in points, scores fractions."""

    setting: tuple[str, str, str]
    key: ScoreKey
    spikes: int
    scores: int  # of how many
    mean_abs: float
    largest: float
    score: float
    counterpart_score: float
    beyond: bool  # whether items are longer than what the base model was trained on
    floors: Mapping[str, float] = field(default_factory=dict)  # mean size of the same score's difference, by kind


def worth_of_an_answer(found: Sequence[Row]) -> float:
    """Points by which one changed answer moves a single score; the most, where scores differ in their items."""
    return 100.0 / min(pair.fewest_items for row in found for pair in row.pairs)


def spikes(found: Sequence[Row], floors: Sequence[Floor], settings: Settings) -> list[Spikes]:
    """A row per setting, task and number of shots; a recipe that repeats another one counts once."""
    noise = {(floor.setting, floor.kind): floor for floor in floors}
    made: list[Spikes] = []
    rows = sorted(once(found), key=lambda row: row.recipe.setting)
    for setting, group in groupby(rows, key=lambda row: row.recipe.setting):
        own = list(group)
        beside = {kind: floor.by_score for (place, kind), floor in noise.items() if place == setting}
        made += _of_setting(setting, own, beside, settings)
    return made


def _of_setting(
    setting: tuple[str, str, str],
    own: Sequence[Row],
    floors: Mapping[str, Mapping[ScoreKey, float]],
    settings: Settings,
) -> Iterator[Spikes]:
    apart: dict[ScoreKey, list[tuple[float, float, float]]] = {}
    for pair in (pair for row in own for pair in row.pairs):
        ours, theirs = pair.ours.values, pair.theirs.values
        for key, points in pair.signed.items():
            apart.setdefault(key, []).append((points, ours[key], theirs[key]))
    for key, numbers in apart.items():
        points, ours_, theirs_ = np.array(numbers).T
        yield Spikes(
            setting=setting,
            key=key,
            spikes=sum(is_spike(float(one), settings.spike) for one in points),
            scores=len(points),
            mean_abs=float(np.abs(points).mean()),
            largest=float(np.abs(points).max()),
            score=float(ours_.mean()),
            counterpart_score=float(theirs_.mean()),
            beyond=any(key in row.beyond for row in own),
            floors={kind: by_score[key] for kind, by_score in floors.items() if key in by_score},
        )
