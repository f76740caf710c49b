"""Two studies of the same recipes, before and after a change: did a number get worse beyond its noise?

`python -m lyapft.report compare OLD NEW --fail-on=score,tokens_per_s`
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lyapft import records
from lyapft.errors import InputError
from lyapft.report.regression.changes import Change, Floor, changes, table
from lyapft.report.regression.matching import Matching, broken, lost, machines, matching
from lyapft.report.regression.quantities import QUANTITIES
from lyapft.report.tables import as_text
from lyapft.verdict.evidence import gather
from lyapft.verdict.words import EMULATED, EMULATED_MEANS

__all__ = ["QUANTITIES", "Change", "Floor", "Matching", "changes", "main", "matching"]

WORSE = 1  # exit code; of undecided changes too, where they are to fail


def main(arguments: Sequence[str]) -> int:
    """Compare two studies.

    Returns 0 when nothing got worse; 1 when a chosen number did (or, with --fail-on-undecided, may have), a run now
    fails, or the new study lacks what the old one has or did it with other settings; 2 for bad input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lyapft.report compare",
        description="Did a number get worse beyond its noise? Paired over the seeds that both studies have; the spread "
        "over seeds counts as no smaller than that of the studies' own reruns (study.noise_floor), and a mean change "
        "must exceed t(0.975, n) times what n reruns moved. With one seed nothing is called worse. What the new study "
        "lacks, or ran with other settings, is named, and counts as worse unless one of the options below allows it.",
    )
    parser.add_argument("old", type=Path, help="folder of the study before the change")
    parser.add_argument("new", type=Path, help="folder of the study after it")
    parser.add_argument(
        "--fail-on", default="score", help=f"numbers, with commas between, of {', '.join(QUANTITIES)} (default: score)"
    )
    parser.add_argument(
        "--fail-on-undecided",
        action="store_true",
        help="a chosen number that changed, in either direction, without being shown better or worse fails as well: "
        "with one seed every change is such a one",
    )
    parser.add_argument("--allow-missing", action="store_true", help="let the new study have fewer recipes or seeds")
    parser.add_argument(
        "--allow-changed",
        default="",
        metavar="SETTINGS",
        help="settings or groups that were changed on purpose, with commas between, such as kernel,trainer.batch_size: "
        "recipes that differ in nothing else are compared",
    )
    options = parser.parse_args(arguments)
    try:
        quantities, may_change = _chosen(options.fail_on), _listed(options.allow_changed)
        return _report(options, quantities, may_change)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _chosen(text: str) -> list[str]:
    names = _listed(text)
    unknown = [name for name in names if name not in QUANTITIES]
    if unknown or not names:
        raise InputError(f"--fail-on={text}: choose from {', '.join(QUANTITIES)}")
    return names


def _report(options: argparse.Namespace, quantities: Sequence[str], may_change: Sequence[str]) -> int:
    old, new = options.old, options.new
    before, after = (gather([record for _, record in records.load_study(folder)]) for folder in (old, new))
    pairs = matching(before, after, may_change)
    found = changes(pairs.same, quantities)
    failed, missing = broken(pairs.same), lost(pairs)
    if not (found or failed or pairs.different):
        raise InputError(
            f"{old} and {new} share no recipe with a common seed and {' or '.join(quantities)}: nothing to compare"
        )
    if found:
        shown = as_text(table(found), width=180)
        print(f"{shown}\n{EMULATED_MEANS}" if EMULATED in shown else shown)
    worse, undecided = (sum(change.outcome == name for change in found) for name in ("worse", "undecided"))
    print(f"{worse} of {len(found)} numbers got worse, {undecided} undecided.")
    _list("✗", failed)
    _list("✗", pairs.different)
    _list("·" if options.allow_missing else "✗", missing)
    _list("· compared although changed:", pairs.changed)
    _list("· not the same on both sides:", machines(before, after))
    for line in _unsure(found):
        print(line)
    refused = worse or failed or pairs.different
    refused = refused or (missing and not options.allow_missing) or (undecided and options.fail_on_undecided)
    return WORSE if refused else 0


def _list(mark: str, lines: Sequence[str]) -> None:
    for line in lines:
        print(f"{mark} {line}")


def _unsure(found: Sequence[Change]) -> list[str]:
    """What keeps changes from being told from noise."""
    lines = []
    if one_seed := sum(change.comparison.estimate.n == 1 and change.outcome != "same" for change in found):
        lines.append(f"{one_seed} changed on their only common seed: run more seeds to tell that from noise.")
    if without := sum(change.floor is None for change in found):
        lines.append(
            f"{without} numbers have no rerun beside them, so their noise is the seeds' alone: "
            "study.noise_floor=[replicate,threads] makes some."
        )
    return lines
