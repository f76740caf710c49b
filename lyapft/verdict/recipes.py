"""Each recipe against full-precision fine-tuning of all weights: difference, cost, answers, outcome."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lyapft.divergence import (
    AnswerShift,
    Comparison,
    Estimate,
    Flips,
    Outcome,
    adjusted,
    answer_shift,
    compare,
    estimate,
    is_spike,
    item_flips,
)
from lyapft.records import Record, costs, divergence_entry
from lyapft.verdict.evidence import (
    PAPER,
    PRECISION_ONLY,
    Evidence,
    Pair,
    Recipe,
    Settings,
    items_of,
    pairs,
    resolution,
    score_key,
    values_of,
)


@dataclass(frozen=True)
class Cost:
    """What a recipe needs, as ratios to its counterpart: geometric means over seeds, n = 0 where not measured."""

    speed: Estimate  # × tokens/s: above 1 is faster
    memory: Estimate  # × peak bytes per token in flight: below 1 is leaner
    index: Estimate  # weighted geometric mean of time and memory: below 1 is cheaper
    emulated: bool  # half precision was emulated: its speed is not that of hardware that has it
    halved: int  # pairs in which memory ran out, left out of all three


@dataclass(frozen=True)
class Row:
    """One recipe against one kind of counterpart."""

    recipe: Recipe
    counterpart: str
    pairs: tuple[Pair, ...]
    comparison: Comparison  # of the mean signed difference, adjusted over the table
    size: Estimate  # of the mean absolute difference: positive even under the null, to be read beside its floor
    score: float  # mean over seeds, tasks and shots, fraction
    counterpart_score: float
    spikes: int
    scores: int  # of how many
    cost: Cost
    flips: Estimate | None  # share of answers that flipped
    kl: Estimate | None  # nats
    nll_gold: Estimate | None  # nats

    def outcome(self, settings: Settings) -> Outcome:
        """What the signed differences allow to say."""
        return self.comparison.outcome(settings.alpha)

    @property
    def n(self) -> int:
        """Seeds."""
        return len(self.pairs)

    @property
    def cheaper(self) -> bool:
        """Whether it is shown to cost less than its counterpart: the interval lies below 1, of one seed the value."""
        index = self.cost.index
        return (index.high if index.n > 1 else index.mean) < 1


@dataclass(frozen=True)
class ScoreRow:
    """One score of one recipe against one kind of counterpart."""

    row: Row
    task: str
    shots: int
    score: float
    counterpart_score: float
    comparison: Comparison
    items: int
    beyond_trained_length: int


def rows(evidence: Evidence, settings: Settings, counterpart: str = PAPER) -> list[Row]:
    """A row per recipe that has at least one counterpart, p values adjusted over all of them."""
    found = [
        _row(evidence, recipe, tuple(own), settings, counterpart)
        for recipe in evidence.recipes
        if (own := pairs(evidence, recipe, counterpart))
    ]
    comparisons = adjusted([row.comparison for row in found])
    return [replace(row, comparison=new) for row, new in zip(found, comparisons, strict=True)]


def score_rows(found: Sequence[Row], settings: Settings) -> list[ScoreRow]:
    """A row per recipe, task and number of shots, p values adjusted over all of them."""
    raw = [one for row in found for one in _score_rows(row, settings)]
    comparisons = adjusted([one.comparison for one in raw])
    return [replace(one, comparison=new) for one, new in zip(raw, comparisons, strict=True)]


def shares(evidence: Evidence, recipe: Recipe) -> tuple[Estimate, Estimate] | None:
    """Parts of the mean signed difference, in points: of the peft, and of the number format.

    (cell − paper) = (fp32 same peft − paper) + (cell − fp32 same peft), seed by seed; None where either is missing.
    """
    total = {pair.seed: pair.mean_signed for pair in pairs(evidence, recipe, PAPER)}
    format_part = {pair.seed: pair.mean_signed for pair in pairs(evidence, recipe, PRECISION_ONLY)}
    both = sorted(total.keys() & format_part.keys())
    if not both:
        return None
    return estimate([total[seed] - format_part[seed] for seed in both]), estimate([format_part[s] for s in both])


def _row(evidence: Evidence, recipe: Recipe, own: tuple[Pair, ...], settings: Settings, counterpart: str) -> Row:
    signed, grain = [pair.mean_signed for pair in own], max(map(resolution, own))
    flips, kl, nll_gold = _answers(evidence, own, counterpart)
    score, counterpart_score = _mean_scores(own)
    return Row(
        recipe=recipe,
        counterpart=counterpart,
        pairs=own,
        comparison=compare(signed, settings.margin, grain),
        size=estimate([pair.mean_abs for pair in own], grain, least=0.0),
        score=score,
        counterpart_score=counterpart_score,
        spikes=sum(is_spike(points, settings.spike) for pair in own for points in pair.signed.values()),
        scores=sum(len(pair.signed) for pair in own),
        cost=_cost(own, settings),
        flips=flips,
        kl=kl,
        nll_gold=nll_gold,
    )


def _mean_scores(own: Sequence[Pair]) -> tuple[float, float]:
    """Means over pairs and scores: of the runs, and of their counterparts."""
    ours: list[float] = []
    theirs: list[float] = []
    for pair in own:
        for side, found in ((pair.run, ours), (pair.counterpart, theirs)):
            values = values_of(side)
            found += [values[key] for key in pair.signed]
    return float(np.mean(ours)), float(np.mean(theirs))


def _score_rows(row: Row, settings: Settings) -> Iterator[ScoreRow]:
    """A row per score; each record is looked through once."""
    ours = [values_of(pair.run) for pair in row.pairs]
    theirs = [values_of(pair.counterpart) for pair in row.pairs]
    counts = [items_of(pair.run) for pair in row.pairs]
    beyond = [_beyond_trained_length(pair.run) for pair in row.pairs]
    for key in row.pairs[0].signed:
        own = [place for place, pair in enumerate(row.pairs) if key in pair.signed]
        n = min(counts[place][key] for place in own)
        yield ScoreRow(
            row,
            *key,
            score=float(np.mean([ours[place][key] for place in own])),
            counterpart_score=float(np.mean([theirs[place][key] for place in own])),
            comparison=compare([row.pairs[place].signed[key] for place in own], settings.margin, 100.0 / n),
            items=n,
            beyond_trained_length=max(beyond[place].get(key, 0) for place in own),
        )


def _beyond_trained_length(record: Record) -> dict[tuple[str, int], int]:
    """Items of each score that are longer than what the base model was trained on; the most, over metrics."""
    found: dict[tuple[str, int], int] = {}
    for score in record["scores"]:
        key = score_key(score)
        found[key] = max(found.get(key, 0), int(score.get("beyond_trained_length") or 0))
    return found


def _cost(own: Sequence[Pair], settings: Settings) -> Cost:
    speed, memory = (_log_ratios(own, name) for name in ("tokens_per_s", "peak_bytes_per_token"))
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
    halved = sum(any(side.get("oom") for side in (pair.run, pair.counterpart)) for pair in own)
    return Cost(_geometric_mean(speed), _geometric_mean(memory), _geometric_mean(index), emulated, halved)


def _log_ratios(own: Sequence[Pair], name: str) -> dict[int, float]:
    """ln(run / counterpart) by seed, where both were measured."""
    measured = {pair.seed: [costs(side).get(name) for side in (pair.run, pair.counterpart)] for pair in own}
    return {seed: math.log(ours / theirs) for seed, (ours, theirs) in measured.items() if ours and theirs}


def _geometric_mean(logs: dict[int, float]) -> Estimate:
    found = estimate(list(logs.values()))
    return Estimate(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.n)


def _answers(
    evidence: Evidence, own: Sequence[Pair], counterpart: str
) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """Flip rate, KL and NLL shift over the seeds whose items are at hand on both sides."""
    flips, kls, shifts, one_answer = [], [], [], 0.0
    for pair in own:
        found = _answers_of(evidence, pair, counterpart)
        if found is None:
            continue
        flipped, shift = found
        flips.append(flipped.rate)
        one_answer = max(one_answer, 1.0 / flipped.n)
        if shift.n:
            kls.append(shift.kl)
            shifts.append(shift.nll_gold)
    return (
        estimate(flips, one_answer, least=0.0, most=1.0) if flips else None,
        estimate(kls, least=0.0) if kls else None,
        estimate(shifts) if shifts else None,
    )


def _answers_of(evidence: Evidence, pair: Pair, counterpart: str) -> tuple[Flips, AnswerShift] | None:
    """The pair's answers side by side: as the run's record has them, else from the items where both are at hand."""
    entry = divergence_entry(pair.run, counterpart) or {}
    if entry.get("flips") and entry.get("answer_shift"):
        return Flips(**entry["flips"]), AnswerShift(**entry["answer_shift"])
    ours, theirs = (evidence.items.get(str(side["id"])) for side in (pair.run, pair.counterpart))
    return None if ours is None or theirs is None else (item_flips(ours, theirs), answer_shift(ours, theirs))
