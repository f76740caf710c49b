"""What is wrong with the files and options of a task is named before any work starts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lyapft import tasks
from lyapft.errors import InputError
from lyapft.tasks.base import Task
from lyapft.tasks.encoding import encode_pairs
from tests.tiny import ARC, MMLU, SINGLE_SPLIT, VOCAB, WINOGRANDE, Recorder

CSV_ROW = "What?,a,b,c,d,A\n"
GOOD_LINE = '{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}\n'


def mmlu_folder(tmp_path: Path, test: str, dev: str | None = None) -> str:
    for split, text in (("test", test), ("dev", dev)):
        if text is not None:
            (tmp_path / split).mkdir()
            (tmp_path / split / f"logic_{split}.csv").write_text(text, encoding="utf-8")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("test", "dev", "shots", "message"),
    [
        ("", None, [0], r"logic_test\.csv: the file is empty"),
        ("What?,a,b,c,A\n", None, [0], "line 1: 5 fields, expected 6"),
        (CSV_ROW + "What?,a,b,c,d,E\n", None, [0], "line 2: the answer is 'E', expected one of A, B, C, D"),
        ("question,A,B,C,D,answer\n" + CSV_ROW, None, [0], "line 1: .*no header row: remove it"),
        (
            CSV_ROW * 3 + ",a,b,c,d,A\n",
            None,
            [0],
            "1 of 4 rows cannot be used, first logic: row 4 of test: the question is empty",
        ),
        (CSV_ROW, None, [0, 1], r"logic_dev\.csv: no such file"),
        (CSV_ROW, CSV_ROW, [0, 2], "subject logic has only 1 dev rows"),
    ],
)
def test_bad_mmlu_files_are_named(tmp_path: Path, test: str, dev: str | None, shots: list[int], message: str) -> None:
    task = tasks.Mmlu("mmlu", mmlu_folder(tmp_path, test, dev), shots)
    with pytest.raises(InputError, match=message):
        task.queries(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        (GOOD_LINE + "{oops\n", "line 2: invalid JSON"),
        (GOOD_LINE + "[1]\n", "line 2: expected a JSON object, found list"),
        ('{"text": "a _ b"}\n', "sentence, option1, option2, answer is missing. Expected .*; found text"),
        (GOOD_LINE.replace('"1"', '""'), "line 1: the answer is ''"),
        (GOOD_LINE.replace('"x"', "null"), "1 of 1 rows cannot be used, first line 1: option1 is None"),
        (GOOD_LINE * 4 + GOOD_LINE.replace("_", ""), "1 of 5 rows .*line 5: the sentence has 0 blanks"),
        (GOOD_LINE * 4 + GOOD_LINE.replace("_ b", "_"), "line 5: nothing follows the blank"),
        (GOOD_LINE, "has 1 usable rows, too few to show 1"),
        (GOOD_LINE * 3, "fewer than 1 rows differ from row 1"),
    ],
)
def test_bad_winogrande_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    task = tasks.Winogrande("winogrande", str(path), [1])
    with pytest.raises(InputError, match=message):
        task.queries(1)


HS = '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["x", "y"], "label": "0"}\n'
PQ = '{"goal": "g", "sol1": "x", "sol2": "y", "label": 0}\n'
AR = '{"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}\n'


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (
            tasks.Hellaswag,
            HS.replace('"0"', '""'),
            "line 1: the label is '', expected one of 0, 1 .*test split has none",
        ),
        (tasks.Hellaswag, HS.replace('"0"', "2"), "the label is 2"),
        (tasks.Hellaswag, HS.replace('"b"', "null"), "1 of 1 rows .*ctx_a is None"),
        (tasks.Hellaswag, HS.replace('["x", "y"]', '["x"]'), "at least two"),
        (tasks.Hellaswag, HS.replace('"y"', '"[step]"'), "nothing but layout marks"),
        (tasks.Piqa, PQ.replace(": 0", ": -1"), "the label is -1, expected 0 or 1"),
        (tasks.Piqa, PQ.replace('"y"', '" "'), "a choice is empty"),
        (tasks.Piqa, PQ.replace('"g"', "3"), "goal is 3, expected text"),
        (tasks.Arc, AR.replace('"answerKey": "A"', '"answerKey": "E"'), "the answerKey is 'E', expected one of A, B"),
        (tasks.Arc, AR.replace('["A", "B"]', '["A", "A"]'), "2 choices are labelled .*one label each"),
        (tasks.Arc, AR.replace('["A", "B"]', '["A"]'), "2 choices are labelled"),
        (tasks.Arc, AR.replace('"q"', "null"), "the question is None"),
        (tasks.Arc, AR.replace('"x"', "7"), "a choice is empty or no text"),
        (tasks.Arc, AR.replace('{"text": ["x", "y"], "label": ["A", "B"]}', '"x, y"'), "the choices are None"),
    ],
)
def test_bad_rows_of_the_other_tasks_are_named(tmp_path: Path, make: type[Task], text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        make("x", str(path), [0]).queries(0)


def test_a_few_bad_rows_are_counted_and_keep_the_others_in_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = Path(WINOGRANDE).read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([lines[0], GOOD_LINE.replace('"x"', "7"), *lines[1:]]), encoding="utf-8")
    task = tasks.Winogrande("winogrande", str(path), [0], max_bad_fraction=0.2)
    assert [q.item_id for q in task.queries(0)] == [0, *range(2, 11)]
    assert (task.record()["rows"], task.record()["rows_bad"]) == (10, 1)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"sentence": "caf\xe9 _"}')
    with pytest.raises(InputError, match="not UTF-8"):
        tasks.Winogrande("winogrande", str(path), [0]).queries(0)


@pytest.mark.parametrize("path", ["nowhere", MMLU])
def test_a_wrong_path_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=r"task\.path=.*file"):
        tasks.Winogrande("winogrande", path, [0]).queries(0)


def test_a_folder_without_subjects_and_an_unknown_subject_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no test/SUBJECT_test\.csv"):
        tasks.Mmlu("mmlu", str(tmp_path), [0]).queries(0)
    with pytest.raises(InputError, match=r"task\.subjects: alchemy not among .*astronomy, computer_security"):
        tasks.Mmlu("mmlu", MMLU, [0], subjects=["alchemy"]).queries(0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tasks.Winogrande, ("allenai/winogrande", "winogrande_xl", "validation")),
        (tasks.Hellaswag, ("Rowan/hellaswag", None, "validation")),
        (tasks.Piqa, ("baber/piqa", None, "validation")),
        (tasks.Arc, ("allenai/ai2_arc", "ARC-Easy", "test")),
    ],
)
def test_a_data_set_by_name_is_the_file_of_the_same_rows(
    make: type[Task], name: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in Path(SINGLE_SPLIT[make]).read_text(encoding="utf-8").splitlines()]
    asked: list[tuple[str | None, ...]] = []
    monkeypatch.setattr("lyapft.tasks.single_split.load_by_name", lambda *which: asked.append(which) or rows)
    task = make("x", None, [0, 2])
    assert task.fingerprint() == make("x", SINGLE_SPLIT[make], [0, 2]).fingerprint()
    assert asked == [name]
    rows[0].pop(next(iter(set(rows[0]) & set(task.COLUMNS))))
    with pytest.raises(InputError, match=f"{name[0]}: column .* is missing"):
        make("x", None, [0]).queries(0)


def test_an_unknown_subset_of_arc_is_refused() -> None:
    with pytest.raises(InputError, match=r"task\.subset=hard: use one of ARC-Easy, ARC-Challenge"):
        tasks.Arc("arc", ARC, [0], subset="hard")


@pytest.mark.parametrize("make", [tasks.Mmlu, *SINGLE_SPLIT])
def test_a_data_set_by_name_without_a_network_says_so(make: type[Task]) -> None:
    with pytest.raises(InputError, match=r"could not be loaded by name \(the hub cannot be reached.*task\.path="):
        make("x", None, [0]).queries(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": []}, r"task\.shots=\[\]"),
        ({"shots": [0, -1]}, r"task\.shots=\[0, -1\]"),
        ({"shots": [2, 2]}, "different numbers"),
        ({"shots": [9]}, "at most 8 shots"),
        ({"limit": 0}, r"task\.limit=0"),
        ({"batch_tokens": 0}, r"task\.batch_tokens=0"),
        ({"max_bad_fraction": 2.0}, r"task\.max_bad_fraction=2"),
        ({"items": 0}, r"task\.items=0"),
        ({"path": "x"}, r"task\.path=x: the skills are made up"),
        ({"new_rules": [], "old_rules": []}, "both empty"),
        ({"new_rules": ["fly"]}, "fly"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    node = OmegaConf.create({"_target_": "lyapft.tasks.SkillsTask", "name": "skills", **options})
    assert any(re.search(message, fault) for fault in tasks.faults(node))


def test_shots_that_do_not_fit_are_refused_before_work_starts(tokenizer: Any) -> None:
    task = tasks.Mmlu("mmlu", MMLU, [0, 1, 5])
    longest = {
        k: max(len(p.model_input()) for c in encode_pairs(tokenizer, task.queries(k)) for p in c) for k in (0, 1, 5)
    }
    assert tasks.context_faults(task, tokenizer, longest[5]) == []
    assert tasks.context_faults(task, tokenizer, None) == []
    (fault,) = tasks.context_faults(task, tokenizer, longest[5] - 1)
    assert f"with 5 shots the longest query of mmlu has {longest[5]} tokens" in fault
    assert "Use task.shots=[0, 1]" in fault
    with pytest.raises(InputError, match=r"task\.truncate=true"):
        tasks.evaluate(Recorder(torch.zeros(VOCAB)), tokenizer, task, max_positions=10, progress=False)
    task.truncate = True
    scores, _ = tasks.evaluate(Recorder(torch.zeros(VOCAB)), tokenizer, task, max_positions=longest[0], progress=False)
    assert [(score.shots, score.truncated > 0) for score in scores] == [(0, False), (1, True), (5, True)]
    assert scores[2].truncated == 10
