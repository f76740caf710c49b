"""The report against the records it is made from, at every stage of a study."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lyapft import records, report
from lyapft.errors import InputError
from lyapft.report import cells, drawing, figures, stability, summary
from lyapft.report.__main__ import main
from lyapft.report.page import render
from lyapft.verdict import judge
from tests import commands, synthetic

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


class Page(HTMLParser):
    """Tables as lists of rows of text, headings, and everything that a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.captions = 0
        self._open: list[str] = []
        self.feed(text)

    def of(self, first: str) -> list[list[list[str]]]:
        """The tables whose first column has this heading."""
        return [table for table in self.tables if table[0][0] == first]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        self.captions += tag == "figcaption"

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        elif self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)


def minus(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")


def words(figure: drawing.Figure) -> list[str]:
    return [t.text[0] for t in figure.drawing.data if t.type == "scatter" and t.mode == "text"]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs") / "matrix"
    return folder, synthetic.study(folder, synthetic.matrix(("mamba_tiny", "llama_tiny")))


@pytest.fixture(scope="module")
def matrix_page(matrix: tuple[Path, list[dict[str, Any]]]) -> str:
    return report.write(matrix[0]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A study at every stage: done, running, failed in several ways; references missing for mamba2."""
    folder = tmp_path_factory.mktemp("runs") / "unfinished"
    made = synthetic.matrix()
    for precision, status in (("bf16", "running"), ("fp16", "nonfinite"), ("fp32", "failed"), ("tf32", "interrupted")):
        made.append(synthetic.record("mamba2_tiny", precision, "lora", status=status))
    made.append(synthetic.record("mamba2_tiny", "bf16", "none"))
    return folder, synthetic.study(folder, made)


def test_the_page_shows_every_number_of_every_record(
    matrix: tuple[Path, list[dict[str, Any]]], matrix_page: str
) -> None:
    made, page = matrix[1], Page(matrix_page)
    rows = {row[0]: row for row in page.of("cell")[0][2:]}
    assert len(rows) == len(made)
    for record in made:
        choices = record["choices"]
        row = rows[f"{choices['model']} · {choices['precision']} · {choices['peft']} · s0"]
        assert row[1:3] == ["✓ ok", record["role"]]
        assert row[3] == f"{record['training']['loss_mean_last_10pct']:.3f}"
        assert row[4:12] == [f"{score['value']:.3f}" for score in record["scores"]]
        if choices["model"] == "llama_tiny":
            assert row[12:14] == ["n/a", "n/a"]
        else:
            stability = record["stability"]
            assert row[12:14] == [minus(stability["lambda_max"], "#.3g"), f"{stability['margin']:#.3g}"]
        shown = ["self" if d["status"] == "self" else f"{d['mean_abs_points']:.2f}" for d in record["divergence"]]
        assert row[14:16] == shown
        cost = record["cost"]
        mark = " (emulated)" * record["precision"]["emulated"]
        assert row[17:] == [f"{cost['tokens_per_s']:,.0f}{mark}", f"{cost['peak_bytes'] / 2**20:,.0f}"]


def test_signed_differences_and_flips_are_those_of_the_records(
    matrix: tuple[Path, list[dict[str, Any]]], matrix_page: str
) -> None:
    made, page = matrix[1], Page(matrix_page)
    pairs = [entry for record in made for entry in record["divergence"] if entry["status"] == "ok"]
    rows = page.of("cell")[1][2:]
    assert len(rows) == len(pairs)
    by_id = {record["id"]: record for record in made}
    record = next(r for r in made if r["choices"]["precision"] == "bf16" and r["choices"]["peft"] == "lora")
    entry = record["divergence"][1]
    row = next(row for row in rows if row[0].startswith("mamba_tiny · bf16 · lora") and row[1] == "fp32 same peft")
    shown = [0.0 if t == "0.00" else float(t.split()[-1].replace("−", "-")) for t in row[2:10]]
    assert shown == pytest.approx([s["signed_points"] for s in entry["per_score"]], abs=0.005)
    spiked = [t.startswith(("▲", "▼")) for t in row[2:10]]
    assert spiked == [s["abs_points"] > 1 for s in entry["per_score"]]
    ours, theirs = synthetic.items(record), synthetic.items(by_id[entry["reference_id"]])
    flipped = int((ours["choice"] != theirs["choice"]).sum())
    assert row[11] == f"{flipped} of {len(ours)} ({100 * flipped / len(ours):.1f}%)"


def test_the_page_loads_nothing_and_holds_plotly_once(matrix_page: str) -> None:
    text, page = matrix_page, Page(matrix_page)
    loading = [(tag, name) for tag, attrs in page.tags for name in attrs if name in ("src", "srcset", "data")]
    assert loading == []
    assert not any(tag in ("link", "iframe", "object", "embed", "base") for tag, _ in page.tags)
    assert text.count("plotly.js v") == 1
    assert "@import" not in text.split("<script>")[0]
    assert len(text) < 6_500_000


def test_every_figure_has_a_title_and_a_sentence_on_what_to_conclude(
    matrix: tuple[Path, list[dict[str, Any]]], matrix_page: str
) -> None:
    study = cells.load_study(matrix[0])
    found = figures.score_figures(study) + figures.training_figures(study)
    assert [figure.title for figure in found] == [
        "Scores against shots",
        "Divergence from full precision",
        "Training loss",
        "Stability of the recurrent state over training",
        "Margin −λ_max of every recurrent layer over training",
    ]
    for figure in found:
        assert figure.reading.endswith(".")
        assert figure.reading.count(". ") == 0, "one sentence"
        assert re.search(r"not|no finding", figure.reading), "what not to conclude"
        titles = [axis.title.text for axis in (*figure.drawing.select_xaxes(), *figure.drawing.select_yaxes())]
        assert any(titles)
    page = Page(matrix_page)
    assert page.captions == len(found)
    assert {figure.title for figure in found} <= set(page.headings)


def test_bars_are_the_mean_divergences_with_their_n(matrix: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, made = matrix
    figure = figures.divergence_bars(cells.load_study(folder))
    assert figure is not None
    bars = sorted(float(trace.x[0]) for trace in figure.drawing.data if trace.type == "bar")
    means = sorted(d["mean_abs_points"] for record in made for d in record["divergence"] if d["status"] == "ok")
    assert bars == pytest.approx(means)
    notes = words(figure)
    assert sum("(1 seed, n = 8)" in note for note in notes) == len(means)
    assert sum(note == "its own counterpart" for note in notes) == 2  # fp32 LoRA of two models
    values = {record["id"]: record["scores"] for record in made}
    pairs = [(r["id"], d["reference_id"]) for r in made for d in r["divergence"] if d["status"] == "ok"]
    means = [[np.mean([score["value"] for score in values[one]]) for one in pair] for pair in pairs]
    shown = sorted(note.partition("<br>")[2] for note in notes if "against" in note)
    assert shown == sorted(f"{ours:.3f} against {theirs:.3f}" for ours, theirs in means)
    assert "one seed: no interval" in figure.reading


def test_seeds_become_one_bar_and_one_line(tmp_path: Path) -> None:
    made = synthetic.study(tmp_path, synthetic.matrix(seeds=3), n_steps=10, n_items=20)
    study = cells.load_study(tmp_path)
    bars = figures.divergence_bars(study)
    scores = figures.scores_against_shots(study)
    assert bars is not None
    assert scores is not None
    bf16 = [r for r in made if (r["choices"]["precision"], r["choices"]["peft"]) == ("bf16", "lora")]
    expected = np.mean([r["divergence"][0]["mean_abs_points"] for r in bf16])
    drawn = [t for t in bars.drawing.data if t.type == "bar" and t.y[0] == "mamba_tiny · bf16 · lora"]
    assert drawn[0].x[0] == pytest.approx(expected)
    assert any("(3 seeds)" in note for note in words(bars))
    lines = [t for t in scores.drawing.data if t.name == "bf16 · lora" and t.x[0] is not None]
    assert len(lines) == 2  # one per task
    values = [r["scores"][0]["value"] for r in bf16]
    assert lines[0].y[0] == pytest.approx(np.mean(values))
    assert lines[0].error_y.array[0] == pytest.approx(max(values) - np.mean(values))


def test_scores_stand_beside_a_blind_guess_where_records_know_it(tmp_path: Path) -> None:
    synthetic.study(tmp_path, synthetic.matrix(), n_steps=10, n_items=20)
    scores = figures.scores_against_shots(cells.load_study(tmp_path))
    assert scores is not None
    drawn = [trace for trace in scores.drawing.data if trace.mode == "lines"]
    assert [(trace.line.dash, *trace.y) for trace in drawn] == [("dot", 0.25, 0.25)] * 2  # a panel for each task
    assert len({trace.xaxis for trace in drawn}) == 2
    assert "dotted: a blind guess" in scores.reading
    for path in tmp_path.glob("*/record.json"):
        record = json.loads(path.read_text())
        for score in record["scores"]:
            del score["chance"]
        path.write_text(json.dumps(record))
    scores = figures.scores_against_shots(cells.load_study(tmp_path))
    assert scores is not None
    assert not [trace for trace in scores.drawing.data if trace.mode == "lines"]
    assert "guess" not in scores.reading


def test_scores_beyond_the_trained_length_are_hollow_and_their_bars_are_marked(tmp_path: Path) -> None:
    made = [synthetic.record(precision=precision) for precision in ("fp32", "bf16")]
    synthetic.study(tmp_path, [*made, synthetic.record(precision="fp32", peft="none")], n_steps=10, n_items=20)
    before = figures.score_figures(cells.load_study(tmp_path))
    for home in tmp_path.iterdir():
        record = json.loads((home / records.RECORD).read_text(encoding="utf-8"))
        for score in record["scores"]:
            score["beyond_trained_length"] = 3 * (score["shots"] == 5)
        (home / records.RECORD).write_text(json.dumps(record), encoding="utf-8")
    after = figures.score_figures(cells.load_study(tmp_path))
    lines = [
        [t for t in found[0].drawing.data if "markers" in t.mode and t.x[0] is not None] for found in (before, after)
    ]
    symbols = [[symbol for trace in own for symbol in trace.marker.symbol] for own in lines]
    assert not any(symbol.endswith("-open") for symbol in symbols[0])
    assert len(symbols[1]) == 3 * 8
    assert [s.endswith("-open") for s in symbols[1]] == 6 * [False, False, False, True]  # 0, 1, 3 and 5 shots
    assert "hollow" not in before[0].reading
    assert "hollow: items beyond the trained length" in after[0].reading
    assert all("†" in note for note in words(after[1]) if "against" in note)
    assert not any("†" in note for note in words(before[1]))
    assert "† some items beyond the trained length" in after[1].reading


def test_curves_are_the_step_series(matrix: tuple[Path, list[dict[str, Any]]]) -> None:
    study = cells.load_study(matrix[0])
    figure, _ = figures.stability(study)
    lines = [trace for trace in figure.drawing.data if trace.x[0] is not None]
    recurrent = [cell for cell in study.cells if figures.layer_names(cell)]
    assert len(lines) == len(recurrent) * 2 * 2  # layers, and λ_max beside margin
    series = recurrent[0].steps["lambda_max/backbone.layers.0.mixer"]
    assert list(lines[0].y) == pytest.approx(series.tolist())
    assert list(lines[1].y) == pytest.approx((-series).tolist())
    loss = figures.loss_curves(study)
    assert loss is not None
    assert sum(trace.x[0] is not None for trace in loss.drawing.data) == len(study.cells)


def test_many_layers_are_drawn_as_heatmaps_beside_the_largest(tmp_path: Path) -> None:
    made = synthetic.study(tmp_path, [synthetic.record(layers=24), synthetic.record(precision="fp32", layers=24)], 30)
    lines, maps = figures.stability(cells.load_study(tmp_path))
    assert sum(trace.x[0] is not None for trace in lines.drawing.data) == 2 * len(made)
    heatmaps = [trace for trace in maps.drawing.data if trace.type == "heatmap"]
    assert len(heatmaps) == len(made)
    assert np.asarray(heatmaps[0].z, dtype=float).shape == (24, 30)


def test_a_study_at_every_stage_has_a_page(unfinished: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, made = unfinished
    text = report.write(folder).read_text(encoding="utf-8")
    page = Page(text)
    status = {row[0]: row[1] for row in page.of("cell")[0][2:]}
    assert len(status) == len(made)
    assert status["mamba2_tiny · bf16 · lora · s0"] == "… running"
    assert status["mamba2_tiny · fp16 · lora · s0"] == "✗ nonfinite"
    assert status["mamba2_tiny · fp32 · lora · s0"] == "✗ failed"
    assert status["mamba2_tiny · tf32 · lora · s0"] == "○ interrupted"
    for message in ("made-up nonfinite", "made-up failed", "made-up interrupted"):
        assert f"RuntimeError: {message}" in text
    orphan = next(row for row in page.of("cell")[0] if row[0] == "mamba2_tiny · bf16 · none · s0")
    assert "missing" in orphan
    loss = figures.loss_curves(cells.load_study(folder))
    assert loss is not None
    assert sum(t.x[0] is not None for t in loss.drawing.data) == len(made) - 1  # all but the one that failed at once


def test_a_study_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    stub = synthetic.record(status="running")
    for late in ("model", "precision", "kernels", "data", "peft", "recurrences_unknown"):
        del stub[late]  # what a cell's first record does not have yet
    (tmp_path / stub["name"]).mkdir()
    records.save(tmp_path / stub["name"], stub)
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert page.of("cell")[0][-1][:2] == ["mamba_tiny · bf16 · lora · s0", "… running"]
    assert page.captions == 0
    assert "… running" in report.summary_table(loaded(tmp_path))


def test_broken_files_are_named_and_hide_nothing_else(tmp_path: Path) -> None:
    made = synthetic.study(tmp_path, synthetic.matrix(), n_steps=10, n_items=8)
    (tmp_path / made[0]["name"] / "steps.parquet").write_bytes(b"not parquet")
    (tmp_path / made[1]["name"] / "record.json").write_text("{", encoding="utf-8")
    (tmp_path / made[2]["name"] / "items.parquet").unlink()
    study = cells.load_study(tmp_path)
    assert len(study.cells) == len(made) - 1
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert f"{made[0]['name']}/steps.parquet cannot be read" in text
    assert f"{made[1]['name']}/record.json is not a readable record" in text


def test_everything_from_records_is_escaped(tmp_path: Path, matrix_page: str) -> None:
    made = synthetic.matrix()
    for record in made:
        record["study"] = HOSTILE
        record["error"] = {"type": HOSTILE, "message": HOSTILE}
        record["kernels"] = {HOSTILE: HOSTILE}
        record["overrides"].append(f"x={HOSTILE}{record['id']}")
        record["environment"]["device"] = HOSTILE
        for group in record["choices"]:
            record["choices"][group] += HOSTILE if group in ("model", "peft") else ""
        for layer in record["stability"].get("layers", []):
            layer["layer"] += HOSTILE
    for record in made:
        record["model"]["architecture"] = "mamba"
        home = tmp_path / record["name"]
        home.mkdir()
        record["scores"] = [{"task": HOSTILE, "shots": 0, "metric": "acc", "value": 0.5, "n": 10, "stderr": 0.1}]
        record["divergence"] = [
            {
                "counterpart": "paper",
                "reference_id": made[0]["id"],
                "status": "ok",
                "mean_abs_points": 0.0,
                "per_score": [{"task": HOSTILE, "shots": 0, "signed_points": 0.0, "abs_points": 0.0}],
            }
        ]
        records.save(home, record)
        synthetic.steps(record, 5).to_parquet(home / "steps.parquet")
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    ours = {tag for tag, _ in Page(matrix_page).tags} | {"ul", "li", "code", "br"}
    assert {tag for tag, _ in Page(text).tags} <= ours


def test_the_page_is_the_same_again(tmp_path: Path) -> None:
    synthetic.study(tmp_path, synthetic.matrix()[:2], n_steps=5, n_items=4)

    def page() -> str:
        study = cells.load_study(tmp_path)
        return render(study, judge([cell.record for cell in study.cells]), "now")

    first, second = page(), page()
    assert first == second


def test_styles_differ_in_more_than_colour() -> None:
    made = [synthetic.record(precision=p, peft=q) for p in ("fp32", "bf16", "fp16", "tf32") for q in ("none", "lora")]
    for extra in ("fp8", "int8"):
        made.append(synthetic.record())
        made[-1]["choices"] |= {"precision": extra, "peft": "other"}
    shown = [cells.Cell(record, "", "", "") for record in made]
    looks = drawing.styles(shown)
    assert len({(style.marker, style.dash) for style in looks.values()}) == len(made)
    assert len({(style.colour, style.hatch) for style in looks.values()}) == len(made)


def test_thinning_keeps_means_and_leaves_gaps() -> None:
    x, y = drawing.thin(range(1000), pd.Series(np.arange(1000.0)), 100)
    assert len(x) == 100
    assert x == y
    assert np.mean(y) == pytest.approx(499.5)
    _, gaps = drawing.thin(range(4), pd.Series([1.0, np.nan, np.inf, 4.0]))
    assert gaps == [1.0, None, None, 4.0]


def test_labels_are_unique_and_name_what_differs() -> None:
    base = synthetic.record()
    rerun = synthetic.record(replicate=1)
    # reruns are asked for beside a cell, they do not change it
    other = synthetic.record(overrides=("trainer.learning_rate=1e-3", "study.noise_floor=[replicate]"))
    twin = json.loads(json.dumps(base)) | {"id": "f" * 12}
    names = cells.labels([base, rerun, other])
    assert names == [
        "mamba_tiny · bf16 · lora · s0",
        "mamba_tiny · bf16 · lora · replicate 1 · s0",
        "mamba_tiny · bf16 · lora · trainer.learning_rate=1e-3 · s0",
    ]
    assert len(set(cells.labels([base, twin]))) == 2


def loaded(folder: Path) -> list[dict[str, Any]]:
    return [record for _, record in records.load_study(folder)]


def test_the_terminal_table_has_a_row_per_cell_and_the_errors(
    unfinished: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, made = unfinished
    text = report.summary_table(loaded(folder), width=400)
    lines = text.splitlines()
    rows = [line for line in lines if re.search(r" · s0  ", line)]
    assert len(rows) == len(made)
    bf16 = next(r for r in made if r["choices"]["model"] == "mamba_tiny" and r["choices"]["precision"] == "bf16")
    row = next(line for line in rows if line.startswith("mamba_tiny · bf16 · none"))
    for number in (*(f"{s['value']:.3f}" for s in bf16["scores"]), f"{bf16['cost']['tokens_per_s']:,.0f} (emulated)"):
        assert number in row
    assert minus(bf16["stability"]["lambda_max"], "#.3g") in row
    assert f"{bf16['divergence'][0]['mean_abs_points']:.2f}" in row
    assert "✗ mamba2_tiny · fp32 · lora · s0: RuntimeError: made-up failed" in lines
    assert any(line.startswith("(emulated): half precision ran in software") for line in lines)


def test_the_terminal_table_says_n_a_for_transformers(matrix: tuple[Path, list[dict[str, Any]]]) -> None:
    text = report.summary_table(loaded(matrix[0]), width=400)
    row = next(line for line in text.splitlines() if line.startswith("llama_tiny · bf16 · lora"))
    assert row.count("n/a") == 2


@pytest.mark.parametrize("width", [100, 140, 200])
def test_the_terminal_table_keeps_to_its_width(matrix: tuple[Path, list[dict[str, Any]]], width: int) -> None:
    text = report.summary_table(loaded(matrix[0]), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    wide = report.summary_table(loaded(matrix[0]), width=1000)
    assert set(wide.split()) == set(text.split()) - {"─" * n for n in range(1001)} | {
        word for word in wide.split() if "─" in word
    }


def test_of_a_very_large_study_the_terminal_shows_the_first_cells_and_counts_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = synthetic.matrix(seeds=5)
    for record in made[3:10]:
        record |= {"status": "failed", "error": {"type": "OSError", "message": "made-up"}}
    assert "…" not in report.summary_table(made, width=300)
    monkeypatch.setattr(summary, "MOST_CELLS", 12)
    monkeypatch.setattr(summary, "MOST_ERRORS", 3)
    text = report.summary_table(made, width=300)
    rows = [line for line in text.splitlines() if re.search(r"· s\d  ", line)]
    assert [row.split("  ")[0] for row in rows] == cells.labels(cells.ordered(made))[:12]
    assert "… the first 12 of 30 cells (23 ok, 7 failed); all of them are in tables/cells.parquet" in text
    assert text.count("OSError: made-up") == 3
    assert text.endswith("✗ and 4 more: their errors are in the report and in each cell's log")


def test_nothing_to_show_is_said() -> None:
    assert report.summary_table([]) == "no cells"


def test_output_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    synthetic.study(tmp_path / "study", [synthetic.record()], n_steps=5, n_items=4)
    target = tmp_path / "new" / "page.html"
    assert report.write(tmp_path / "study", target) == target
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert not (tmp_path / "study" / "report.html").exists()


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    made = synthetic.record()
    run = folder / "study" / made["name"]
    run.mkdir(parents=True)
    records.save(run, made)
    (folder / "empty").mkdir()
    (folder / "broken" / "cell").mkdir(parents=True)
    (folder / "broken" / "cell" / "record.json").write_text("[]", encoding="utf-8")
    (folder / "file").touch()
    study = str(folder / "study")
    return {
        "missing folder": ([str(folder / "nowhere")], "is not a folder"),
        "a file": ([str(folder / "file")], "is not a folder"),
        "no records": ([str(folder / "empty")], "holds no readable record"),
        "no readable record": ([str(folder / "broken")], "schema version"),
        "a run": ([str(run)], "the folder of one run"),
        "output is a folder": ([study, "--output", str(folder)], "is a folder"),
        "output below a file": ([study, "--output", str(folder / "file" / "page.html")], "cannot be written"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing folder",
        "a file",
        "no records",
        "no readable record",
        "a run",
        "output is a folder",
        "output below a file",
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = bad_inputs(tmp_path)[case]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert str(tmp_path) in captured.err
    assert "Traceback" not in captured.err


def test_bad_input_raises_for_a_caller(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        report.write(tmp_path / "nowhere")


def test_the_command_line_prints_where_the_page_is(matrix: tuple[Path, list[dict[str, Any]]], root: Path) -> None:
    command = [sys.executable, "-m", "lyapft.report", str(matrix[0])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONUTF8": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()) == matrix[0] / "report.html"
    failed = commands.run("-m", "lyapft.report", "nowhere", folder=root)
    assert failed.returncode == 2
    assert failed.stderr == "error: nowhere is not a folder: give the folder of a study, runs/STUDY\n"


def test_a_stability_card_names_the_worst_layer_and_marks_the_format_that_ran(
    matrix: tuple[Path, list[dict[str, Any]]], matrix_page: str
) -> None:
    (card,) = (table for table in Page(matrix_page).of("cell") if any("worst layer" in head for head in table[0]))
    shown = {row[0]: row for row in card[2:]}
    written = {record["id"]: record for record in matrix[1]}
    for cell in cells.load_study(matrix[0]).cells:
        stable = written[cell.record["id"]].get("stability", {})
        if "lambda_max" not in stable:
            assert cell.label not in shown
            continue
        worst = max(stable["layers"], key=lambda layer: layer["lambda_max"])["layer"]
        assert worst in shown[cell.label]
        assert sum("●" in text for text in shown[cell.label]) == int(f"neutral_{stable.get('scan_format')}" in stable)


def test_a_transformer_has_a_card_where_a_shadow_measured_it(tmp_path: Path) -> None:
    stateless = synthetic.record() | {"stability": {"not_applicable": "no recurrent state"}}
    synthetic.study(tmp_path, [stateless], 20)
    assert stability.cards(cells.load_study(tmp_path)) == ""
    (cell,) = cells.load_study(tmp_path).cells
    seen = {"layers.0": 0.001, "layers.1": 0.009, "layers.2": 0.01}
    shadow = {"kl_mean": 1.5e-4, "top1_min": 0.99, "deviation_max": 0.01, "deviation_max_by_block": seen}
    record = cell.record | {"shadow": shadow}
    (tmp_path / record["name"] / records.RECORD).write_text(json.dumps(record), encoding="utf-8")
    (card,) = Page(stability.cards(cells.load_study(tmp_path))).of("cell")
    assert "1.50e−04" in card[-1]
    assert card[-1][-1] == "layers.1"  # adds the most; the last one only hands it on


def test_a_study_shows_the_experiments_in_its_folder(tmp_path: Path) -> None:
    synthetic.study(tmp_path, [synthetic.record()], 20)
    curve = {
        "model": "llama",
        "recurrent": False,
        "x": [0, 1],
        "mean": [2.0, 1.0],
        "low": [1.0, 0.5],
        "high": [3.0, 2.0],
    }
    target = tmp_path / records.EXPERIMENTS / "growth-0.json"
    target.parent.mkdir()
    target.write_text(json.dumps({"name": "growth", "series": {"curves": [curve]}}), encoding="utf-8")
    study = cells.load_study(tmp_path)
    page = Page(render(study, judge([cell.record for cell in study.cells], {})))
    assert any(attributes.get("id") == "growth-1-1" for _, attributes in page.tags)
