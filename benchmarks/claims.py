"""Every claim that the verdict can make of a study whose truth is known, and whether it is false."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks.null_studies import FULL, Recipe, Truth
from lyapft.report.regression import changes
from lyapft.verdict import Settings
from lyapft.verdict.ablations import ablations
from lyapft.verdict.architectures import contrasts
from lyapft.verdict.blame import Inquiry
from lyapft.verdict.evidence import PAPER, PRECISION_ONLY, Evidence
from lyapft.verdict.evidence import Recipe as Judged
from lyapft.verdict.failures import failures
from lyapft.verdict.learning import learned
from lyapft.verdict.margins import margins
from lyapft.verdict.recipes import Row, ScoreRow, rows, score_rows
from lyapft.verdict.recommendation import recommend

Claim = tuple[bool, bool]  # whether it is made, and whether it would be false


@dataclass(frozen=True)
class Page:
    """What the verdict finds in a study, as far as a claim asks for it."""

    evidence: Evidence
    before: Evidence | None  # the same study, run before
    truth: Truth
    settings: Settings = field(default_factory=Settings)

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Against both counterparts."""
        return {kind: rows(self.evidence, self.settings, kind) for kind in (PAPER, PRECISION_ONLY)}

    @cached_property
    def scores(self) -> dict[str, list[ScoreRow]]:
        """Single scores against both."""
        return {kind: score_rows(found, self.settings) for kind, found in self.rows.items()}

    @cached_property
    def inquiries(self) -> list[Inquiry]:
        """Of every failure, whole recipes and single scores."""
        found = failures(self.evidence, self.rows[PAPER], self.scores[PAPER], self.settings)
        single = [one.inquiry for group in found.single for one in group if one.inquiry]
        return [*found.whole, *single]

    def true_points(self, row: Row) -> float:
        """True difference of a row from its counterpart."""
        own = drawn(row.recipe)
        full = FULL if row.counterpart == PAPER else own._replace(precision="fp32")
        return self.truth.part(own, full)

    def outside(self, points: float) -> bool:
        """Whether a true difference lies on the margin or outside it; on it, inside and outside are both false."""
        return abs(points) >= self.settings.margin

    def inside(self, points: float) -> bool:
        """Whether it lies on the margin or inside it."""
        return abs(points) <= self.settings.margin


def drawn(recipe: Judged) -> Recipe:
    """What a recipe of the verdict was drawn as."""
    config = recipe.runs[0]["config"]
    return Recipe(recipe.precision, recipe.peft, config["peft"]["memory_buffer"], config["trainer"]["steps"])


# --- claims ----------------------------------------------------------------------------------------------------------


def equivalent(kind: str) -> Callable[[Page], Iterator[Claim]]:
    """A recipe is equivalent to its counterpart."""

    def claims(page: Page) -> Iterator[Claim]:
        for row in page.rows[kind]:
            yield row.outcome(page.settings) == "equivalent", page.outside(page.true_points(row))

    return claims


def beyond(kind: str) -> Callable[[Page], Iterator[Claim]]:
    """A recipe is better or worse than its counterpart by more than the margin."""

    def claims(page: Page) -> Iterator[Claim]:
        for row in page.rows[kind]:
            yield row.outcome(page.settings) in ("better", "worse"), page.inside(page.true_points(row))

    return claims


def single_scores(page: Page) -> Iterator[Claim]:
    """A single score lies outside the margin from either counterpart: one section says both."""
    for one in (*page.scores[PAPER], *(s for s in page.scores[PRECISION_ONLY] if s.row.recipe.peft != "none")):
        yield one.comparison.outcome() in ("better", "worse"), page.inside(page.true_points(one.row))


def steadier(page: Page) -> Iterator[Claim]:
    """One of two models is steadier; here all diverge alike."""
    for one in contrasts(page.evidence, [*page.rows[PAPER], *page.rows[PRECISION_ONLY]], page.settings):
        if one.overall:
            yield one.steadier(page.settings) is not None, True


