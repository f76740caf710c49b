"""A cell's answers beside those of its counterparts, counted when both are on disk: a report need not read them again.

Of a study of many cells the item tables are by far the most bytes; what is compared of them are six numbers.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from lyapft import records
from lyapft.divergence import answer_shift, item_flips

log = logging.getLogger(__name__)


def counted(entries: list[dict[str, Any]], folder: Path, counterparts: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Divergence entries with `flips` and `answer_shift` against each counterpart whose items are there.

    Args:
        entries: as `divergence.against_counterparts` makes them.
        folder: of the cell, with its items. counterparts: folders by identity.
    """
    return [entry | _against(entry, folder, counterparts) for entry in entries]


def _against(entry: dict[str, Any], folder: Path, counterparts: Mapping[str, Path]) -> dict[str, Any]:
    theirs = counterparts.get(str(entry["reference_id"]))
    if entry["status"] != "ok" or theirs is None:
        return {}
    paths = folder / records.ITEMS, theirs / records.ITEMS
    if not all(path.exists() for path in paths):
        return {}
    try:
        tables = [pd.read_parquet(path) for path in paths]
        return {"flips": asdict(item_flips(*tables)), "answer_shift": asdict(answer_shift(*tables))}
    except ValueError as error:  # other items under the same scores: differences of scores are all there is
        log.warning("%s: answers are not compared with those of %s: %s", folder.name, theirs.name, error)
        return {}
