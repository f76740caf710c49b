"""Single scores that lie outside the margin and what is to blame, one sentence for all formats of a recipe."""

from collections.abc import Mapping, Sequence

from lyapft.verdict.blame import Inquiry, blame, blame_beside, remedy
from lyapft.verdict.evidence import PAPER, ScoreKey, Settings
from lyapft.verdict.recipes import Row, ScoreRow
from lyapft.verdict.words import AGAINST, MOST_LISTED, difference, joined, margin, raw, scored

Outside = tuple[Row, list[ScoreRow]]  # a recipe and its scores that lie outside


def outside(scores: Sequence[ScoreRow], settings: Settings) -> list[Outside]:
    """Every recipe that has such scores, against either counterpart; one that repeats another is left out."""
    by_row: dict[int, Outside] = {}
    for score in scores:
        if score.row.same_as is None and score.comparison.outcome(settings.alpha) in ("worse", "better"):
            by_row.setdefault(id(score.row), (score.row, []))[1].append(score)
    return list(by_row.values())


def unexplained(row: Row, settings: Settings) -> bool:
    """Whether its single scores are to be explained: against the paper, where the recipe as a whole is no failure."""
    return row.counterpart == PAPER and row.outcome(settings) not in ("worse", "better")


def keys_of(own: Sequence[ScoreRow]) -> list[ScoreKey]:
    """Task and shots of each."""
    return [(score.task, score.shots) for score in own]


def single_scores(found: Sequence[Outside], asked: Mapping[int, Inquiry], settings: Settings) -> list[str]:
    """A sentence for recipes that differ in the number format only.

    Args:
        asked: what the study says of a recipe's scores, by the identity of its row; absent where that is said already.
    """
    alike: dict[tuple[str, ...], list[Outside]] = {}
    for row, own in found:
        place = (*row.recipe.setting, row.counterpart, _but_format(row))
        alike.setdefault(place, []).append((row, own))
    return [
        _sentence(group, [asked[id(row)] for row, _ in group if id(row) in asked], settings) for group in alike.values()
    ]


def _but_format(row: Row) -> str:
    return row.recipe.label.removeprefix(f"{row.recipe.precision} · ")


def _sentence(group: Sequence[Outside], asked: Sequence[Inquiry], settings: Settings) -> str:
    row = group[0][0]
    several = len(group) > 1
    formats = joined([one.recipe.precision for one, _ in group])
    name = f"{row.recipe.model} · {_but_format(row)} in {formats}" if several else row.recipe.name
    against = f" from {AGAINST[row.counterpart]}" if row.counterpart != PAPER else ""
    ordered = sorted((s for _, own in group for s in own), key=lambda s: -abs(s.comparison.estimate.mean))
    worst: dict[ScoreKey, ScoreRow] = {}  # of each score the format in which it lies furthest off
    for score in ordered:
        worst.setdefault((score.task, score.shots), score)
    shown = list(worst.values())[:MOST_LISTED]
    listed = "; ".join(_score(score, several) for score in shown)
    more = f" and {len(ordered) - len(shown)} more" if len(ordered) > len(shown) else ""
    return f"{name}: single scores outside {margin(settings)}{against}: {listed}{more}.{_why(asked, several, settings)}"


def _score(found: ScoreRow, several: bool) -> str:
    label = " (beyond the trained length)" if found.beyond_trained_length else ""
    form = f" in {found.row.recipe.precision}" if several else ""
    return (
        f"{scored((found.task, found.shots))}{label}{form} {difference(found.comparison)}, "
        f"{raw(found.score, found.counterpart_score)}"
    )


def _why(asked: Sequence[Inquiry], several: bool, settings: Settings) -> str:
    """The blame and the remedy of one format, full precision where it is among them; of the others what differs."""
    if not asked:
        return ""
    first = min(asked, key=lambda one: one.row.recipe.precision != "fp32")
    text = blame(first, settings).lstrip()
    said = f" In {first.row.recipe.precision}: {text[0].lower()}{text[1:]}" if several else f" {text}"
    beside = "".join(blame_beside(one, settings) for one in asked if one is not first)
    return said + beside + (remedy(first) if first.loses else "")
