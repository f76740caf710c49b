"""Mamba beside the Transformer, the base beside the tuned model, and the settings that a study varies; a line each."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from lyapft.divergence import Estimate
from lyapft.verdict import sentences
from lyapft.verdict.ablations import Ablation
from lyapft.verdict.architectures import Contrast
from lyapft.verdict.evidence import PAPER
from lyapft.verdict.learning import Gain, Learned, Raw
from lyapft.verdict.page.common import BEYOND, Common, cut
from lyapft.verdict.page.layout import Topic, by_turns, line, topic
from lyapft.verdict.sentences.models import one_cell
from lyapft.verdict.words import AGAINST, counted, p_value, signed

MODELS = "Mamba against Transformer: mean size of a single score's divergence, these checkpoints on these data"
LEAST = 4  # comparisons that are shown before more is said of anything else
ASKED = "What else was asked"
MOST_TASKS = 2


def contrasts(common: Common) -> Topic:
    """A line for each pair of models and counterpart, the largest models of each answer first."""
    found = common.found
    if not found.contrasts:
        return line(MODELS, *sentences.architectures((), found.recurrent[:MOST_TASKS], (), found.settings))

    def kind(one: Contrast) -> str:
        steadier = one.steadier(found.settings)
        who = "Mamba" if steadier == one.model else "Transformer"
        return f"with the {who} steadier" if steadier else "undecided"

    overall = [one for one in found.contrasts if one.overall]
    ordered = by_turns(overall, kind, lambda one: common.size(one.model), LEAST)
    first = {one.place[:-1]: one for one in reversed(ordered[:LEAST])} if len(ordered) <= LEAST else {}
    return topic(
        MODELS,
        ordered,
        lambda one: _contrast(one, common, first.get(one.place[:-1]) is one),
        "comparisons",
        kind,
        LEAST,
    )


def _contrast(one: Contrast, common: Common, with_noise: bool) -> str:
    found = one.comparison
    reference = "the reference" if one.counterpart == PAPER or not one.trained else AGAINST[one.counterpart]
    names = f"{cut(one.model)} and {cut(one.twin)}{common.on(one.data, one.task)}"
    none = f"{one_cell(one)}, so neither can be called steadier"
    told = none if found.estimate.n < 2 else _steadier(one, common)
    ours, theirs = (
        f"{size.mean:.2f} ({common.scores(scores, one.beyond)})"
        for size, scores in ((one.size, one.scores), (one.twin_size, one.twin_scores))
    )
    difference = common.apart(found.estimate, found.p_different)
    floors = one.seed_floors(common.found.floors) if with_noise else None
    noise = f"; another seed: {floors[0]:.2f} and {floors[1]:.2f}" if floors else ""
    return f"{names}, from {reference}: {told}; {ours} and {theirs}, difference {difference}{noise}."


def _steadier(one: Contrast, common: Common) -> str:
    """Who is shown to be steadier, if that does not hang on which recipes are pooled."""
    settings = common.found.settings
    shown = one.steadier_in(one.comparison, settings)
    over = f"over {one.pooled} recipes"
    for other in one.rivals if one.poolings_disagree(settings) else ():
        if (theirs := one.steadier_in(other.comparison, settings)) != shown:
            others = f"all {len(other.recipes)}" if len(other.recipes) > one.pooled else f"{len(other.recipes)} others"
            return f"undecided ({_who(shown)} {over}, {'not' if theirs is None else _who(theirs)} over {others})"
    return (f"{cut(shown)} is steadier" if shown else "undecided") + f" {over}" * (one.pooled > 1)


def _who(steadier: str | None) -> str:
    return f"{cut(steadier)} steadier" if steadier else "undecided"


def in_context(common: Common) -> Topic:
    """In-context learning of the counterparts, relative to the Transformer twin's: a line for each model."""
    told = [gain for gain in common.found.gains if gain.reference and gain.twin and gain.relative and gain.twin_raw]
    rows = [list(own) for _, own in groupby(told, key=lambda gain: gain.recipe.key)]
    ordered = sorted(rows, key=lambda own: -common.size(own[0].recipe.model))
    recipes = Counter(own[0].recipe.setting for own in rows)
    return topic(
        MODELS,
        ordered,
        lambda own: _in_context(own, common, several=recipes[own[0].recipe.setting] > 1),
        "in-context comparisons",
    )


