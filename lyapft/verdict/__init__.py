"""The verdict on a study, from its records alone: which recipe to use, where it fails, is Mamba steadier.

Pure: records and item tables in, sentences and tables out. Never stronger than the evidence: what the seeds do not
decide is called undecided, with the number of seeds that would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lyapft.records import Record
from lyapft.verdict import sentences, tables
from lyapft.verdict.architectures import Contrast, Gain, contrasts, gains, twins
from lyapft.verdict.evidence import PAPER, PRECISION_ONLY, Evidence, Settings, gather
from lyapft.verdict.floors import Floor, floors
from lyapft.verdict.gaps import Gap, Outstanding, gaps
from lyapft.verdict.recipes import Row, ScoreRow, rows, score_rows
from lyapft.verdict.recommendation import Recommendation, recommend

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
    contrasts: tuple[Contrast, ...]
    gains: tuple[Gain, ...]
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
    scores = score_rows(paper, settings)
    advice = recommend(paper, settings)
    apart = contrasts(evidence, [*paper, *same_peft], settings)
    gained, floor, gap = gains(evidence), floors(evidence), gaps(evidence, outstanding)
    texts = {
        "Recommendation": sentences.recommendations(advice, settings),
        "Where it fails": sentences.failures(evidence, paper, scores, settings),
        "Mamba against Transformer": [
            *sentences.architectures(apart, list(twins(evidence)) or _recurrent(evidence), floor, settings),
            *sentences.learning(gained),
        ],
        "Noise": sentences.noise(floor, settings),
        "What is missing": sentences.missing(gap),
        "Beyond the trained length": sentences.beyond_training(scores),
    }
    return Verdict(
        evidence.study,
        settings,
        tuple(advice),
        tuple(paper),
        tuple(scores),
        tuple(apart),
        tuple(gained),
        tuple(floor),
        tuple(gap),
        tuple(Section(title, tuple(lines)) for title, lines in texts.items() if lines),
        _named_tables(paper, same_peft, scores, apart, gained, floor, gap, settings),
    )


def _named_tables(
    paper: Sequence[Row],
    same_peft: Sequence[Row],
    scores: Sequence[ScoreRow],
    apart: Sequence[Contrast],
    gained: Sequence[Gain],
    floor: Sequence[Floor],
    gap: Sequence[Gap],
    settings: Settings,
) -> dict[str, pd.DataFrame]:
    made = {
        "recipes": tables.recipe_table(paper, floor, settings),
        "formats": tables.recipe_table(same_peft, floor, settings),
        "scores": tables.score_table(scores, settings),
        "architectures": tables.contrast_table(apart),
        "learning": tables.gain_table(gained),
        "floors": tables.floor_table(floor),
        "missing": tables.gap_table(gap),
    }
    return {name: table for name, table in made.items() if len(table)}


def _recurrent(evidence: Evidence) -> list[str]:
    return list(dict.fromkeys(r.model for r in evidence.recipes if any(run.get("kernels") for run in r.runs)))
