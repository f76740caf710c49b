"""Where a recipe fails: the part of the peft and that of the number format, and the remedy that the study tried.

Within each part the records are asked for more: which of the adapted layers, by the study's other target sets, and in
which block the format's rounding enters, by the shadow probe. Where they cannot tell, that is said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lyapft.divergence import Comparison
from lyapft.verdict import remedies
from lyapft.verdict.evidence import Evidence, Recipe, ScoreKey, Settings
from lyapft.verdict.pairing import mean_scores_of
from lyapft.verdict.parts import Beside, Families, Shares, beside, halves, holm_by_name, jointly
from lyapft.verdict.recipes import Row, ScoreRow
from lyapft.verdict.rounding import Origins, origins_of
from lyapft.verdict.words import interval, joined, raw, signed


@dataclass(frozen=True)
class Layers:
    """Another target set in the same format: its difference to the failing one, on the seeds that both have."""

    other: Recipe
    more: frozenset[str]  # the layers in which the two differ
    apart: Comparison
    scores: tuple[float, float]  # of the other one and of the failing one, fractions


@dataclass(frozen=True)
class Inquiry:
    """One failure against the paper's counterpart, with all that the study's other recipes say of it."""

    row: Row
    keys: tuple[ScoreKey, ...]  # the scores that fail
    shares: Shares | None
    layers: tuple[Layers, ...]
    origins: Origins | None  # of the format's rounding
    changed: str  # the choice that a remedy has to change
    remedy: remedies.Remedy | None

    @property
    def loses(self) -> bool:
        """Whether the scores lie below the counterpart's: what a gain needs is no remedy."""
        own = [pair.mean_over(self.keys) for pair in self.row.pairs]
        return math.fsum(points for points in own if not math.isnan(points)) < 0  # a seed may lack these scores


def inquire(
    evidence: Evidence,
    found: Sequence[Row],
    scores: Sequence[ScoreRow],
    failing: Sequence[tuple[Row, Sequence[ScoreKey]]],
    settings: Settings,
) -> list[Inquiry]:
    """What the study's other recipes say of its failures. What is tested is tested of every recipe (see `parts`).

    Args:
        found: all rows against the paper's counterpart. scores: their single scores. failing: rows among them, and
            the scores that are to be explained.
    """
    if not failing:
        return []
    both = {id(row): parts for row in found if (parts := halves(evidence, row))}
    sets = beside(found)
    families = jointly([*(part for one in both.values() for part in (one.peft, one.form)), *(s.part for s in sets)])
    origins = _origins(found)
    outcomes = {(id(one.row), (one.task, one.shots)): one.comparison.outcome(settings.alpha) for one in scores}
    inquiries = []
    for row, keys in failing:
        shares = both[id(row)].shares(keys, families, settings.margin) if id(row) in both else None
        changed = _to_change(row.recipe, shares)
        layers = [_layers(one, keys, families, settings) for one in sets if one.row is row]
        best = remedies.nearest(row, found, changed, keys, outcomes, settings)
        own = tuple(one for one in layers if one)
        inquiries.append(Inquiry(row, tuple(keys), shares, own, origins.get(id(row)), changed, best))
    return inquiries


def _to_change(recipe: Recipe, shares: Shares | None) -> str:
    """The choice that a remedy has to change: the one with the larger part."""
    if recipe.precision == "fp32":
        return "peft"
    if recipe.peft == "none" or (shares and abs(shares.form.estimate.mean) > abs(shares.peft.estimate.mean)):
        return "precision"
    return "peft"


def _origins(found: Sequence[Row]) -> dict[int, Origins]:
    """Where rounding enters, by the identity of a row; p by Holm over all recipes in half precision."""
    seen = {
        id(row): ((row.same_as or row.recipe).key, own)
        for row in found
        if row.recipe.precision != "fp32" and (own := origins_of(row.recipe.runs))
    }
    adjusted = holm_by_name({name: name[1].p for name in seen.values()})
    return {place: replace(own, p=adjusted[name, own]) for place, (name, own) in seen.items()}


def blame(one: Inquiry, settings: Settings) -> str:
    """Peft or number format, and which layers or block of it, as sentences that follow the difference."""
    recipe = one.row.recipe
    if recipe.precision == "fp32":
        return f" All of it is the peft's: {recipe.peft}{_modules(recipe)}.{_which_layers(one, settings)}"
    if recipe.peft == "none":
        return f" All of it is the number format's: every weight trains in both.{_block(one, settings)}"
    if one.shares is None:
        return " Peft or format, the records cannot tell: full precision with the same peft is missing."
    parts = one.shares
    text = (
        f" Of it {_part(parts.peft, settings)} is the peft's ({recipe.peft}{_modules(recipe)}) and "
        f"{_part(parts.form, settings)} the format's ({recipe.precision}): {parts.middle:.3f} in full precision with "
        "the same peft."
    )
    text += _which_layers(one, settings) if is_shown(parts.peft, settings) else ""
    return text + (_block(one, settings) if is_shown(parts.form, settings) else "")


