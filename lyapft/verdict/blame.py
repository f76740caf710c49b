"""Where a recipe fails: the part of the peft and that of the number format, and the remedy that the study tried.

Within each part the records are asked for more: which of the adapted layers, by the study's other target sets, and in
which block the format's rounding enters, by the shadow probe. Where they cannot tell, that is said. What is tested for
all failures of a page together shares one error rate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lyapft.divergence import Comparison, adjusted, compare
from lyapft.verdict.evidence import Evidence, Recipe, ScoreKey, Settings
from lyapft.verdict.pairing import mean_scores_of, resolution_over
from lyapft.verdict.recipes import Row, Shares, shares
from lyapft.verdict.rounding import Origin, agreed, origin_of
from lyapft.verdict.words import beyond, difference, interval, joined, raw, signed

HOW = {
    "equivalent": "which brings it inside the margin",
    "undecided": "which leaves it undecided",
    "better": "which makes it better than the counterpart",
    "worse": "which does not bring it inside the margin",
}


@dataclass(frozen=True)
class Layers:
    """Another target set in the same format: its difference to the failing one, on the seeds that both have."""

    other: Recipe
    more: frozenset[str]  # the layers in which the two differ
    apart: Comparison
    scores: tuple[float, float]  # of the other one and of the failing one, fractions


@dataclass(frozen=True)
class Remedy:
    """The recipe with another choice to blame that lies nearest the counterpart, on the scores that fail."""

    changed: str  # peft or precision
    recipe: Recipe
    comparison: Comparison
    scores: tuple[float, float]
    beyond: int  # of the scores, beyond the trained length
    of: int


@dataclass(frozen=True)
class Inquiry:
    """One failure against the paper's counterpart, with all that the study's other recipes say of it.

    `keys` are the scores that fail; where they are all of the recipe's, its remedy has been tested in the table.
    """

    row: Row
    keys: tuple[ScoreKey, ...]
    shares: Shares | None
    layers: tuple[Layers, ...]
    changed: str  # the choice that a remedy has to change
    remedy: Remedy | None

    @property
    def whole(self) -> bool:
        """Whether the recipe fails as a whole, not on single scores."""
        return set(self.keys) == set(self.row.keys)

    @property
    def loses(self) -> bool:
        """Whether the scores lie below the counterpart's: what a gain needs is no remedy."""
        return sum(pair.mean_over(self.keys) for pair in self.row.pairs) < 0

    def tests(self) -> Iterator[Comparison]:
        """What is tested here for the first time."""
        if self.shares:
            yield from (self.shares.peft, self.shares.form)
        yield from (one.apart for one in self.layers)
        if self.remedy and not self.whole:
            yield self.remedy.comparison

    def tested(self, found: Iterator[Comparison]) -> "Inquiry":
        """The same with other results, in the order of `tests`."""
        parts = self.shares and replace(self.shares, peft=next(found), form=next(found))
        layers = tuple(replace(one, apart=next(found)) for one in self.layers)
        remedy = self.remedy
        if remedy and not self.whole:
            remedy = replace(remedy, comparison=next(found))
        return replace(self, shares=parts, layers=layers, remedy=remedy)


def inquire(
    evidence: Evidence, row: Row, found: Sequence[Row], keys: Sequence[ScoreKey], settings: Settings
) -> Inquiry:
    """What the study's other recipes say of a failure.

    Args:
        row: against the paper's counterpart. found: all such rows of its setting. keys: the scores that are explained.
    """
    recipe = row.recipe
    parts = None
    if recipe.precision != "fp32" and recipe.peft != "none":
        parts = shares(evidence, recipe, keys, settings.margin)
    tried = [_layers(row, other, more, keys, settings) for other in found if (more := _more(recipe, other.recipe))]
    formats = recipe.precision != "fp32" and (
        recipe.peft == "none" or (parts is not None and abs(parts.form.estimate.mean) > abs(parts.peft.estimate.mean))
    )
    changed = "precision" if formats else "peft"
    layers = tuple(one for one in tried if one)
    return Inquiry(row, tuple(keys), parts, layers, changed, _remedy(row, found, changed, keys, settings))


def jointly(found: Sequence[Inquiry]) -> list[Inquiry]:
    """The inquiries of a page with every p adjusted by Holm over all of them; what is one test counts once.

    Two target sets are asked about each other twice, and the part of a peft is the same in every format.
    """
    tests = [(one.row.recipe.setting, test) for one in found for test in one.tests()]
    names = [(where, round(abs(t.estimate.mean), 9), round(t.sd, 9), t.estimate.n) for where, t in tests]
    results = iter(adjusted([test for _, test in tests], names))
    return [one.tested(results) for one in found]


def blame(one: Inquiry, settings: Settings) -> str:
    """Peft or number format, and which layers or block of it, as sentences that follow the difference."""
    recipe = one.row.recipe
    if recipe.precision == "fp32":
        return f" All of it is the peft's: {recipe.peft}{_modules(recipe)}.{_which_layers(one, settings)}"
    if recipe.peft == "none":
        return f" All of it is the number format's: every weight trains in both.{_block(recipe)}"
    if one.shares is None:
        return " Peft or format, the records cannot tell: full precision with the same peft is missing."
    parts = one.shares
    text = (
        f" Of it {_part(parts.peft, settings)} is the peft's ({recipe.peft}{_modules(recipe)}) and "
        f"{_part(parts.form, settings)} the format's ({recipe.precision}): {parts.middle:.3f} in full precision with "
        "the same peft."
    )
    text += _which_layers(one, settings) if is_shown(parts.peft, settings) else ""
    return text + (_block(recipe) if is_shown(parts.form, settings) else "")


