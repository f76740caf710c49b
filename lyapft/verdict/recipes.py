"""Each recipe against full-precision fine-tuning of all weights: difference, cost, answers, outcome."""

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
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
    compare_each,
    estimate,
    is_spike,
    item_flips,
    over_items,
)
from lyapft.records import divergence_entry
from lyapft.verdict.costs import Cost, cost_of, jointly
from lyapft.verdict.duplicates import first_of_its_kind
from lyapft.verdict.evidence import PAPER, Evidence, Recipe, ScoreKey, Settings
from lyapft.verdict.pairing import (
    Pair,
    mean_scores,
    pairs,
    resolution,
    shared_keys,
)


@dataclass(frozen=True)
class Row:
    """One recipe against one kind of counterpart."""

    recipe: Recipe
    counterpart: str
    pairs: tuple[Pair, ...]
    comparison: (
        Comparison  # of the mean signed difference, adjusted over the table; over items where a seed changes none
    )
    size: Estimate  # of the mean absolute difference: positive even under the null, to be read beside its floor
    score: float  # mean over seeds, tasks and shots, fraction
    counterpart_score: float
    spikes: int
    scores: int  # of how many
    beyond: Collection[ScoreKey]  # scores of items that are longer than what the base model was trained on
    cost: Cost
    flips: Estimate | None  # share of answers that flipped
    kl: Estimate | None  # nats
    nll_gold: Estimate | None  # nats
    same_as: Recipe | None = None  # the recipe before it that this one repeats under another name

    def outcome(self, settings: Settings) -> Outcome:
        """What the signed differences allow to say."""
        return self.comparison.outcome(settings.alpha)

    @property
    def n(self) -> int:
        """Seeds."""
        return len(self.pairs)

    @property
    def uncompared(self) -> int:
        """Seeds that finished, but have no counterpart."""
        return len(self.recipe.runs) - self.n

    @property
    def keys(self) -> list[ScoreKey]:
        """Every (task, shots) that any seed is compared on."""
        return shared_keys(self.pairs)


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
    chance: float  # the accuracy of a blind guess; NaN where no record has it
    beyond_trained_length: int


def rows(evidence: Evidence, settings: Settings, counterpart: str = PAPER) -> list[Row]:
    """A row per recipe that has at least one counterpart, p of scores and of costs adjusted over all of them."""
    same = first_of_its_kind(evidence.recipes)
    paired = [(recipe, tuple(own)) for recipe in evidence.recipes if (own := pairs(evidence, recipe, counterpart))]
    signed = [[pair.mean_signed for pair in own] for _, own in paired]
    tests = compare_each(signed, settings.margin, [_grain(own) for _, own in paired])
    tests = [
        _over_items(evidence, own[0], test, settings) if recipe.seedless else test
        for (recipe, own), test in zip(paired, tests, strict=True)
    ]
    found = [
        _row(evidence, recipe, own, test, settings, counterpart, same.get(recipe.key))
        for (recipe, own), test in zip(paired, tests, strict=True)
    ]
    comparisons = adjusted(tests, [name_of_test(row) for row in found])
    return _costed([replace(row, comparison=new) for row, new in zip(found, comparisons, strict=True)])


def judged_once(found: Sequence[Row]) -> list[Row]:
    """Without those that repeat another one of them, however both came out: what to use is one recipe, by one name."""
    named = {row.recipe.key for row in found}
    return [row for row in found if row.same_as is None or row.same_as.key not in named]


def _costed(found: Sequence[Row]) -> list[Row]:
    """The same with p of their costs adjusted over all that are judged; of the others no cost is tested."""
    judged = judged_once(found)
    by_key = dict(zip((row.recipe.key for row in judged), jointly([row.cost for row in judged]), strict=True))
    return [replace(row, cost=by_key.get(row.recipe.key, replace(row.cost, p=math.nan))) for row in found]


def _over_items(evidence: Evidence, pair: Pair, test: Comparison, settings: Settings) -> Comparison:
    """The comparison of a base, which is one cell whatever the seed: over its items, or with n = 0 of them."""
    ours, theirs = (evidence.items.get(str(side["id"])) for side in (pair.run, pair.counterpart))
    found = None if ours is None or theirs is None else over_items(ours, theirs, settings.margin)
    return found or replace(test, estimate=Estimate(test.estimate.mean, math.nan, math.nan, 0, "items"))


def _grain(own: Sequence[Pair]) -> float:
    """Points by which one changed answer moves the mean difference of any of the pairs."""
    return max(map(resolution, own))


def name_of_test(row: Row) -> Hashable:
    """What names the test of a row in its family: recipes that are one thing and came out alike are one test.

    Where another seed of one of them failed the two tests differ, and both count.
    """
    recipe = row.same_as or row.recipe
    return *recipe.key, tuple((pair.seed, pair.mean_signed) for pair in row.pairs)


def once(found: Iterable[Row]) -> list[Row]:
    """Without those that repeat another one and came out alike; what fails under its second name alone stays."""
    firsts: dict[Hashable, Row] = {}
    for row in found:
        firsts.setdefault((row.counterpart, name_of_test(row)), row)
    return list(firsts.values())


def score_rows(found: Sequence[Row], settings: Settings) -> list[ScoreRow]:
    """A row per recipe, task and number of shots, p values adjusted over all of them."""
    by_score = [(row, key, [pair for pair in row.pairs if key in pair.signed]) for row in found for key in row.keys]
    items = [min(pair.ours.items[key] for pair in own) for _, key, own in by_score]
    signed = [[pair.signed[key] for pair in own] for _, key, own in by_score]
    names = {id(row): name_of_test(row) for row in found}
    tests = adjusted(
        compare_each(signed, settings.margin, [100.0 / n for n in items]),
        [(names[id(row)], *key) for row, key, _ in by_score],
    )
    return [
        ScoreRow(
            row,
            *key,
            score=float(np.mean([pair.ours.values[key] for pair in own])),
            counterpart_score=float(np.mean([pair.theirs.values[key] for pair in own])),
            comparison=test,
            items=n,
            chance=next((pair.ours.chance[key] for pair in own if key in pair.ours.chance), math.nan),
            beyond_trained_length=max(pair.ours.beyond.get(key, 0) for pair in own),
        )
        for (row, key, own), n, test in zip(by_score, items, tests, strict=True)
    ]


def _row(
    evidence: Evidence,
    recipe: Recipe,
    own: tuple[Pair, ...],
    comparison: Comparison,
    settings: Settings,
    counterpart: str,
    same: Recipe | None,
) -> Row:
    flips, kl, nll_gold = _answers(evidence, own, counterpart)
    score, counterpart_score = mean_scores(own)
    return Row(
        recipe=recipe,
        counterpart=counterpart,
        pairs=own,
        comparison=comparison,
        size=estimate([pair.mean_abs for pair in own], _grain(own), least=0.0),
        score=score,
        counterpart_score=counterpart_score,
        spikes=sum(is_spike(points, settings.spike) for pair in own for points in pair.signed.values()),
        scores=sum(len(pair.signed) for pair in own),
        beyond=frozenset(key for pair in own for key in pair.ours.beyond if key in pair.signed),
        cost=cost_of(own, settings),
        flips=flips,
        kl=kl,
        nll_gold=nll_gold,
        same_as=same,
    )


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
    if ours is None or theirs is None or not all("logprobs" in side for side in (ours, theirs)):
        return None  # of a base there may be no more than which items it has right
    return item_flips(ours, theirs), answer_shift(ours, theirs)
