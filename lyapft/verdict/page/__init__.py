"""The verdict on one page: what a reader needs to decide, in at most 570 words, each with its numbers.

Written from the findings, as every other sentence is. What does not fit is counted, and stands in the details.
"""

from lyapft.verdict.findings import Findings
from lyapft.verdict.page import advice, failing, models, trust
from lyapft.verdict.page.common import Common
from lyapft.verdict.page.layout import fitted
from lyapft.verdict.words import Section

AFTER = (failing.FAILS, models.MODELS, models.ASKED, trust.TRUST, trust.KEY)  # the recommendation


def one_page(found: Findings) -> tuple[Section, ...]:
    """The page, under a few headings; how many lines each has is a matter of room."""
    common = Common(found)
    topics = [
        advice.recommendations(common),
        trust.missing(common),
        trust.guessing(common),
        trust.beyond_training(common),
        trust.noise(common),
        trust.spikes(common),
        failing.whole_recipes(common),
        models.contrasts(common),
        failing.broken_down(common),
        failing.single_scores(common),
        models.base_and_tuned(common),
        models.settings_asked(common),
        models.in_context(common),
        trust.repeated(common),
    ]
    text = "\n".join(line for topic in topics for line in topic.lines)
    return fitted([*trust.key(common, text), *topics], (advice.title(common), *AFTER))