def blame_beside(one: Inquiry, settings: Settings) -> str:
    """What the number format did, of a recipe whose peft is blamed already in another format."""
    recipe = one.row.recipe
    if recipe.peft == "none":
        return f" In {recipe.precision} likewise.{_block(recipe)}"
    if one.shares is None:
        return f" In {recipe.precision}, full precision with the same peft is missing."
    block = _block(recipe) if is_shown(one.shares.form, settings) else ""
    return f" In {recipe.precision}, {_part(one.shares.form, settings)} of it is the format's.{block}"


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


def _more(recipe: Recipe, other: Recipe) -> frozenset[str]:
    """The layers by which one of two recipes that adapt layers exceeds the other; empty where neither contains it."""
    ours, theirs = recipe.adapted, other.adapted
    comparable = recipe.precision == other.precision and ours and theirs and (ours < theirs or theirs < ours)
    return ours ^ theirs if comparable else frozenset()


def _layers(row: Row, other: Row, more: frozenset[str], keys: Sequence[ScoreKey], settings: Settings) -> Layers | None:
    """What adapting those layers, or leaving them alone, did; None where no seed of the two has all the scores."""
    ours, theirs = ({pair.seed: pair for pair in one.pairs} for one in (row, other))
    seeds = [s for s in ours if s in theirs and all(key in p.signed for key in keys for p in (ours[s], theirs[s]))]
    if not seeds:
        return None
    gain = [theirs[seed].mean_over(keys) - ours[seed].mean_over(keys) for seed in seeds]
    grain = resolution_over([side[seed] for side in (ours, theirs) for seed in seeds], keys)
    (score, _), (other_score, _) = (mean_scores_of([side[seed] for seed in seeds], keys) for side in (theirs, ours))
    return Layers(other.recipe, more, compare(gain, settings.margin, grain), (score, other_score))


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
    beside = (
        f"{found.other.peft}, which {how}, lies {signed(apart.mean)} points from it ({interval(apart)}; "
        f"{raw(*found.scores)})"
    )
    if not is_shown(found.apart, settings):
        return f"Whether {doing} is to blame, the seeds do not tell: {beside}"
    blamed = "is to blame for part of it" if apart.mean > 0 else "is not to blame"
    return f"{doing[0].upper()}{doing[1:]} {blamed}: {beside}"


# --- which block -----------------------------------------------------------------------------------------------------


def origins(recipe: Recipe) -> list[Origin]:
    """Where the rounding entered, in each run that a shadow probe watched."""
    return [one for run in recipe.runs if (one := origin_of(run))]


def _block(recipe: Recipe) -> str:
    """The residual block in which most of the format's deviation arises, by the shadow probe of the runs."""
    found = origins(recipe)
    if not found:
        return " In which block, the records cannot tell: no shadow probe ran (probe=shadow)."
    block = agreed(found)
    if block is None:
        return f" In which block, the {len(found)} runs with a shadow probe do not agree."
    own = [one for one in found if one.block == block]
    if any(one.overflowed for one in own):
        where = f"{block}, in {len(own)} of {len(found)} runs"
        return f" The shadow probe saw {recipe.precision} leave its range in {where}."
    new, last = (sum(values) / len(own) for values in ([o.added for o in own], [o.largest for o in own]))
    return (
        f" The shadow probe saw most of the format's deviation from float32 arise in {block}, in {len(own)} of "
        f"{len(found)} runs: {new:.1e} of {last:.1e} (relative, of the hidden states); that is where rounding enters, "
        "which does not prove that the score is lost there."
    )


# --- remedies --------------------------------------------------------------------------------------------------------


def remedy(one: Inquiry, settings: Settings) -> str:
    """Of the study's recipes that change only the choice to blame, the one that lies nearest the counterpart."""
    best = one.remedy
    if best is None:
        return f" No remedy was tried: add another {one.changed}=… to the study."
    return (
        f" Remedy tried: {best.changed}={getattr(best.recipe, best.changed)} instead, {difference(best.comparison)}, "
        f"score {raw(*best.scores)}{beyond(best.beyond, best.of)}, {HOW[best.comparison.outcome(settings.alpha)]}."
    )


def _remedy(
    row: Row, found: Sequence[Row], changed: str, keys: Sequence[ScoreKey], settings: Settings
) -> Remedy | None:
    kept = {"peft": "precision", "precision": "peft"}[changed]
    tried = [
        made
        for other in found
        if other is not row
        and getattr(other.recipe, kept) == getattr(row.recipe, kept)
        and getattr(other.recipe, changed) != getattr(row.recipe, changed)
        and not _repeats(row, other)
        and (made := _tried(other, changed, keys, settings))
    ]
    return min(tried, key=lambda one: abs(one.comparison.estimate.mean), default=None)


def _tried(other: Row, changed: str, keys: Sequence[ScoreKey], settings: Settings) -> Remedy | None:
    """Another recipe on the scores that fail; on all of its scores, as its table has it."""
    if set(keys) >= set(other.keys):
        scores = (other.score, other.counterpart_score)
        return Remedy(changed, other.recipe, other.comparison, scores, len(other.beyond), len(other.keys))
    own = [pair for pair in other.pairs if all(key in pair.signed for key in keys)]
    if not own:
        return None
    apart = compare([pair.mean_over(keys) for pair in own], settings.margin, resolution_over(own, keys))
    labelled = len(set(keys) & set(other.beyond))
    return Remedy(changed, other.recipe, apart, mean_scores_of(own, keys), labelled, len(keys))


def _repeats(row: Row, other: Row) -> bool:
    """Whether the two are one recipe under two names."""
    firsts = [(one.same_as or one.recipe).key for one in (row, other)]
    return firsts[0] == firsts[1]
