"""The verdict's files: numbers survive the way to disk, text cannot break a table."""

import re
from pathlib import Path

import pandas as pd
import pytest

from lyapft import report
from lyapft.report import exports, verdict_tables
from lyapft.report.__main__ import main
from lyapft.report.tables import Column
from lyapft.report.verdict_tables import SPECS, text_columns
from lyapft.verdict import Verdict, judge
from tests import synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("runs") / "both"
    records = synthetic.matrix(("mamba_tiny", "llama_tiny"), seeds=3)
    records[5] |= {"status": "nonfinite", "error": {"type": "NonFinite", "message": "loss is nan | <b>&"}}
    records.append(synthetic.record("mamba_tiny", "bf16", "lora", 0, replicate=1))
    synthetic.study(home, records)
    return home


@pytest.fixture(scope="module")
def verdict(folder: Path) -> Verdict:
    report.write(folder)
    found = report.load_study(folder)
    return judge([c.record for c in found.cells], {c.record["id"]: c.items for c in found.cells if c.items is not None})


def test_every_table_is_written_in_every_format_with_its_numbers(folder: Path, verdict: Verdict) -> None:
    assert set(verdict.tables) == set(SPECS) - {"base_and_tuned", "settings"}  # of studies that ask for them
    for name, table in verdict.tables.items():
        home = folder / exports.TABLES / name
        pd.testing.assert_frame_equal(pd.read_parquet(home.with_suffix(".parquet")), table, check_dtype=False)
        read = pd.read_csv(home.with_suffix(".csv"))
        assert list(read.columns) == list(table.columns)
        for column in table.select_dtypes("number"):
            assert read[column].tolist() == pytest.approx(table[column].astype(float).tolist(), nan_ok=True)


def test_markdown_holds_every_sentence_and_every_row(folder: Path, verdict: Verdict) -> None:
    text = (folder / exports.MARKDOWN).read_text(encoding="utf-8")
    for section in verdict.sections:
        assert f"## {section.title}\n" in text
        assert all(f"- {exports._escaped(line)}" in text for line in section.lines)
    tables = [block for block in re.split(r"\n\n", text) if block.startswith("|")]
    assert [len(block.splitlines()) - 2 for block in tables] == [len(table) for table in verdict.tables.values()]
    for block in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "loss is nan \\| &lt;b>&amp;" in text


def test_latex_rows_have_as_many_columns_as_their_table(folder: Path, verdict: Verdict) -> None:
    for name, table in verdict.tables.items():
        text = (folder / exports.TABLES / f"{name}.tex").read_text(encoding="utf-8")
        width = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])  # type: ignore[index]
        rows = [line for line in text.splitlines() if line.endswith(r" \\")]
        assert len(rows) == len(table) + 1
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {width - 1}
        assert width == len(text_columns(verdict, name))
        assert text.isascii()


def test_text_cannot_leave_its_latex_cell() -> None:
    columns = [Column("", "a_b", ["50% & {x} \\ $y^2 #~"], numeric=False)]
    text = exports.as_latex(columns, "c_d", "e")
    assert r"50\% \& \{x\} \textbackslash{} \$y\textasciicircum{}2 \#\textasciitilde{} \\" in text
    assert r"\caption{c\_d}" in text


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.004, "+.2f", "0.00"),
        (-0.004, "+.2f", "0.00"),
        (-0.5, "+.2f", "−0.50"),
        (0.0, ".3f", "0.000"),
        (None, "d", "–"),
    ],
)
def test_zero_has_no_sign(value: float | None, form: str, text: str) -> None:
    assert verdict_tables._form(value, form) == text


def test_the_page_begins_with_the_verdict(folder: Path, verdict: Verdict) -> None:
    page = (folder / report.DEFAULT_NAME).read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:3] == ["Verdict", "Findings", "Cells"]
    sections = re.findall(r"<h3>(.*?)</h3>", page)
    assert sections == [section.title for section in verdict.sections]
    assert "loss is nan | &lt;b&gt;&amp;" in page


def test_margin_and_weights_are_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main([str(folder), "--output", str(page), "--margin", "40", "--memory-weight", "0"]) == 0
    assert "within ±40 points" in (tmp_path / exports.MARKDOWN).read_text(encoding="utf-8")
    table = pd.read_csv(tmp_path / exports.TABLES / "recipes.csv")
    assert table.cost.tolist() == pytest.approx((1 / table.speed_ratio).tolist())
    assert main([str(folder), "--margin", "0"]) == 2
    assert "margin > 0" in capsys.readouterr().err