def blame_beside(one: Inquiry, settings: Settings) -> str:
    """What the number format did, of a recipe whose peft is blamed already in another format."""
    recipe = one.row.recipe
    if recipe.peft == "none":
        return f" In {recipe.precision} likewise.{_block(one, settings)}"
    if one.shares is None:
        return f" In {recipe.precision}, full precision with the same peft is missing."
    block = _block(one, settings) if is_shown(one.shares.form, settings) else ""
    return f" In {recipe.precision}, {_part(one.shares.form, settings)} of it is the format's.{block}"


def remedy(one: Inquiry, several: bool = False) -> str:
    """Of the study's recipes that change only the choice to blame, the one that lies nearest the counterpart.

    Args:
        several: whether the format has to be named, as others are told of beside it.
    """
    return remedies.said(one.remedy, one.changed, f" in {one.row.recipe.precision}" * several)


def is_shown(found: Comparison, settings: Settings) -> bool:
    """Whether it is shown not to be 0; NaN, of one seed, shows nothing."""
    return found.p_different <= settings.alpha


def _part(found: Comparison, settings: Settings) -> str:
    """A part of a difference, and whether it is one at all."""
    nothing = "" if is_shown(found, settings) else ", which may be nothing"
    return f"{signed(found.estimate.mean)} ({interval(found.estimate)}{nothing})"


def _modules(recipe: Recipe) -> str:
    """The layers that the peft adapts, as the runs' records have them."""
    return f" on {', '.join(sorted(recipe.adapted))}" if recipe.adapted else ""


# --- which layers ----------------------------------------------------------------------------------------------------


def _layers(one: Beside, keys: Sequence[ScoreKey], families: Families, settings: Settings) -> Layers | None:
    """What adapting those layers, or leaving them alone, did; None where no seed of the two has all the scores."""
    if not one.part.over(keys):
        return None
    seeds = {seed for seed, own in one.part.points.items() if all(key in own for key in keys)}
    score, other_score = (
        mean_scores_of([pair for pair in side.pairs if pair.seed in seeds], keys)[0] for side in (one.row, one.other)
    )
    apart = families.comparison(one.part, keys, settings.margin)
    return Layers(one.other.recipe, one.more, apart, (other_score, score))


def _which_layers(one: Inquiry, settings: Settings) -> str:
    """What the study's other target sets, in the same format, say of the layers in which they differ."""
    if not one.layers:
        return " Which of these layers, the records cannot tell: no other peft.targets were tried beside them."
    told = "; ".join(_told(one.row.recipe, layers, settings) for layers in one.layers)
    return f" {told}; its other layers were not varied."


def choice_of(recipe: Recipe, found: Layers) -> str:
    """What the recipe does with the layers in which the other target set differs."""
    layers = joined(sorted(found.more))
    return f"leaving {layers} alone" if recipe.adapted < found.other.adapted else f"adapting {layers}"


def _told(recipe: Recipe, found: Layers, settings: Settings) -> str:
    it = "it" if len(found.more) == 1 else "them"
    wider, doing = recipe.adapted < found.other.adapted, choice_of(recipe, found)
    how = f"adapts {it} too" if wider else f"leaves {it} alone"
    apart = found.apart.estimate
    numbers = (
        f"{found.other.peft}, which {how}, lies {signed(apart.mean)} points from it ({interval(apart)}; "
        f"{raw(*found.scores)})"
    )
    if not is_shown(found.apart, settings):
        return f"Whether {doing} is to blame, the seeds do not tell: {numbers}"
    blamed = "is to blame for part of it" if apart.mean > 0 else "is not to blame"
    return f"{doing[0].upper()}{doing[1:]} {blamed}: {numbers}"


# --- which block -----------------------------------------------------------------------------------------------------


def _block(one: Inquiry, settings: Settings) -> str:
    """The residual block in which most of the format's deviation arises, by the shadow probe of the runs."""
    found = one.origins
    if found is None:
        return " In which block, the records cannot tell: no shadow probe ran (probe=shadow)."
    where = f"{found.block}, in {found.seen} of {found.runs} runs"
    if found.overflowed:
        return f" The shadow probe saw {one.row.recipe.precision} leave its range in {where}."
    if not found.shown(settings.alpha):
        return f" In which block, the shadow probe does not tell: on average the deviation grows most in {where}."
    return (
        f" The shadow probe saw the format's deviation from float32 grow most in {where}: by {found.added:.1e} of "
        f"{found.largest:.1e} (relative, of the hidden states); that is where rounding enters, which does not prove "
        "that the score is lost there."
    )
