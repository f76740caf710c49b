"""Where a recipe fails: the part of the peft and that of the number format, and the remedy that the study tried.

Within each part the records are asked for more: which of the adapted layers, by the study's other target sets, and in
which block the format's rounding enters, by the shadow probe. Where they cannot tell, that is said.
"""

from collections import Counter
from collections.abc import Sequence

from lyapft.divergence import Estimate, estimate
from lyapft.verdict.evidence import Evidence, Recipe, ScoreKey, Settings, mean_scores_of
from lyapft.verdict.recipes import Row, shares
from lyapft.verdict.rounding import origin_of
from lyapft.verdict.words import beyond, difference, interval, joined, raw, signed

HOW = {
    "equivalent": "which brings it inside the margin",
    "undecided": "which leaves it undecided",
    "better": "which makes it better than the counterpart",
    "worse": "which does not bring it inside the margin",
}


def blame(evidence: Evidence, row: Row, found: Sequence[Row], keys: Sequence[ScoreKey], settings: Settings) -> str:
    """Peft or number format, and which layers or block of it, as sentences that follow the difference.

    Args:
        row: against the paper's counterpart. found: all such rows of its setting. keys: the scores that are explained.
    """
    recipe = row.recipe
    if recipe.precision == "fp32":
        return f" All of it is the peft's: {recipe.peft}{_modules(recipe)}.{_layers(row, found, keys, settings)}"
    if recipe.peft == "none":
        return f" All of it is the number format's: every weight trains in both.{_block(recipe)}"
    parts = shares(evidence, recipe, keys)
    if parts is None:
        return " Peft or format, the records cannot tell: full precision with the same peft is missing."
    text = (
        f" Of it {_part(parts.peft)} is the peft's ({recipe.peft}{_modules(recipe)}) and {_part(parts.form)} the "
        f"format's ({recipe.precision}): {parts.middle:.3f} in full precision with the same peft."
    )
    text += _layers(row, found, keys, settings) if _shown(parts.peft) else ""
    return text + (_block(recipe) if _shown(parts.form) else "")


def _shown(found: Estimate) -> bool:
    """Whether the interval leaves 0 out; one seed has none and shows nothing."""
    return found.low > 0 or found.high < 0


def _part(found: Estimate) -> str:
    """A part of a difference, and whether it is one at all."""
    return f"{signed(found.mean)} ({interval(found)}{'' if _shown(found) else ', which may be nothing'})"


def _modules(recipe: Recipe) -> str:
    """The layers that the peft adapts, as the runs' records have them."""
    return f" on {', '.join(sorted(recipe.adapted))}" if recipe.adapted else ""


# --- which layers ----------------------------------------------------------------------------------------------------


def _layers(row: Row, found: Sequence[Row], keys: Sequence[ScoreKey], settings: Settings) -> str:
    """What the study's other target sets, in the same format, say of the layers in which they differ."""
    others = [(other, more) for other in found if (more := _more_layers(row.recipe, other.recipe))]
    confidence = 1 - settings.alpha / max(1, len(others))
    told = [text for other, more in others if (text := _told(row, other, more, keys, confidence))]
    if not told:
        return " Which of these layers, the records cannot tell: no other peft.targets were tried beside them."
    return f" {'; '.join(told)}; its other layers were not varied."


def _more_layers(recipe: Recipe, other: Recipe) -> frozenset[str]:
    """The layers by which one of two recipes that adapt layers exceeds the other; empty where neither contains it."""
    ours, theirs = recipe.adapted, other.adapted
    comparable = recipe.precision == other.precision and ours and theirs and (ours < theirs or theirs < ours)
    return ours ^ theirs if comparable else frozenset()


