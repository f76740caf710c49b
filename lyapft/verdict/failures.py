"""What lies outside the margin: whole recipes and single scores, each with what the study says of the cause."""

from collections.abc import Sequence
from dataclasses import dataclass

from lyapft.verdict.blame import Inquiry, inquire
from lyapft.verdict.evidence import PAPER, Evidence, ScoreKey, Settings
from lyapft.verdict.recipes import Row, ScoreRow, once
from lyapft.verdict.remedies import rank

OUTSIDE = ("worse", "better")


@dataclass(frozen=True)
class Outside:
    """The single scores of one recipe that lie outside the margin, against one kind of counterpart.

    `inquiry` is None where the cause is told already: of the recipe as a whole, or against the paper's counterpart.
    """

    row: Row
    scores: tuple[ScoreRow, ...]
    inquiry: Inquiry | None

    @property
    def keys(self) -> list[ScoreKey]:
        """Task and shots of each."""
        return [(score.task, score.shots) for score in self.scores]


@dataclass(frozen=True)
class Failures:
    """Recipes outside the margin, and groups of recipes that differ in the number format only with their scores."""

    whole: tuple[Inquiry, ...] = ()
    single: tuple[tuple[Outside, ...], ...] = ()


def failures(evidence: Evidence, found: Sequence[Row], scores: Sequence[ScoreRow], settings: Settings) -> Failures:
    """All of a study; a recipe that repeats another under its own name, and came out alike, is left out.

    Args:
        found: rows against the paper's counterpart. scores: single scores, against both kinds.
    """
    whole = once(row for row in found if row.outcome(settings) in OUTSIDE)
    single = _outside(scores, settings)
    explained = [(row, row.keys) for row in whole]
    explained += [(one.row, one.keys) for one in single if _unexplained(one.row, settings)]
    asked = inquire(evidence, found, scores, explained, settings)
    inquiries = {id(one.row): one for one in asked[len(whole) :]}
    return Failures(
        tuple(asked[: len(whole)]),
        _grouped([Outside(one.row, one.scores, inquiries.get(id(one.row))) for one in single]),
    )


def _outside(scores: Sequence[ScoreRow], settings: Settings) -> list[Outside]:
    by_row: dict[int, list[ScoreRow]] = {}
    told = {id(row) for row in once({id(score.row): score.row for score in scores}.values())}
    for score in scores:
        if id(score.row) in told and score.comparison.outcome(settings.alpha) in OUTSIDE:
            by_row.setdefault(id(score.row), []).append(score)
    return [Outside(own[0].row, tuple(own), None) for own in by_row.values()]


def _unexplained(row: Row, settings: Settings) -> bool:
    """Whether its single scores are to be explained: against the paper, where the recipe as a whole is no failure."""
    return row.counterpart == PAPER and row.outcome(settings) not in OUTSIDE


def _grouped(found: Sequence[Outside]) -> tuple[tuple[Outside, ...], ...]:
    alike: dict[tuple[str, ...], list[Outside]] = {}
    for one in found:
        place = (*one.row.recipe.setting, one.row.counterpart, one.row.recipe.but_format)
        alike.setdefault(place, []).append(one)
    return tuple(map(tuple, alike.values()))


def furthest(group: Sequence[Outside]) -> list[ScoreRow]:
    """Of each score of a group the format in which it lies furthest off, furthest first."""
    worst: dict[ScoreKey, ScoreRow] = {}
    for score in sorted((s for one in group for s in one.scores), key=lambda s: -abs(s.comparison.estimate.mean)):
        worst.setdefault((score.task, score.shots), score)
    return list(worst.values())


def remedied(group: Sequence[Outside]) -> Inquiry | None:
    """The inquiry whose remedy does most, over the formats of a group; one without a remedy where none was tried."""
    losing = [one.inquiry for one in group if one.inquiry and one.inquiry.loses]
    return min(losing, key=lambda one: rank(one.remedy), default=None)


def explained(group: Sequence[Outside]) -> Inquiry | None:
    """The inquiry that stands for a group: that in full precision, where it is among them."""
    asked = [one.inquiry for one in group if one.inquiry]
    return min(asked, key=lambda one: one.row.recipe.precision != "fp32", default=None)
