"""Where recipes fail, what is to blame, and the remedy that the study tried; a short line each."""

from collections.abc import Sequence

from lyapft.verdict.blame import Inquiry, choice_of, is_shown
from lyapft.verdict.evidence import PAPER, Recipe
from lyapft.verdict.failures import Outside, explained, furthest, remedied
from lyapft.verdict.page.common import Common, cut, some
from lyapft.verdict.page.layout import Topic, line, topic
from lyapft.verdict.sentences.failures import none_outside
from lyapft.verdict.words import AGAINST, joined, margin, scored

FAILS = "Where it fails"
SINGLE = "recipes, in whatever formats, with single scores outside the margin"
HOW = {
    "equivalent": "inside the margin",
    "undecided": "undecided",
    "better": "better than the reference",
    "worse": "still outside",
}


def whole_recipes(common: Common) -> Topic:
    """Recipes outside the margin, the furthest first."""
    found = common.found
    ordered = sorted(found.failures.whole, key=lambda one: -abs(one.row.comparison.estimate.mean))
    if found.rows and not ordered:
        some_scores = f"No recipe as a whole is shown to lie outside {margin(found.settings)}."
        return line(FAILS, some_scores if found.failures.single else none_outside(found.rows, found.settings))
    noun = "recipes outside the margin"
    return topic(FAILS, ordered, lambda one: _whole(one, common), noun, lambda one: one.row.outcome(found.settings))


def single_scores(common: Common) -> Topic:
    """Recipes with single scores outside the margin: those that nothing else on the page explains first."""
    ordered = sorted(
        common.found.failures.single,
        key=lambda group: (
            explained(group) is None,
            -abs(furthest(group)[0].comparison.estimate.mean),
        ),
    )
    return topic(FAILS, ordered, lambda group: _single(group, common), SINGLE)


def broken_down(common: Common) -> Topic:
    """Recipes whose training broke down, the largest models first."""
    broken = [recipe for recipe in common.found.recipes if recipe.breakdowns()]
    ordered = sorted(broken, key=lambda recipe: -common.size(recipe.model))
    return topic(FAILS, ordered, lambda one: _broken(one, common), "recipes whose training broke down")


def _broken(recipe: Recipe, common: Common) -> str:
    return f"{common.name(recipe)}: {joined(recipe.breakdowns())}."


def _whole(one: Inquiry, common: Common) -> str:
    row, settings = one.row, common.found.settings
    outcome = row.outcome(settings)
    scores = (row.score, row.counterpart_score)
    numbers = common.numbers(row.comparison.estimate, scores, bool(row.beyond), row.comparison.p_outside)
    tried = _remedy(one, common) if outcome == "worse" else ""
    by = f"by more than {settings.margin:g} point{'s' * (settings.margin != 1)}"
    return f"{common.name(row.recipe)} is {outcome} {by} ({numbers}). {_blame(one, common)}.{tried}"


def _single(group: Sequence[Outside], common: Common) -> str:
    recipe, worst = group[0].row.recipe, furthest(group)[0]
    formats = f" in {joined([one.row.recipe.precision for one in group])}" if len(group) > 1 else ""
    label = recipe.but_format if formats else recipe.label
    name = f"{cut(f'{recipe.model} · {label}')}{formats}{common.on(recipe.data, recipe.task)}"
    against = f" from {AGAINST[group[0].row.counterpart]}" if group[0].row.counterpart != PAPER else ""
    count = sum(len(one.scores) for one in group)
    form = f" in {worst.row.recipe.precision}" if formats else ""
    numbers = common.numbers(
        worst.comparison.estimate, (worst.score, worst.counterpart_score), bool(worst.beyond_trained_length)
    )
    asked = explained(group)
    why = f" {_blame(asked, common)}." if asked else ""
    why += _remedy(tried, common, bool(formats)) if (tried := remedied(group)) else ""
    return (
        f"{name}: {count} single score{'s' * (count != 1)} outside {margin(common.found.settings)}{against}, furthest "
        f"{cut(scored((worst.task, worst.shots)))}{form} ({numbers}).{why}"
    )


def _blame(one: Inquiry, common: Common) -> str:
    """Peft or format, with the layers or the block; only what is shown, and only what moves the scores that way."""
    recipe, settings = one.row.recipe, common.found.settings
    peft, form = f"the peft ({_peft(one, common)})", f"the format ({_format(one, common)})"
    blamed = "To blame" if one.loses else "Owed to"
    if recipe.precision == "fp32":
        return f"{blamed}: {peft}"
    if recipe.peft == "none":
        return f"{blamed}: {form}"
    if one.shares is None:
        return f"{blamed}: peft or format, the records cannot tell"
    parts = [(peft, one.shares.peft), (form, one.shares.form)]
    shown = [name for name, part in parts if is_shown(part, settings) and (part.estimate.mean < 0) == one.loses]
    return f"{blamed}: {joined(shown)}" if shown else f"{blamed}: neither peft nor format is shown to do it by itself"


def _peft(one: Inquiry, common: Common) -> str:
    """The peft, the layers that it adapts, and which of them the study's other target sets show to cost scores."""
    recipe = one.row.recipe
    on = f" on {some(sorted(recipe.adapted), 'layers')}" if recipe.adapted else ""
    shown = [
        choice_of(recipe, layers)
        for layers in one.layers
        if one.loses and is_shown(layers.apart, common.found.settings) and layers.apart.estimate.mean > 0
    ]
    if shown:
        return f"{cut(recipe.peft)}{on}; in part {some(shown, 'choices')}"
    return f"{cut(recipe.peft)}{on}{'; which of them is not shown' * (len(recipe.adapted) > 1)}"


def _format(one: Inquiry, common: Common) -> str:
    form, found = cut(one.row.recipe.precision), one.origins
    if found and found.shown(common.found.settings.alpha):
        return f"{form}, most of whose rounding enters in {cut(found.block)}"
    return form


def _remedy(one: Inquiry, common: Common, several: bool = False) -> str:
    best = one.remedy
    if best is None:
        return " No remedy was tried."
    numbers = common.numbers(best.comparison.estimate, best.scores, bool(best.beyond))
    where = f" in {cut(one.row.recipe.precision)}" * several
    return f" Tried {best.changed}={cut(getattr(best.recipe, best.changed))}{where}: {HOW[best.outcome]} ({numbers})."