def _told(row: Row, other: Row, more: frozenset[str], keys: Sequence[ScoreKey], confidence: float) -> str:
    """Whether adapting those layers, or leaving them alone, lost something; from the seeds that both have."""
    ours, theirs = ({pair.seed: pair for pair in one.pairs} for one in (row, other))
    seeds = [s for s in ours if s in theirs and all(key in p.signed for key in keys for p in (ours[s], theirs[s]))]
    if not seeds:
        return ""
    gain = [theirs[seed].mean_over(keys) - ours[seed].mean_over(keys) for seed in seeds]
    tested = estimate(gain, confidence=confidence)
    (score, _), (other_score, _) = (mean_scores_of([side[seed] for seed in seeds], keys) for side in (theirs, ours))
    layers, it = joined(sorted(more)), "it" if len(more) == 1 else "them"
    wider = row.recipe.adapted < other.recipe.adapted
    doing = f"leaving {layers} alone" if wider else f"adapting {layers}"
    how = f"adapts {it} too" if wider else f"leaves {it} alone"
    beside = (
        f"{other.recipe.peft}, which {how}, lies {signed(estimate(gain).mean)} points from it "
        f"({interval(estimate(gain))}; {raw(score, other_score)})"
    )
    if tested.low > 0:
        return f"{doing[0].upper()}{doing[1:]} is to blame for part of it: {beside}"
    if tested.high < 0:
        return f"{doing[0].upper()}{doing[1:]} is not to blame: {beside}"
    return f"Whether {doing} is to blame, the seeds do not tell: {beside}"


# --- which block -----------------------------------------------------------------------------------------------------


def _block(recipe: Recipe) -> str:
    """The residual block in which most of the format's deviation arises, by the shadow probe of the runs."""
    found = [one for run in recipe.runs if (one := origin_of(run))]
    if not found:
        return " In which block, the records cannot tell: no shadow probe ran (probe=shadow)."
    block, count = Counter(one.block for one in found).most_common(1)[0]
    if 2 * count <= len(found) and len(found) > 1:
        return f" In which block, the {len(found)} runs with a shadow probe do not agree."
    own = [one for one in found if one.block == block]
    if any(one.overflowed for one in own):
        return f" The shadow probe saw {recipe.precision} leave its range in {block}, in {count} of {len(found)} runs."
    new, last = (sum(values) / len(own) for values in ([o.added for o in own], [o.largest for o in own]))
    return (
        f" The shadow probe saw most of the format's deviation from float32 arise in {block}, in {count} of "
        f"{len(found)} runs: {new:.1e} of {last:.1e} (relative, of the hidden states); that is where rounding enters, "
        "which does not prove that the score is lost there."
    )


# --- remedies --------------------------------------------------------------------------------------------------------


def remedy(evidence: Evidence, row: Row, found: Sequence[Row], settings: Settings) -> str:
    """Of the study's recipes that change only the choice to blame, the one that lies nearest the counterpart."""
    parts = shares(evidence, row.recipe, row.keys)
    formats = row.recipe.precision != "fp32" and (
        row.recipe.peft == "none" or (parts is not None and abs(parts.form.mean) > abs(parts.peft.mean))
    )
    kept, changed = ("peft", "precision") if formats else ("precision", "peft")
    tried = [
        other
        for other in found
        if other is not row
        and getattr(other.recipe, kept) == getattr(row.recipe, kept)
        and getattr(other.recipe, changed) != getattr(row.recipe, changed)
        and not _repeats(row, other)
    ]
    if not tried:
        return f" No remedy was tried: add another {changed}=… to the study."
    best = min(tried, key=lambda other: abs(other.comparison.estimate.mean))
    return (
        f" Remedy tried: {changed}={getattr(best.recipe, changed)} instead, {difference(best.comparison)}, "
        f"score {raw(best.score, best.counterpart_score)}{beyond(len(best.beyond), len(best.keys))}, "
        f"{HOW[best.outcome(settings)]}."
    )


def _repeats(row: Row, other: Row) -> bool:
    """Whether the two are one recipe under two names."""
    firsts = [(one.same_as or one.recipe).key for one in (row, other)]
    return firsts[0] == firsts[1]