def cheaper(page: Page) -> Iterator[Claim]:
    """The recommended recipe costs less than its counterpart."""
    for one in recommend(page.rows[PAPER], page.settings):
        saves = any(row.cost.saves(page.settings.alpha) for row in one.better)
        yield one.chosen is not None or saves, page.truth.ln_cost >= 0


def cheapest(page: Page) -> Iterator[Claim]:
    """An equivalent recipe costs more than the recommended one; here all cost the same."""
    for one in recommend(page.rows[PAPER], page.settings):
        if one.chosen:
            sound = [
                row for row in page.rows[PAPER] if row.recipe.setting == one.setting and _sound(row, page.settings)
            ]
            yield len(one.tied) < len(sound) - 1, True


def _sound(row: Row, settings: Settings) -> bool:
    return row.outcome(settings) == "equivalent" and row.same_as is None


def blame_format(page: Page) -> Iterator[Claim]:
    """A part of a failure is the number format's, beside a peft's."""
    for one in page.inquiries:
        if one.shares:
            own = drawn(one.row.recipe)
            shown = one.shares.form.p_different <= page.settings.alpha
            yield shown, page.truth.part(own, own._replace(precision="fp32")) == 0


def blame_peft(page: Page) -> Iterator[Claim]:
    """A part of a failure is the peft's, beside a number format's."""
    for one in page.inquiries:
        if one.shares:
            own = drawn(one.row.recipe)
            full = own._replace(peft="none", precision="fp32")
            yield (
                one.shares.peft.p_different <= page.settings.alpha,
                page.truth.part(own._replace(precision="fp32"), full) == 0,
            )


def blame_layers(page: Page) -> Iterator[Claim]:
    """Adapting some layers, or leaving them alone, is to blame."""
    for one in page.inquiries:
        for layers in one.layers:
            apart = page.truth.part(drawn(layers.other), drawn(one.row.recipe))
            yield layers.apart.p_different <= page.settings.alpha, apart == 0


def blame_block(page: Page) -> Iterator[Claim]:
    """The format's rounding enters in one block more than in another; here it enters in all alike."""
    for one in page.inquiries:
        if one.origins:
            yield one.origins.shown(page.settings.alpha), True


def remedy(page: Page) -> Iterator[Claim]:
    """Another choice brings what fails inside the margin."""
    for one in page.inquiries:
        if one.remedy:
            apart = page.truth.part(drawn(one.remedy.recipe), FULL)
            yield one.remedy.outcome == "equivalent", page.outside(apart)


def tuned(page: Page) -> Iterator[Claim]:
    """A tuned model learns more or less in context than its base; here it scores as the base does."""
    for one in learned(page.evidence):
        yield one.more(page.settings) is not None, True


def asked(single: bool) -> Callable[[Page], Iterator[Claim]]:
    """A setting changes the scores, all of them together or single ones."""

    def claims(page: Page) -> Iterator[Claim]:
        for one in ablations(page.evidence, page.settings):
            if (one.key is not None) == single:
                yield one.comparison.p_different <= page.settings.alpha, _apart(page, one.name) == 0

    return claims


def asked_equivalent(page: Page) -> Iterator[Claim]:
    """Two values of a setting are equivalent."""
    for one in ablations(page.evidence, page.settings):
        if one.key is None:
            yield one.comparison.p_equivalent <= page.settings.alpha, page.outside(_apart(page, one.name))


def _apart(page: Page, name: str) -> float:
    assert name == "peft.memory_buffer"
    untied = Recipe("bf16", "lora")
    return page.truth.part(untied._replace(memory_buffer="tied"), untied)


def margin_differs(page: Page) -> Iterator[Claim]:
    """The stability margin of a recipe is not that of full precision; here all are alike."""
    for one in margins(page.evidence, page.rows[PAPER]):
        if one.comparison:
            yield one.comparison.p_different <= page.settings.alpha, True


def worse_than_before(page: Page) -> Iterator[Claim]:
    """`compare`: a number got better or worse; here nothing was changed."""
    assert page.before is not None
    pairs = list(zip(page.before.recipes, page.evidence.recipes, strict=True))
    for one in changes(pairs, ["score", "margin", "tokens_per_s"]):
        yield one.outcome in ("better", "worse"), True
