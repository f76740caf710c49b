"""The verdict's files: numbers survive the way to disk, text cannot break a table."""

import html
import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lyapft import report
from lyapft.records import TABLES
from lyapft.report import exports, latex, verdict_tables
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
    report.write(home)
    return home


@pytest.fixture(scope="module")
def verdict(folder: Path) -> Verdict:
    found = report.load_study(folder)
    return judge([c.record for c in found.cells], {c.record["id"]: c.items for c in found.cells if c.items is not None})


def test_every_table_is_written_in_every_format_with_its_numbers(folder: Path, verdict: Verdict) -> None:
    assert set(verdict.tables) == set(SPECS) - {"base_and_tuned", "settings"}  # of studies that ask for them
    for name, table in verdict.tables.items():
        home = folder / TABLES / name
        pd.testing.assert_frame_equal(pd.read_parquet(home.with_suffix(".parquet")), table, check_dtype=False)
        read = pd.read_csv(home.with_suffix(".csv"))
        assert list(read.columns) == list(table.columns)
        for column in table.select_dtypes("number"):
            assert read[column].tolist() == pytest.approx(table[column].astype(float).tolist(), nan_ok=True)


def test_costs_of_emulated_half_precision_are_marked_wherever_they_stand(verdict: Verdict) -> None:
    columns = {(c.group, c.title): c.cells for c in text_columns(verdict, "recipes")}
    emulated = verdict.tables["recipes"]["emulated"].tolist()
    assert set(emulated) == {True, False}
    for title in ("× tokens/s", "× both"):
        assert [cell.endswith("] (emulated)") for cell in columns["cost", title]] == emulated
    assert "(emulated): half precision ran in software" in verdict_tables.caption(verdict, "recipes")


def test_every_p_on_which_an_outcome_rests_stands_beside_it(verdict: Verdict) -> None:
    for name in ("recipes", "formats", "scores", "format_scores"):
        columns = {(c.group, c.title): c.cells for c in text_columns(verdict, name)}
        table, alpha = verdict.tables[name], verdict.settings.alpha
        for title, column in (("equivalent", "p_equivalent"), ("outside", "p_outside"), ("not 0", "p_different")):
            expected = ["–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}" for p in table[column]]
            assert columns["p, Holm", title] == expected
        outside = table.outcome.isin(["better", "worse"]).tolist()
        assert outside == ((table.p_outside <= alpha) & ~(table.p_equivalent <= alpha)).tolist()
    columns = {(c.group, c.title) for c in text_columns(verdict, "recipes")}
    assert {("cost", "p, Holm"), ("ranks, uncorrected", "p"), ("ranks, uncorrected", "least p")} <= columns
    assert "not those of ranks" in verdict_tables.caption(verdict, "recipes")


def test_markdown_holds_every_sentence_and_every_row(folder: Path, verdict: Verdict) -> None:
    text = (folder / exports.MARKDOWN).read_text(encoding="utf-8")
    page, detail = text.split(f"## {exports.DETAIL}\n")
    for part, mark, sections in ((page, "##", verdict.page), (detail, "###", verdict.sections)):
        for section in sections:
            assert f"\n{mark} {section.title}\n" in part
            assert all(f"- {exports._item(line)}" in part for line in section.lines)
    tables = [block for block in re.split(r"\n\n", text) if block.startswith("|")]
    assert [len(block.splitlines()) - 2 for block in tables] == [len(table) for table in verdict.tables.values()]
    for block in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "loss is nan \\| &lt;b>&amp;" in text


MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])  # with HTML, as viewers allow it
PIECES = (
    "![p](http://evil/p.png)",
    "[a]: http://evil",
    "[1](http://evil)",
    "[−0.3, +0.5]",
    "[1]: http://evil",
    "![2]",
    "(http://evil)",
    ":",
    "<img src=x>",
    "&lt;",
    "`",
    "\\",
    "|",
    "*",
    "_",
    "~~",
    "#",
    "-",
    "1.",
)
hostile = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=5), max_size=6
).map(lambda pieces: " ".join("".join(pieces).split()))


def seen(text: str) -> list[str]:
    """The texts that a viewer shows of Markdown, which may be nothing but plain text in lists and tables."""
    found = []
    for token in MARKDOWN.parse(text):
        assert token.tag in ("", "ul", "li", "p", "table", "thead", "tbody", "tr", "th", "td"), token
        assert token.type not in ("html_block", "fence", "code_block"), token
        if token.type == "inline":
            assert all(child.type in ("text", "text_special") for child in token.children or []), text
            found.append("".join(child.content for child in token.children or []))
    return found


