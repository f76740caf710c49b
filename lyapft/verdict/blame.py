"""Where a recipe fails: the part of the peft and that of the number format, and the remedy that the study tried."""

from collections.abc import Sequence

from lyapft.divergence import Estimate
from lyapft.verdict.evidence import Evidence, Recipe, Settings
from lyapft.verdict.recipes import Row, shares
from lyapft.verdict.words import difference, interval, signed

HOW = {
    "equivalent": "which brings it inside the margin",
    "undecided": "which leaves it undecided",
    "better": "which makes it better than the counterpart",
    "worse": "which does not bring it inside the margin",
}


def blame(evidence: Evidence, recipe: Recipe) -> str:
    """Peft or number format: the two parts add up to the whole; the peft's modules are named."""
    parts = shares(evidence, recipe)
    if parts is None or recipe.precision == "fp32":
        return f" All of it is the peft's: {recipe.peft}{_modules(recipe)}." if recipe.precision == "fp32" else ""
    peft, form = parts
    if recipe.peft == "none":
        return " All of it is the number format's: every weight trains in both."
    return (
        f" Of it {_part(peft)} is the peft's ({recipe.peft}{_modules(recipe)}) and {_part(form)} the format's "
        f"({recipe.precision})."
    )


def _part(found: Estimate) -> str:
    """A part of a difference, and whether it is one at all."""
    none = ", which may be nothing" if not (found.low > 0 or found.high < 0) else ""
    return f"{signed(found.mean)} ({interval(found)}{none})"


def remedy(evidence: Evidence, row: Row, found: Sequence[Row], settings: Settings) -> str:
    """Of the study's recipes that change only the choice to blame, the one that lies nearest the counterpart."""
    parts = shares(evidence, row.recipe)
    formats = row.recipe.precision != "fp32" and (
        row.recipe.peft == "none" or (parts is not None and abs(parts[1].mean) > abs(parts[0].mean))
    )
    others = [other for other in found if other is not row and other.recipe.setting == row.recipe.setting]
    kept, changed = ("peft", "precision") if formats else ("precision", "peft")
    tried = [other for other in others if getattr(other.recipe, kept) == getattr(row.recipe, kept)]
    tried = [other for other in tried if getattr(other.recipe, changed) != getattr(row.recipe, changed)]
    if not tried:
        return f" No remedy was tried: add another {changed}=… to the study."
    best = min(tried, key=lambda other: abs(other.comparison.estimate.mean))
    return (
        f" Remedy tried: {changed}={getattr(best.recipe, changed)} instead, {difference(best.comparison)}, "
        f"score {best.score:.3f} against {best.counterpart_score:.3f}, {HOW[best.outcome(settings)]}."
    )


def _modules(recipe: Recipe) -> str:
    """The layers that the peft adapts, as the runs' records have them."""
    adapted = {
        name
        for run in recipe.runs
        for name, counts in ((run.get("peft") or {}).get("coverage") or {}).items()
        if counts.get("adapted")
    }
    return f" on {', '.join(sorted(adapted))}" if adapted else ""
