"""A study too large to be shown cell by cell: what the page keeps, and that nothing is lost of the numbers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lyapft import records, report
from lyapft.divergence import rank_test
from lyapft.report import cells, exports, verdict_tables
from lyapft.report.compact import Reader
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


def test_a_report_needs_no_torch() -> None:
    """Its import takes as long as reading ten thousand records, and memory."""
    code = "import sys, lyapft.report.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def as_read(record: Any) -> Any:
    """A record without what a reader of many leaves out: all layers but the worst."""
    layers = (record.get("stability") or {}).get("layers")
    if layers:
        worst = min(layers, key=lambda layer: layer["margin"])
        record["stability"]["layers"] = [{key: worst[key] for key in ("layer", "margin")}]
    return record


def test_records_that_share_their_parts_say_the_same(tmp_path: Path) -> None:
    synthetic.study(tmp_path, synthetic.matrix(seeds=2), n_steps=5, n_items=8)
    reader = Reader()
    found = [record for _, record in records.load_study(tmp_path)]
    shared = [records.load(folder, reader.decode) for folder, _ in records.load_study(tmp_path)]
    assert shared == [as_read(record) for record in found]
    assert shared[0]["environment"] is shared[1]["environment"]
    assert shared[0]["config"]["trainer"] is shared[1]["config"]["trainer"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PARTS = ("id", "config", "scores", "divergence", "environment", "per_score", 'a\\": {', "")


@given(
    contents=st.lists(st.dictionaries(st.sampled_from(PARTS), json_values), min_size=1, max_size=3),
    indent=st.sampled_from([None, 0, 1, 2, 4]),
)
def test_any_json_is_read_as_the_decoder_reads_it(contents: list[dict[str, Any]], indent: int | None) -> None:
    reader = Reader()
    for content in contents * 2:  # the second time from what was kept
        text = json.dumps(content, indent=indent, ensure_ascii=False)
        assert reader.decode(text) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        '{\n  "a": {"x": 1,\n  "y": 2},\n  "z": 3\n}',  # an inner line as far to the left as an outer one
        '{\n  "scores": [\n    {"x": [1,\n    {"y": 2}]}\n  ],\n  "status": "ok"\n}',
        '{\n  "a": 1,\n  "a": 2\n}',
    ],
)
def test_json_that_only_looks_as_if_lyapft_had_written_it(text: str) -> None:
    assert Reader().decode(text) == json.loads(text)


@pytest.mark.parametrize(
    "text", ["", "{", '{\n  "a": 1,\n  "b": \n}', '{\n  "scores": [\n    {]\n}\n', '{\n  "a": "\n"\n}']
)
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        json.loads(text)
    with pytest.raises(ValueError):
        Reader().decode(text)


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