@given(text=hostile.filter(bool))
def test_markdown_shows_any_text_of_a_list_as_it_is(text: str) -> None:
    assert seen(f"- {exports._item(text)}\n") == [text]


@given(texts=st.lists(hostile, min_size=4, max_size=4))
def test_markdown_shows_any_text_of_a_table_as_it_is(texts: list[str]) -> None:
    columns = [Column("", texts[0] or "a", [texts[1]], False), Column("", texts[2] or "b", [texts[3]], True)]
    assert seen(exports._markdown_table(columns)) == [texts[0] or "a", texts[2] or "b", texts[1], texts[3]]


def test_an_image_in_a_record_is_fetched_by_no_viewer(tmp_path: Path) -> None:
    records = synthetic.matrix(("mamba_tiny",), seeds=2)
    records[5] |= {"status": "nonfinite", "error": {"type": "NonFinite", "message": "row ![p](http://evil/p.png)"}}
    found = judge(records)
    exports.write(tmp_path, found)
    text = (tmp_path / exports.MARKDOWN).read_text(encoding="utf-8")
    kinds = {child.type for token in MARKDOWN.parse(text) for child in token.children or []}
    assert "evil/p.png" in text
    assert kinds <= {"text", "text_special"}


@pytest.mark.parametrize("begins", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_of_a_csv_is_a_formula(tmp_path: Path, verdict: Verdict, begins: str) -> None:
    text = f"{begins}cmd|' /C calc'!A0"
    table = verdict.tables["recipes"].assign(data=text)
    exports.write(tmp_path, replace(verdict, tables={"recipes": table}))
    csv = pd.read_csv(tmp_path / TABLES / "recipes.csv", lineterminator="\n")
    assert set(csv["data"]) == {f"'{text}"}
    numbers = table.select_dtypes("number").astype(float)
    assert (numbers < 0).any(axis=None)  # which are none
    pd.testing.assert_frame_equal(csv[list(numbers)].astype(float), numbers, check_exact=False)
    assert set(pd.read_parquet(tmp_path / TABLES / "recipes.parquet")["data"]) == {text}


# Widths of cmr10 in thousandths of an em (Knuth, Computer Modern Typefaces), by which TeX would set the tables.
CMR10 = dict(zip("abcdefghijklmnopqrstuvwxyz", (
    500, 556, 444, 556, 444, 306, 500, 556, 278, 306, 528, 278, 833, 556, 500, 556, 528, 392, 394, 389, 556, 528, 722,
    528, 528, 444,
), strict=True)) | dict.fromkeys("0123456789", 500) | dict(zip(".,:;()[]' /-%+=&_", (
    278, 278, 278, 278, 389, 389, 278, 278, 278, 333, 500, 333, 833, 778, 778, 778, 300,
), strict=True))  # fmt: skip
FOOTNOTESIZE = 8 * 1.062  # cmr8 is wider than cmr10 at its size
TEXT_WIDTH, GAP = 345, 6  # points


def points(cell: str) -> float:
    """Width of a LaTeX cell: mathematics and capitals as wide as the widest of them."""
    plain = re.sub(r"\$[^$]*\$", "+", cell.replace(r"\textbackslash{}", "+"))
    plain = plain.replace("--", "-").replace("\\", "").replace("{", "").replace("}", "")
    return sum(CMR10.get(char, 780) for char in plain) * FOOTNOTESIZE / 1000


def parts(text: str) -> list[tuple[str, list[list[str]]]]:
    """Alignment, titles and rows of each tabular of a file."""
    found = []
    for align, body in re.findall(
        r"\\begin\{(?:tabular|longtable)\}\{@\{\}(.*?)@\{\}\}\n(.*?)\\end\{(?:tab|long)", text, re.S
    ):
        first, _, rest = body.partition("\\endfirsthead")  # after which a longtable has its head once more
        body = first + rest.partition("\\endhead")[2]
        lines = [line for line in body.splitlines() if line.endswith(r" \\") and "multicolumn" not in line]
        found.append((align, [re.split(r"(?<!\\) ?& ?", line.removesuffix(r" \\")) for line in lines]))
    return found


def columns_of(align: str) -> list[float | None]:
    """The set width of each column, None where it is as wide as its widest cell."""
    return [float(width) if width else None for width in re.findall(r"p\{(\d+)pt\}|[lr]", align)]


def test_the_page_is_latex_too(folder: Path, verdict: Verdict) -> None:
    text = (folder / exports.LATEX).read_text(encoding="utf-8")
    assert text.isascii()
    assert re.findall(r"\\paragraph\{(.*)\}", text) == [latex._escaped(section.title) for section in verdict.page]
    items = re.findall(r"\\item\{\} (.*)", text)
    assert items == [latex._escaped(line) for section in verdict.page for line in section.lines]
    assert text.count(r"\begin{itemize}") == text.count(r"\end{itemize}") == len(verdict.page)


def test_latex_parts_fit_the_text_width_and_lose_no_column(folder: Path, verdict: Verdict) -> None:
    for name, table in verdict.tables.items():
        text = (folder / TABLES / f"{name}.tex").read_text(encoding="utf-8")
        assert text.isascii()
        titles: list[str] = []
        for align, rows in parts(text):
            widths = columns_of(align)
            assert {len(row) for row in rows} == {len(widths)}
            assert len(rows) == len(table) + 1
            natural = [max(map(points, column)) for column in zip(*rows, strict=True)]
            used = [width or own for width, own in zip(widths, natural, strict=True)]
            assert sum(used) + GAP * (len(used) - 1) <= TEXT_WIDTH, (name, rows[0])
            titles += rows[0]
        expected = [latex._escaped(column.title) for column in text_columns(verdict, name)]
        assert list(dict.fromkeys(titles)) == list(dict.fromkeys(expected))


def test_a_wide_table_repeats_the_names_of_its_rows(folder: Path) -> None:
    text = (folder / TABLES / "recipes.tex").read_text(encoding="utf-8")
    found = parts(text)
    assert len(found) > 2
    names = [[row[:2] for row in rows] for _, rows in found]
    assert all(one == names[0] for one in names)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == len(found)
    assert r"\label{tab:recipes}" in text
    assert r"\label{tab:recipes-2}" in text
    assert f"(part 2 of {len(found)})" in text
    assert re.search(r"\\multicolumn\{2\}\{c\}\{score\}", text)


def test_a_long_table_is_broken_over_pages_and_long_text_into_lines() -> None:
    columns = [
        Column("", "model", [f"m{i}" for i in range(60)], numeric=False),
        Column("", "recipe", ["lora · trainer.learning_rate=0.001 · data.max_length=512"] * 60, numeric=False),
        Column("", "error", ["no space left for the checkpoint: free some of it " * 5] * 60, numeric=False),
    ]
    text = exports.as_latex(columns, "c", "l")
    assert text.count(r"\begin{longtable}") == text.count(r"\end{longtable}") == 1
    assert r"\endhead" in text
    ((align, _),) = parts(text)
    widths = columns_of(align)
    assert widths[0] is None
    assert widths[1] is not None
    assert widths[2] is not None
    assert 300 < 20 + widths[1] + widths[2] <= TEXT_WIDTH


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
    sections = [html.unescape(title) for title in re.findall(r"<h3>(.*?)</h3>", page)]
    assert sections == [section.title for section in (*verdict.page, *verdict.sections)]
    folded = page.split("<details><summary>In detail</summary>", 1)[1].split("</details>", 1)[0]
    assert re.findall(r"<h3>(.*?)</h3>", folded) == [section.title for section in verdict.sections]
    assert "loss is nan | &lt;b&gt;&amp;" in page


def test_what_the_reader_decides_are_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main([str(folder), "--output", str(page), "--margin", "40", "--memory-weight", "0"]) == 0
    assert "within ±40 points" in (tmp_path / exports.MARKDOWN).read_text(encoding="utf-8")
    table = pd.read_csv(tmp_path / TABLES / "recipes.csv")
    assert table.cost.tolist() == pytest.approx((1 / table.speed_ratio).tolist())
    counts = {}
    for points in ("0.5", "60"):
        assert main([str(folder), "--output", str(page), "--spike", points, "--power", "0.9"]) == 0
        said = (tmp_path / exports.MARKDOWN).read_text(encoding="utf-8")
        assert f"single scores lie over {points} points from" in said
        counts[points] = int(re.findall(r"Spikes: (\d+) of", said)[0])
    assert counts["0.5"] > counts["60"] == 0
    assert "with 90% chance" in said
    assert main([str(folder), "--margin", "0"]) == 2
    assert "margin > 0" in capsys.readouterr().err
