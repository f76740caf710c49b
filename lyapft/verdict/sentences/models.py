"""Mamba beside the Transformer, in-context learning, and single settings, as sentences."""

import math
from collections.abc import Sequence
from itertools import groupby

from lyapft.verdict.ablations import Ablation
from lyapft.verdict.architectures import Contrast, Pooling
from lyapft.verdict.evidence import Settings
from lyapft.verdict.floors import Floor
from lyapft.verdict.learning import Gain, Learned, Raw
from lyapft.verdict.words import (
    ALONE,
    MOST_LISTED,
    NO_ITEMS,
    against,
    beyond,
    difference,
    interval,
    joined,
    margin,
    needed,
    p_value,
    raw,
    scored,
    signed,
    size,
    where_of,
)

BEYOND = " Some of these scores are beyond the trained length."
APART = f"{ALONE} Means over all scores and single scores are two families."


def architectures(
    found: Sequence[Contrast], recurrent: Sequence[str], floors: Sequence[Floor], settings: Settings
) -> list[str]:
    """Whether models with a recurrent state diverge less than the Transformer of their size."""
    if not found:
        beside = f" beside {joined(list(recurrent))}" if recurrent else ""
        return [
            f"No recipe that a Mamba and a Transformer of about its size share has a counterpart{beside}: nothing can "
            "be compared."
        ]
    single: dict[tuple[str, ...], list[Contrast]] = {}
    for one in found:
        if not one.overall:
            single.setdefault(one.place, []).append(one)
    lines = [
        f"{_contrast(contrast, settings)}{_poolings(contrast, single.get(contrast.place, ()), settings)}"
        f"{_floors_of(contrast, floors)}{BEYOND * contrast.beyond}"
        for contrast in found
        if contrast.overall
    ]
    return [*lines, f"Each line is about these checkpoints on this data, not about the architectures as such. {ALONE}"]


def _floors_of(contrast: Contrast, floors: Sequence[Floor]) -> str:
    """What another seed alone does to both, beside a comparison of sizes, which hold that noise too."""
    both = contrast.seed_floors(floors)
    return f" Another seed alone moves them by {both[0]:.2f} and {both[1]:.2f} points." if both else ""


def _poolings(contrast: Contrast, single: Sequence[Contrast], settings: Settings) -> str:
    """What other means give where some recipes are left out, and which recipes show a difference by themselves."""
    if contrast.pooled < 2 or contrast.comparison.estimate.n < 2:
        return ""
    others = [
        f"over {_over(one, contrast)} {difference(one.comparison)}, {p_value(one.comparison.p_different)}"
        for one in contrast.others
    ]
    pooled = f" Pooled otherwise: {'; '.join(others)}." if others else ""
    shown = [f"{one.recipe} ({steadier} the steadier)" for one in single if (steadier := one.steadier(settings))]
    which = f": {joined(shown)}" if shown else ""
    return f"{pooled} By itself {len(shown) or 'none'} of the {len(single)} recipes shows a difference{which}."


def _over(one: Pooling, contrast: Contrast) -> str:
    """Which recipes another mean is of."""
    if len(one.recipes) > contrast.pooled:
        return f"all {len(one.recipes)}"
    instead = dict.fromkeys(f"{left.recipe.peft} instead of {left.same_as.peft}" for left in contrast.left_out)
    return f"{len(one.recipes)} with {joined(list(instead))}"


def _contrast(contrast: Contrast, settings: Settings) -> str:
    found = contrast.comparison
    pooled = f"mean over {contrast.pooled} recipes that both have{_without(contrast)}"
    reference = against(contrast.counterpart, contrast.trained)
    from_ = f"from {reference}, {pooled if contrast.pooled > 1 else contrast.recipe}"
    sizes = (
        f"mean divergence {size(contrast.size)} of {contrast.model}, scores {raw(*contrast.scores)}, and "
        f"{size(contrast.twin_size)} of {contrast.twin}, scores {raw(*contrast.twin_scores)}"
    )
    if found.estimate.n < 2:
        return (
            f"{contrast.model} and {contrast.twin} ({from_}): {sizes}; {one_cell(contrast)}"
            f"{' has no interval' * contrast.trained}, so neither can be called steadier."
        )
    numbers = f"{sizes}; difference {difference(found)}, {p_value(found.p_different)}."
    if steadier := contrast.steadier(settings):
        other = contrast.twin if steadier == contrast.model else contrast.model
        return f"{steadier} is steadier than {other} ({from_}): {numbers}"
    chosen = ", as it hangs on which recipes are pooled" if contrast.poolings_disagree(settings) else ""
    return f"{contrast.model} and {contrast.twin} ({from_}): neither is shown to be steadier{chosen}; {numbers}"


def one_cell(contrast: Contrast) -> str:
    """Why there is no interval."""
    return "one common seed" if contrast.trained else "a base is one cell whatever the seed"


def _without(contrast: Contrast) -> str:
    """Which recipes are left out of the mean, and why."""
    if not contrast.left_out:
        return ""
    why = dict.fromkeys(
        f"{one.recipe.model}'s {one.recipe.peft} is its {one.same_as.peft}"
        + ("" if one.alike else f"; {one.other}'s differs")
        for one in contrast.left_out
    )
    labels = [one.recipe.label for one in contrast.left_out]
    return f", without {joined(labels)}, because {joined(list(why))}"


