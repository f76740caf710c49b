"""How far a page can be trusted: noise, spikes, what is missing, and labels; a line each."""

import re
from collections import Counter
from itertools import groupby

from lyapft.verdict import sentences
from lyapft.verdict.duplicates import first_of_its_kind
from lyapft.verdict.floors import measurable
from lyapft.verdict.page.common import BEYOND, FLIPPED, Common, cut, some
from lyapft.verdict.page.layout import Topic, line, topic
from lyapft.verdict.sentences.advice import cost_means
from lyapft.verdict.sentences.failures import NOISE
from lyapft.verdict.words import EMULATED, chance, joined, margin, raw, scored, seeds

MOST_RECIPES, MOST_MODELS = 1, 2
TRUST, KEY = "How far to trust it", "How to read this page"


def noise(common: Common) -> Topic:
    """How far runs lie apart that should not differ: over all settings, from the least to the largest."""
    floors, settings = common.found.floors, len({recipe.setting for recipe in common.found.recipes})
    parts = []
    for kind, short in NOISE.items():
        sizes = sorted(floor.mean_abs for floor in floors if floor.kind == kind)
        if sizes:
            reach = f"{sizes[0]:.2f}" + f" to {sizes[-1]:.2f}" * (f"{sizes[0]:.2f}" != f"{sizes[-1]:.2f}")
            of = f" ({len(sizes)} of {settings} settings)" * (len(sizes) < settings)
            parts.append(f"{short} {reach}{of}")
    kinds = measurable(common.found.recipes)
    absent = [NOISE[kind] for kind in kinds if kind not in {floor.kind for floor in floors}]
    not_measured = f" Not measured: {joined(absent)}." if absent else ""
    if not parts:
        return line(TRUST, f"Noise was not measured: {joined(list(kinds.values()))}.")
    low, high = min(floor.scores[0] for floor in floors), max(floor.scores[1] for floor in floors)
    reach = f"{', '.join(parts)} points (scores {low:.3f} to {high:.3f})"
    return line(TRUST, f"Noise, as mean size of a difference: {reach}.{not_measured}")


def spikes(common: Common) -> Topic:
    """How many single scores lie far off, and where most often."""
    found, settings = common.found.spikes, common.found.settings
    total, count = (sum(getattr(one, name) for one in found) for name in ("scores", "spikes"))
    if not total:
        return Topic(TRUST, (), ())
    worst = max(found, key=lambda one: (one.spikes / one.scores, one.mean_abs))
    where = f"{common.where(worst.setting)}, {cut(scored(worst.key))}"
    beside = f"{worst.spikes} of {worst.scores}; {raw(worst.score, worst.counterpart_score)}"
    often = f", most often {where}: {beside}" * bool(count)
    points = f"{settings.spike:g} point{'s' * (settings.spike != 1)}"
    return line(TRUST, f"Spikes: {count} of {total} single scores lie over {points} off{often}.")


def missing(common: Common) -> Topic:
    """What the tables lack: counted by why, and of which recipes most."""
    gaps = common.found.gaps
    if not gaps:
        return line(TRUST, *sentences.missing(()))
    kinds = Counter(gap.kind or gap.why for gap in gaps).most_common()
    why = some([f"{kind} ({count})" for kind, count in kinds], "reasons")
    recipes = Counter(common.name(gap.recipe) for gap in gaps).most_common()
    named = some([f"{name} ({count})" for name, count in recipes], "recipes, below", MOST_RECIPES)
    return line(TRUST, f"Missing or failed: {why}, in {named}.")


def guessing(common: Common) -> Topic:
    """Where agreement is no merit, by model, data and task."""
    found = sorted(common.found.at_chance, key=lambda one: -common.size(one.setting[0]))
    counts = [f"{common.where(one.setting)} ({len(one.guessed)} of {one.of} scores)" for one in found]
    if not counts:
        return Topic(TRUST, (), ())
    text = some(counts, "settings, below", MOST_MODELS)
    return line(TRUST, f"Reference not shown above chance, so agreement there says little: {text}.")


def beyond_training(common: Common) -> Topic:
    """What the dagger stands for, by model."""
    own: dict[str, dict[tuple[str, int], bool]] = {}
    for score in common.found.scores:
        keys, key = own.setdefault(score.row.recipe.model, {}), (score.task, score.shots)
        keys[key] = keys.get(key, False) or bool(score.beyond_trained_length)
    ordered = sorted((model for model in own if any(own[model].values())), key=lambda model: -common.size(model))
    if not ordered:
        return Topic(TRUST, (), ())
    counts = [f"{cut(model)} ({sum(own[model].values())} of {len(own[model])} scores)" for model in ordered]
    return line(
        TRUST,
        f"{BEYOND} beyond the trained length, so extrapolation too: {some(counts, 'models, below', MOST_MODELS)}.",
    )


def repeated(common: Common) -> Topic:
    """Recipes that are one thing under two names."""
    found = first_of_its_kind(common.found.recipes)
    recipes = [recipe for recipe in common.found.recipes if recipe.key in found]
    rows = [
        (common.where(setting), list(dict.fromkeys(name for one in own for name in (found[one.key].peft, one.peft))))
        for setting, own in groupby(sorted(recipes, key=lambda one: one.setting), key=lambda one: one.setting)
    ]
    return topic(
        TRUST,
        rows,
        lambda row: (
            f"Counted once where they came out alike: {joined(list(map(cut, row[1])))} of {row[0]}, which are "
            "one recipe."
        ),
        "models with one recipe under two names",
    )


def key(common: Common, text: str) -> list[Topic]:
    """What is said once for all lines.

    Args:
        text: the lines of the page, which may use marks that need an explanation.
    """
    found = common.found
    if not (found.rows or found.learned or found.ablations):
        return []
    trained = any(recipe.trained for recipe in found.recipes)
    units = [unit for unit in ("seeds", "items") if f"{unit} would" in text]
    parts = [
        "none: every weight trains." if trained and re.search(r"\bnone\b", text) else "",
        f"Differences: points of accuracy, mean over tasks and shots, {_brackets(common)}; then score against score. "
        f"Equivalent: inside {margin(found.settings)} by two one-sided tests. Holm corrects every p, no interval.",
        "Flipped: share of answers that differ." if FLIPPED in text else "",
        cost_means(found.settings) if "cost" in text or any(one.chosen for one in found.recommendations) else "",
        f"{joined(units).capitalize()}: with {chance(found.settings)}." if units else "",
    ]
    lines = [" ".join(filter(None, parts))]
    if EMULATED in text:
        lines.append(f"{EMULATED}: half precision in software; where hardware has it, speed and cost are others.")
    return [line(KEY, one) for one in lines]


def _brackets(common: Common) -> str:
    if not common.seeds:  # bases alone
        return "same items [95% interval over items: a seed changes nothing]"
    if common.seeds == 1:
        return "same seeds: one seed, so no interval, and nothing is decided"
    return f"same seeds [95% interval; {seeds(common.seeds)}, unless named]"