def _in_context(own: Sequence[Gain], common: Common, several: bool) -> str:
    first = own[0]
    name = common.name(first.recipe) if several else common.where(first.recipe.setting)
    tasks = ", ".join(_gain(gain, common) for gain in own[:MOST_TASKS])
    more = f" and {len(own) - MOST_TASKS} more tasks" if len(own) > MOST_TASKS else ""
    return f"In-context learning of {name}, as share of {cut(first.twin or '')}'s gain: {tasks}{more}."


def _gain(gain: Gain, common: Common) -> str:
    share, theirs = gain.relative, gain.twin_raw
    assert share is not None
    assert theirs is not None
    if math.isfinite(share.mean):
        text = f"{100 * share.mean:.0f}% {_percent(share, common)}"
    else:
        text = f"no ratio, {_no_ratio(share)}"
    mark = f" {BEYOND}" * gain.beyond
    return f"{cut(gain.task)} {text} ({_few(gain.raw)}{mark} against {_few(theirs)}{mark})"


def _no_ratio(found: Estimate) -> str:
    if found.n > 1:
        return "as the twin is not shown to gain"
    return "one seed" if found.unit == "seeds" else "without the answers item by item"


def _percent(found: Estimate, common: Common) -> str:
    n = f"; {counted(found)}" if found.unit == "items" else f"; n = {found.n}" if found.n != common.seeds else ""
    return f"[{found.low:.0%}, {found.high:.0%}{n}]".replace("-", "−")


def _few(found: Raw) -> str:
    """The scores without and with examples."""
    return f"{found.zero:.3f} to {found.few:.3f}"


def base_and_tuned(common: Common) -> Topic:
    """Whether tuning changed what a model makes of examples in its prompt, the largest models of each answer first."""
    settings = common.found.settings

    def kind(one: Learned) -> str:
        more = one.more(settings)
        return "undecided" if more is None else f"learning {'more' if more else 'less'} in context"

    ordered = by_turns(common.found.learned, kind, lambda one: common.size(one.recipe.model))
    return topic(ASKED, ordered, lambda one: _learned(one, common), "tuned recipes and tasks", kind)


def _learned(one: Learned, common: Common) -> str:
    more = one.more(common.found.settings)
    told = "is not shown to learn more or less" if more is None else f"learns {'more' if more else 'less'}"
    p = f", {p_value(one.p)}" if one.difference.n > 1 else ""
    mark = f" {BEYOND}" * one.beyond
    return (
        f"{common.name(one.recipe)}, {cut(one.task)}: {told} in context than its base: gain {signed(one.gain.mean)} "
        f"({_few(one.raw)}) against {signed(one.base_gain)} ({_few(one.base_raw)}{mark}) of the 0-shot score, "
        f"difference {common.apart(one.difference)}{p}."
    )


def settings_asked(common: Common) -> Topic:
    """What a setting does over all scores, everything else equal."""
    overall = [one for one in common.found.ablations if one.key is None]
    ordered = sorted(overall, key=lambda one: -common.size(one.setting[0]))
    return topic(ASKED, ordered, lambda one: _ablation(one, common), "pairs of a setting")


def _ablation(one: Ablation, common: Common) -> str:
    found, outcome = one.comparison, one.outcome(common.found.settings)
    told = {"equivalent": "equivalent", "undecided": "no difference is shown, nor equivalence"}
    p = found.p_equivalent if outcome == "equivalent" else found.p_different
    numbers = common.numbers(found.estimate, (one.score, one.other_score), bool(one.beyond), p)
    return (
        f"{common.where(one.setting)} · {cut(one.recipe)}, {cut(one.name)} {one.value} against {one.other}: "
        f"{told.get(outcome) or f'{getattr(one, outcome)} scores higher'} ({numbers})."
    )