def learning(found: Sequence[Gain]) -> list[str]:
    """In-context learning of the counterparts, relative to the Transformer twin: a sentence for each."""
    lines = []
    told = [gain for gain in found if gain.reference and gain.twin and gain.relative and gain.twin_raw]
    for (_, name), group in groupby(told, key=lambda gain: (gain.recipe.key, gain.recipe.name)):
        own = list(group)
        tasks = "; ".join(map(_gain, own[:MOST_LISTED]))
        more = f"; and {len(own) - MOST_LISTED} more tasks" if len(own) > MOST_LISTED else ""
        beyond_ = BEYOND if any(gain.beyond for gain in own) else ""
        lines.append(f"In-context learning of {name}, as gain of the 0-shot score: {tasks}{more}.{beyond_}")
    return lines


def _gain(gain: Gain) -> str:
    share, theirs = gain.relative, gain.twin_raw
    assert share is not None
    assert theirs is not None
    if share.unit == "items" and not share.n:
        relative = f"no ratio to {gain.twin}'s: {NO_ITEMS}"
    elif share.n < 2:
        relative = f"one seed gives no ratio to {gain.twin}'s"
    elif math.isfinite(share.mean):
        relative = f"{100 * share.mean:.0f}% of {gain.twin}'s ({interval(share, '.0%')}; {_few(theirs)})"
    else:
        relative = f"{gain.twin} is not shown to gain there, so no ratio ({_few(theirs)})"
    return f"{gain.task} {signed(gain.gain.mean)} ({interval(gain.gain, '.2f')}; {_few(gain.raw)}), {relative}"


def _few(found: Raw) -> str:
    """The scores behind a gain."""
    return f"{found.zero:.3f} 0-shot, {found.few:.3f} few-shot"


def base_and_tuned(found: Sequence[Learned], settings: Settings) -> list[str]:
    """Whether fine-tuning changed what the model makes of examples in its prompt."""
    lines = [_learned(one, settings) + (BEYOND if one.beyond else "") for one in found]
    return [*lines, ALONE] if any(not math.isnan(one.p) for one in found) else lines


def _learned(one: Learned, settings: Settings) -> str:
    shots = f"{one.shots[0]} to {one.shots[-1]} shots" if len(one.shots) > 1 else f"{one.shots[0]}-shot"
    base = "its base" if one.base.precision == one.recipe.precision else f"its base in {one.base.precision}"
    numbers = (
        f"gain {signed(one.gain.mean)} of the 0-shot score ({_few(one.raw)}) against {signed(one.base_gain)} of {base} "
        f"({_few(one.base_raw)}), difference {signed(one.difference.mean)} ({interval(one.difference)}), "
        f"{p_value(one.p)}"
    )
    more = one.more(settings)
    told = "is not shown to learn more or less" if more is None else f"learns {'more' if more else 'less'}"
    return f"{one.recipe.name}{_on(one.recipe.setting)}, {one.task}, {shots}, {told} in context than {base}: {numbers}."


def _on(setting: tuple[str, str, str]) -> str:
    return where_of(setting).removeprefix(setting[0])


def settings_asked(found: Sequence[Ablation], settings: Settings) -> list[str]:
    """What a setting does, everything else equal: over all scores, then the single scores where it shows."""
    lines = [_ablation(one, settings) for one in found if one.key is None]
    shown = [one for one in found if one.key is not None and one.comparison.p_different <= settings.alpha]
    for (setting, recipe, name), group in groupby(shown, key=lambda one: (one.setting, one.recipe, one.name)):
        own = sorted(group, key=lambda one: -abs(one.comparison.estimate.mean))
        parts = [
            f"{scored(one.key)}{' (beyond the trained length)' if one.beyond else ''} {difference(one.comparison)}, "
            f"{raw(one.score, one.other_score)}"
            for one in own[:MOST_LISTED]
            if one.key
        ]
        more = f" and {len(own) - MOST_LISTED} more" if len(own) > MOST_LISTED else ""
        lines.append(f"{where_of(setting)}, {recipe}: single scores in which {name} shows: {'; '.join(parts)}{more}.")
    return [*lines, APART] if any(one.comparison.estimate.n > 1 for one in found) else lines


def _ablation(one: Ablation, settings: Settings) -> str:
    found = one.comparison
    outcome = one.outcome(settings)
    if found.estimate.n < 2:
        told = f"undecided; {needed(found, settings)}"
    elif outcome == "equivalent":
        told = f"equivalent within {margin(settings)}, TOST {p_value(found.p_equivalent)}"
    elif outcome != "undecided":
        told = f"{getattr(one, outcome)} scores higher, {p_value(found.p_different)}"
    else:
        told = f"no difference is shown, {p_value(found.p_different)}, nor equivalence; {needed(found, settings)}"
    return (
        f"{where_of(one.setting)}, {one.recipe}, {one.name} {one.value} against {one.other}: {difference(found)}; "
        f"score {raw(one.score, one.other_score)}{beyond(one.beyond, one.scores)}; {told}."
    )
