"""A study too large to be shown cell by cell: what the page keeps, and that nothing is lost of the numbers."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lyapft import records, report
from lyapft.divergence import rank_test
from lyapft.report import cells, exports, verdict_tables
from lyapft.report.compact import Pool
from tests import synthetic


def test_a_large_study_shows_the_furthest_kinds_whole_and_judges_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = synthetic.study(tmp_path, synthetic.matrix(seeds=3), n_steps=10, n_items=20)
    whole = report.write(tmp_path).read_text(encoding="utf-8")
    monkeypatch.setattr(cells, "WHOLE_STUDY", 10)
    monkeypatch.setattr(cells, "EXCERPT", 6)
    study = cells.load_study(tmp_path)
    assert len(study.cells) == len(made) == 18
    assert len(study.shown) == 6
    furthest = {}
    for cell in study.cells:
        points = [e["mean_abs_points"] or 0 for e in cell.record["divergence"] if e["counterpart"] == "paper"]
        furthest[cell.kind] = max(furthest.get(cell.kind, 0), *points)
    assert {cell.kind for cell in study.shown} == set(sorted(furthest, key=furthest.__getitem__)[-2:])
    assert all(len(cell.steps) for cell in study.shown)
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "From here on 6 of 18 cells" in page
    assert "From here on" not in whole
    table = pd.read_parquet(tmp_path / exports.CELLS_FILE)
    assert set(table["id"]) == {record["id"] for record in made}


def test_records_that_share_their_parts_say_the_same(tmp_path: Path) -> None:
    synthetic.study(tmp_path, synthetic.matrix(seeds=2), n_steps=5, n_items=8)
    pool = Pool()
    found = [record for _, record in records.load_study(tmp_path)]
    shared = [pool.shared(records.load(folder)) for folder, _ in records.load_study(tmp_path)]
    for ours, theirs in zip(shared, found, strict=True):
        layers = theirs["stability"].pop("layers", [])
        assert ours["stability"].pop("layers", [])[:1] == [
            {key: min(layers, key=lambda layer: layer["margin"])[key] for key in ("layer", "margin")}
        ]
        assert ours == theirs
    assert shared[0]["environment"] is shared[1]["environment"]


def test_a_long_table_keeps_its_largest_differences_as_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.study(tmp_path, synthetic.matrix(seeds=3), n_steps=5, n_items=40)
    monkeypatch.setattr(verdict_tables, "MOST_ROWS", 2)
    report.write(tmp_path)
    text = (tmp_path / exports.MARKDOWN).read_text(encoding="utf-8")
    table = pd.read_parquet(tmp_path / "tables" / "scores.parquet")
    assert len(table) > 2
    assert f"2 of {len(table)} rows with the largest differences" in text


@pytest.mark.parametrize("n", [40, 80])
def test_the_rank_test_of_many_seeds_is_scipys_normal_one(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 1.0, n).round(1)
    values = values[values != 0]
    expected = stats.wilcoxon(values, method="asymptotic", correction=False).pvalue
    assert rank_test(values).p == pytest.approx(expected, rel=1e-9)
