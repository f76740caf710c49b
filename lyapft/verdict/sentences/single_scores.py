"""Single scores that lie outside the margin and what is to blame, one sentence for all formats of a recipe."""

from collections.abc import Sequence

from lyapft.verdict.blame import blame, blame_beside, remedy
from lyapft.verdict.evidence import PAPER, Settings
from lyapft.verdict.failures import Outside, explained, furthest
from lyapft.verdict.recipes import ScoreRow
from lyapft.verdict.words import AGAINST, MOST_LISTED, difference, joined, margin, raw, scored


def single_scores(group: Sequence[Outside], settings: Settings) -> str:
    """A sentence for recipes that differ in the number format only."""
    row = group[0].row
    several = len(group) > 1
    formats = joined([one.row.recipe.precision for one in group])
    name = f"{row.recipe.model} · {row.recipe.but_format} in {formats}" if several else row.recipe.name
    against = f" from {AGAINST[row.counterpart]}" if row.counterpart != PAPER else ""
    shown = furthest(group)[:MOST_LISTED]
    listed = "; ".join(_score(score, several) for score in shown)
    left = sum(len(one.scores) for one in group) - len(shown)
    more = f" and {left} more" if left else ""
    return f"{name}: single scores outside {margin(settings)}{against}: {listed}{more}.{_why(group, several, settings)}"


def _score(found: ScoreRow, several: bool) -> str:
    label = " (beyond the trained length)" if found.beyond_trained_length else ""
    form = f" in {found.row.recipe.precision}" if several else ""
    return (
        f"{scored((found.task, found.shots))}{label}{form} {difference(found.comparison)}, "
        f"{raw(found.score, found.counterpart_score)}"
    )


def _why(group: Sequence[Outside], several: bool, settings: Settings) -> str:
    """The blame of one format, full precision where it is among them, of the others what differs; each one's remedy."""
    first = explained(group)
    if first is None:
        return ""
    text = blame(first, settings).lstrip()
    said = f" In {first.row.recipe.precision}: {text[0].lower()}{text[1:]}" if several else f" {text}"
    others = [one.inquiry for one in group if one.inquiry and one.inquiry is not first]
    beside = "".join(blame_beside(one, settings) for one in others)
    return said + beside + "".join(remedy(one, several) for one in (first, *others) if one.loses)
