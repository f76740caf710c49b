"""The verdict on a study, from its records alone: which recipe to use, where it fails, is Mamba steadier.

Pure: records and item tables in, sentences and tables out. Never stronger than the evidence: what the seeds do not
decide is called undecided, with the number of seeds that would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lyapft.records import Record
from lyapft.verdict import sentences, tables
from lyapft.verdict.ablations import Ablation, ablations
from lyapft.verdict.architectures import Contrast, contrasts, twins
from lyapft.verdict.duplicates import first_of_its_kind
from lyapft.verdict.evidence import PAPER, PRECISION_ONLY, Evidence, Settings, gather, is_own_counterpart
from lyapft.verdict.floors import Floor, floors
from lyapft.verdict.gaps import Gap, Outstanding, gaps
from lyapft.verdict.learning import Gain, Learned, gains, learned
from lyapft.verdict.margins import margins
from lyapft.verdict.recipes import Row, ScoreRow, rows, score_rows
from lyapft.verdict.recommendation import Recommendation, recommend
from lyapft.verdict.spikes import spikes

__all__ = ["Outstanding", "Recommendation", "Row", "ScoreRow", "Section", "Settings", "Verdict", "judge"]


@dataclass(frozen=True)
class Section:
    """A heading and its sentences."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What a study allows to say: as structures, as sentences, and as tables by name."""

    study: str
    settings: Settings
    recommendations: tuple[Recommendation, ...]
    rows: tuple[Row, ...]
    scores: tuple[ScoreRow, ...]
    format_scores: tuple[ScoreRow, ...]  # against full precision with the same peft
    contrasts: tuple[Contrast, ...]
    gains: tuple[Gain, ...]
    learned: tuple[Learned, ...]
    ablations: tuple[Ablation, ...]
    floors: tuple[Floor, ...]
    gaps: tuple[Gap, ...]
    sections: tuple[Section, ...]
    tables: Mapping[str, pd.DataFrame]


def judge(
    records: Sequence[Record],
    items: Mapping[str, pd.DataFrame] | None = None,
    settings: Settings | None = None,
    outstanding: Sequence[Outstanding] = (),
) -> Verdict:
    """The verdict on the records of one study, at any stage.

    Args:
        records: every record of the study, whatever its status.
        items: per-item answers by record id; flip rates and likelihood shifts need those of both sides.
        settings: margin, risk, power and cost weights.
        outstanding: runs that the study plans and has no record of.
    """
    settings = settings or Settings()
    evidence = gather(records, items)
    paper, same_peft = (rows(evidence, settings, counterpart) for counterpart in (PAPER, PRECISION_ONLY))
    scores, format_scores = (score_rows(found, settings) for found in (paper, same_peft))
    advice = recommend(paper, settings)
    apart, asked = contrasts(evidence, [*paper, *same_peft], settings), ablations(evidence, settings)
    gained, tuned, floor = gains(evidence), learned(evidence), floors(evidence)
    spiky, gap = spikes(paper, floor, settings), gaps(evidence, outstanding, [*paper, *same_peft])
    references_only = bool(evidence.recipes) and all(map(is_own_counterpart, evidence.recipes))
    texts = {
        "Recommendation": sentences.recommendations(advice, settings, references_only),
        "Base against tuned": sentences.base_and_tuned(tuned, settings),
        "Settings asked about": sentences.settings_asked(asked, settings),
        "Where it fails": sentences.failures(
            evidence,
            paper,
            [*scores, *(one for one in format_scores if one.row.recipe.peft != "none")],
            spiky,
            settings,
        ),
        "Mamba against Transformer": [
            *sentences.architectures(apart, list(twins(evidence)) or _recurrent(evidence), floor, settings),
            *sentences.learning(gained),
        ],
        "Noise": sentences.noise(floor),
        "What is missing": sentences.missing(gap),
        "One recipe under two names": sentences.repeated(first_of_its_kind(evidence.recipes), evidence.recipes),
        "Beyond the trained length": sentences.beyond_training(scores),
    }
    found = {
        "recipes": tables.recipe_table(paper, floor, settings),
        "formats": tables.recipe_table(same_peft, floor, settings),
        "scores": tables.score_table(scores, settings),
        "format_scores": tables.score_table(format_scores, settings),
        "spikes": tables.spike_table(spiky),
        "architectures": tables.contrast_table(apart),
        "learning": tables.gain_table(gained),
        "base_and_tuned": tables.learned_table(tuned),
        "settings": tables.ablation_table(asked, settings),
        "floors": tables.floor_table(floor),
        "stability": tables.margin_table(margins(evidence, paper)),
        "missing": tables.gap_table(gap),
    }
    return Verdict(
        study=evidence.study,
        settings=settings,
        recommendations=tuple(advice),
        rows=tuple(paper),
        scores=tuple(scores),
        format_scores=tuple(format_scores),
        contrasts=tuple(apart),
        gains=tuple(gained),
        learned=tuple(tuned),
        ablations=tuple(asked),
        floors=tuple(floor),
        gaps=tuple(gap),
        sections=tuple(Section(title, tuple(lines)) for title, lines in texts.items() if lines),
        tables={name: table for name, table in found.items() if len(table)},
    )


def _recurrent(evidence: Evidence) -> list[str]:
    return list(dict.fromkeys(r.model for r in evidence.recipes if any(run.get("kernels") for run in r.runs)))
