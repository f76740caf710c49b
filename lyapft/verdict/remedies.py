"""What the study tried instead of a recipe that fails: another peft, or another number format."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lyapft.divergence import Comparison, Outcome, compare
from lyapft.verdict.evidence import Recipe, ScoreKey, Settings
from lyapft.verdict.pairing import mean_scores_of, resolution_over
from lyapft.verdict.recipes import Row
from lyapft.verdict.words import beyond, difference, raw

# what another choice brings with it: another peft its own learning rate, another format its emulation
GOES_WITH = {"precision": ("precision.", "runs_as."), "peft": ("peft.", "trainer.learning_rate")}
HOW = {
    "equivalent": "which brings it inside the margin",
    "undecided": "which leaves it undecided",
    "better": "which makes it better than the counterpart",
    "worse": "which does not bring it inside the margin",
}
RANKS = ("equivalent", "better", "undecided", "worse")
Outcomes = Mapping[tuple[int, ScoreKey], Outcome]  # of single scores, by the identity of their row


@dataclass(frozen=True)
class Remedy:
    """The recipe with another choice to blame that lies nearest the counterpart, on the scores that fail.

    `outcome` is what the tables say of these scores: as a whole where they are all of its own, else of each.
    """

    changed: str  # peft or precision
    recipe: Recipe
    comparison: Comparison
    outcome: Outcome
    scores: tuple[float, float]
    beyond: int  # of the scores, beyond the trained length
    of: int


def said(best: Remedy | None, changed: str, where: str = "") -> str:
    """A remedy as a sentence, or which one the study lacks.

    Args:
        where: ` in FORMAT` of the failing recipe, where several are told of.
    """
    if best is None:
        return f" No remedy was tried{where}: add another {changed}=… to the study."
    instead = f"{best.changed}={getattr(best.recipe, best.changed)} instead"
    return (
        f" Remedy tried{where}: {instead}, {difference(best.comparison)}, score {raw(*best.scores)}"
        f"{beyond(best.beyond, best.of)}, {HOW[best.outcome]}."
    )


def rank(found: Remedy | None) -> tuple[int, float]:
    """What orders remedies, from one that helps to none that was tried."""
    if found is None:
        return len(RANKS), 0.0
    return RANKS.index(found.outcome), abs(found.comparison.estimate.mean)


def nearest(
    row: Row,
    found: Sequence[Row],
    changed: str,
    keys: Collection[ScoreKey],
    outcomes: Outcomes,
    settings: Settings,
) -> Remedy | None:
    """The recipe that changes only that choice and lies nearest the counterpart on these scores, if the study has any.

    Args:
        row: what fails. found: all rows against the same kind of counterpart. outcomes: of their single scores.
    """
    kept = {"peft": "precision", "precision": "peft"}[changed]
    tried = [
        made
        for other in found
        if other is not row
        and other.recipe.setting == row.recipe.setting
        and getattr(other.recipe, kept) == getattr(row.recipe, kept)
        and getattr(other.recipe, changed) != getattr(row.recipe, changed)
        and not _repeats(row, other)
        and other.recipe.differs_only_in(row.recipe, *GOES_WITH[changed])
        and (made := _tried(other, changed, keys, outcomes, settings))
    ]
    return min(tried, key=lambda one: abs(one.comparison.estimate.mean), default=None)


def _tried(
    other: Row, changed: str, keys: Collection[ScoreKey], outcomes: Outcomes, settings: Settings
) -> Remedy | None:
    """Another recipe on the scores that fail; on all of its scores, as its table has it."""
    if set(keys) >= set(other.keys):
        scores, outcome = (other.score, other.counterpart_score), other.outcome(settings)
        return Remedy(changed, other.recipe, other.comparison, outcome, scores, len(other.beyond), len(other.keys))
    own = [pair for pair in other.pairs if all(key in pair.signed for key in keys)]
    if not own:
        return None
    apart = compare([pair.mean_over(keys) for pair in own], settings.margin, resolution_over(own, keys))
    outcome = _of_each([outcomes[id(other), key] for key in keys])
    labelled = len(set(keys) & set(other.beyond))
    return Remedy(changed, other.recipe, apart, outcome, mean_scores_of(own, keys), labelled, len(keys))


def _of_each(found: Collection[Outcome]) -> Outcome:
    """What single scores say together: equivalent where every one is, outside where any is."""
    if set(found) == {"equivalent"}:
        return "equivalent"
    if "worse" in found:
        return "worse"
    return "better" if "better" in found else "undecided"


def _repeats(row: Row, other: Row) -> bool:
    """Whether the two are one recipe under two names."""
    firsts = [(one.same_as or one.recipe).key for one in (row, other)]
    return firsts[0] == firsts[1]
