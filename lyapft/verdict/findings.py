"""All that the records of a study show, as structures: what sentences, page and tables are written from."""

from collections.abc import Sequence
from dataclasses import dataclass

from lyapft.verdict.ablations import Ablation, ablations
from lyapft.verdict.architectures import Contrast, contrasts, twins
from lyapft.verdict.chance import AtChance, at_chance
from lyapft.verdict.evidence import PAPER, PRECISION_ONLY, Evidence, Recipe, Settings, is_own_counterpart
from lyapft.verdict.failures import Failures, failures
from lyapft.verdict.floors import Floor, floors
from lyapft.verdict.gaps import Gap, Outstanding, gaps
from lyapft.verdict.learning import Gain, Learned, gains, learned
from lyapft.verdict.margins import Margins, margins
from lyapft.verdict.recipes import Row, ScoreRow, rows, score_rows
from lyapft.verdict.recommendation import Recommendation, recommend
from lyapft.verdict.spikes import Spikes, spikes


@dataclass(frozen=True)
class Findings:
    """Every judgement of a verdict, made once; where nothing is said, against the paper's counterpart."""

    study: str
    settings: Settings
    recipes: tuple[Recipe, ...]
    recommendations: tuple[Recommendation, ...]
    rows: tuple[Row, ...]
    format_rows: tuple[Row, ...]  # against full precision with the same peft
    scores: tuple[ScoreRow, ...]
    format_scores: tuple[ScoreRow, ...]  # against full precision with the same peft
    failures: Failures
    spikes: tuple[Spikes, ...]
    contrasts: tuple[Contrast, ...]
    recurrent: tuple[str, ...]  # models that are looked for a Transformer beside
    gains: tuple[Gain, ...]
    learned: tuple[Learned, ...]
    ablations: tuple[Ablation, ...]
    floors: tuple[Floor, ...]
    margins: tuple[Margins, ...]
    gaps: tuple[Gap, ...]
    at_chance: tuple[AtChance, ...]

    @property
    def references_only(self) -> bool:
        """Whether there are runs, and all of them are what others would be compared with."""
        return bool(self.recipes) and all(map(is_own_counterpart, self.recipes))


def find(evidence: Evidence, settings: Settings, outstanding: Sequence[Outstanding] = ()) -> Findings:
    """The findings of one study.

    Args:
        outstanding: runs that the study plans and has no record of.
    """
    paper, same_peft = (rows(evidence, settings, counterpart) for counterpart in (PAPER, PRECISION_ONLY))
    scores, format_scores = (score_rows(found, settings) for found in (paper, same_peft))
    single = [*scores, *(one for one in format_scores if one.row.recipe.peft != "none")]
    both, floor = [*paper, *same_peft], floors(evidence)
    return Findings(
        study=evidence.study,
        settings=settings,
        recipes=evidence.recipes,
        recommendations=tuple(recommend(paper, settings)),
        rows=tuple(paper),
        format_rows=tuple(same_peft),
        scores=tuple(scores),
        format_scores=tuple(format_scores),
        failures=failures(evidence, paper, single, settings),
        spikes=tuple(spikes(paper, floor, settings)),
        contrasts=tuple(contrasts(evidence, both, settings)),
        recurrent=tuple(twins(evidence)) or _recurrent(evidence),
        gains=tuple(gains(evidence)),
        learned=tuple(learned(evidence)),
        ablations=tuple(ablations(evidence, settings)),
        floors=tuple(floor),
        margins=tuple(margins(evidence, paper)),
        gaps=tuple(gaps(evidence, outstanding, both)),
        at_chance=tuple(at_chance(evidence, settings)),
    )


def _recurrent(evidence: Evidence) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.model for r in evidence.recipes if any(run.get("kernels") for run in r.runs)))
