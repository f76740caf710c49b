"""The verdict on a study, from its records alone: which recipe to use, where it fails, is Mamba steadier.

Pure: records and item tables in, sentences and tables out. Never stronger than the evidence: what the seeds do not
decide is called undecided, with the number of seeds that would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lyapft.records import Record
from lyapft.verdict import sentences, tables
from lyapft.verdict.duplicates import first_of_its_kind
from lyapft.verdict.evidence import Settings, gather
from lyapft.verdict.findings import Findings, find
from lyapft.verdict.gaps import Outstanding
from lyapft.verdict.page import one_page
from lyapft.verdict.recipes import Row, ScoreRow
from lyapft.verdict.recommendation import Recommendation
from lyapft.verdict.words import Section

__all__ = ["Outstanding", "Recommendation", "Row", "ScoreRow", "Section", "Settings", "Verdict", "judge"]


@dataclass(frozen=True)
class Verdict(Findings):
    """What a study allows to say: as structures, on one page, in every detail, and as tables by name."""

    page: tuple[Section, ...]
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
    found = find(gather(records, items), settings or Settings(), outstanding)
    return Verdict(**vars(found), page=one_page(found), sections=_sections(found), tables=_tables(found))


def _sections(found: Findings) -> tuple[Section, ...]:
    """Every sentence, under its heading; headings without a sentence are left out."""
    settings = found.settings
    texts = {
        "Recommendation": sentences.recommendations(found.recommendations, settings, found.references_only),
        "Base against tuned": sentences.base_and_tuned(found.learned, settings),
        "Settings asked about": sentences.settings_asked(found.ablations, settings),
        "Where it fails": sentences.failures(found.failures, found.rows, found.recipes, found.spikes, settings),
        "Mamba against Transformer": [
            *sentences.architectures(found.contrasts, found.recurrent, found.floors, settings),
            *sentences.learning(found.gains),
        ],
        "Noise": sentences.noise(found.floors, found.recipes),
        "What is missing": sentences.missing(found.gaps),
        "One recipe under two names": sentences.repeated(first_of_its_kind(found.recipes), found.recipes),
        "At chance": sentences.guessing(found.at_chance),
        "Beyond the trained length": sentences.beyond_training(found.scores),
    }
    return tuple(Section(title, tuple(lines)) for title, lines in texts.items() if lines)


def _tables(found: Findings) -> dict[str, pd.DataFrame]:
    """The numbers behind the sentences; tables without a row are left out."""
    settings, floors = found.settings, found.floors
    made = {
        "recipes": tables.recipe_table(found.rows, floors, settings),
        "formats": tables.recipe_table(found.format_rows, floors, settings),
        "scores": tables.score_table(found.scores, settings),
        "format_scores": tables.score_table(found.format_scores, settings),
        "spikes": tables.spike_table(found.spikes),
        "architectures": tables.contrast_table(found.contrasts),
        "learning": tables.gain_table(found.gains),
        "base_and_tuned": tables.learned_table(found.learned),
        "settings": tables.ablation_table(found.ablations, settings),
        "floors": tables.floor_table(floors),
        "stability": tables.margin_table(found.margins),
        "missing": tables.gap_table(found.gaps),
    }
    return {name: table for name, table in made.items() if len(table)}
