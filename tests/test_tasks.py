"""Few-shot tasks: queries as published, the same for every number of shots, known by their content."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lyapft import config, tasks
from lyapft.errors import InputError
from lyapft.tasks.base import Task, content_hash, first_n
from tests.tiny import ARC, HELLASWAG, MMLU, PIQA, SINGLE_SPLIT, VOCAB, WINOGRANDE, Recorder, random_model


def test_mmlu_asks_as_published() -> None:
    first = tasks.Mmlu("mmlu", MMLU, [1]).queries(1)[0]
    expected = (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        "Which of these bodies gives off its own light?\n"
        "A. A moon\nB. A star\nC. A comet\nD. An asteroid\nAnswer: B\n\n"
        "What does a light year measure?\n"
        "A. Time\nB. Distance\nC. Brightness\nD. Mass\nAnswer:"
    )
    assert first.contexts == (expected,) * 4
    assert (first.continuations, first.gold, first.subset) == ((" A", " B", " C", " D"), 1, "astronomy")


def test_mmlu_keeps_subjects_apart_and_limits_each() -> None:
    asked = tasks.Mmlu("mmlu", MMLU, [0], limit=3).queries(0)
    assert [(q.subset, q.item_id) for q in asked] == [
        (s, i) for s in ("astronomy", "computer_security") for i in range(3)
    ]
    assert "about computer security." in asked[-1].contexts[0]
    assert {q.subset for q in tasks.Mmlu("mmlu", MMLU, [0], subjects=["computer_security"]).queries(0)} == {
        "computer_security"
    }


def test_winogrande_fills_the_blank_and_never_shows_the_scored_row() -> None:
    task = tasks.Winogrande("winogrande", WINOGRANDE, [5])
    zero, five = task.queries(0), task.queries(5)
    assert zero[1].contexts == ("Ben lent Carl his coat because Ben", "Ben lent Carl his coat because Carl")
    assert zero[1].continuations == (" was freezing in the wind.",) * 2
    for query in five:
        shown, _, asked = query.contexts[0].rpartition("\n\n")
        assert len(shown.split("\n\n")) == 5
        assert not any(line.startswith(asked.removesuffix(" Ben")) for line in shown.split("\n\n"))
    assert "jug" not in five[6].contexts[0].rpartition("\n\n")[0]  # row 7 repeats row 1: neither is shown to the other
    assert five[0].contexts[0].startswith("Ben lent Carl his coat because Carl was freezing in the wind.\n\n")


@pytest.mark.parametrize(
    ("make", "context", "continuations", "gold"),
    [
        (
            tasks.Hellaswag,
            "Home and Garden: How to plant tulips. Choose the place Tulips like sun.",
            (
                "  Dig holes of a hand's depth.",  # the marks' spaces stay, as in lm-eval
                " Freeze the sun for later.. Wait",
                " Sell the garden.",
                "  Never use soil",
            ),
            0,
        ),
        (tasks.Piqa, "Question: chair\nAnswer:", (" can be mended with a carrot", " can be mended with wood glue"), 1),
        (
            tasks.Arc,
            "Question: Which force pulls an apple to the ground?\nAnswer:",
            (" gravity", " friction", " magnetism"),
            0,
        ),
    ],
)
def test_answers_follow_their_prompt_as_published(
    make: type[Task], context: str, continuations: tuple[str, ...], gold: int
) -> None:
    asked = make("x", SINGLE_SPLIT[make], [0]).queries(0)
    (query,) = [q for q in asked if q.contexts[0] == context]
    assert query.contexts == (context,) * len(continuations)
    assert (query.continuations, query.gold) == (continuations, gold)
    assert query.lengths == tuple(len(text) - 1 for text in continuations)


@pytest.mark.parametrize("make", SINGLE_SPLIT)
def test_the_first_rows_are_the_shots_and_never_the_scored_one(make: type[Task]) -> None:
    task = make("x", SINGLE_SPLIT[make], [0, 4])
    bare, shown = task.queries(0), task.queries(4)
    for zero, four in zip(bare, shown, strict=True):
        heads = {four.contexts[i].removesuffix(zero.contexts[i]) for i in range(len(zero.contexts))}
        (head,) = heads
        solved = zero.contexts[zero.gold] + zero.continuations[zero.gold] + "\n\n"
        assert head.count("\n\n") == 4
        assert solved not in head
        firsts = [q.contexts[q.gold] + q.continuations[q.gold] + "\n\n" for q in bare]
        assert head == "".join([text for text in firsts if text != solved][:4])


def test_arc_reads_its_authors_layout_and_number_labels(tmp_path: Path) -> None:
    def nested(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
        choices = [{"text": text, "label": label} for text, label in pairs]
        return {
            "id": row["id"],
            "question": {"stem": row["question"], "choices": choices},
            "answerKey": row["answerKey"],
        }

    rows = [json.loads(line) for line in Path(ARC).read_text(encoding="utf-8").splitlines()]
    other = tmp_path / "arc.jsonl"
    other.write_text("".join(json.dumps(nested(row)) + "\n" for row in rows), encoding="utf-8")
    flat, theirs = tasks.Arc("arc", ARC, [0, 3]), tasks.Arc("arc", str(other), [0, 3])
    assert flat.queries(3) == theirs.queries(3)
    assert flat.fingerprint() == theirs.fingerprint()
    assert sorted({len(q.continuations) for q in flat.queries(0)}) == [3, 4, 5]
    assert [flat.queries(0)[i].gold for i in (1, 6)] == [2, 1]  # labelled 1 to 4


def test_piqa_reads_its_authors_labels_beside_the_rows(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(PIQA).read_text(encoding="utf-8").splitlines()]
    bare = tmp_path / "valid.jsonl"
    texts = [{k: v for k, v in row.items() if k != "label"} for row in rows]
    bare.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    labels = tmp_path / "valid-labels.lst"
    labels.write_text("".join(f"{row['label']}\n" for row in rows), encoding="utf-8")
    assert tasks.Piqa("p", str(bare), [2]).fingerprint() == tasks.Piqa("p", PIQA, [2]).fingerprint()
    labels.write_text("0\n1\n", encoding="utf-8")
    with pytest.raises(InputError, match="2 labels for 8 rows"):
        tasks.Piqa("p", str(bare), [0]).queries(0)
    labels.unlink()
    with pytest.raises(InputError, match="column label is missing"):
        tasks.Piqa("p", str(bare), [0]).queries(0)


def test_the_normalised_choice_is_the_likeliest_per_character(tokenizer: Any) -> None:
    task = tasks.Arc("arc", ARC, [0])
    scores, items = tasks.evaluate(random_model("llama"), tokenizer, task, progress=False)
    lengths = [np.array(q.lengths) for q in task.queries(0)]
    expected = [int(np.argmax(np.array(row) / n)) for row, n in zip(items.logprobs, lengths, strict=True)]
    assert items.choice_norm.tolist() == expected != items.choice.tolist()
    assert [(s.metric, s.n) for s in scores] == [("acc", 8), ("acc_norm", 8)]
    assert scores[1].value == (items.choice_norm == items.gold).mean()
    (score, _), items = tasks.evaluate(Recorder(torch.full((VOCAB,), math.nan)), tokenizer, task, progress=False)
    assert (score.nonfinite, set(items.choice_norm)) == (8, {-1})


def test_skills_ask_new_and_old_rules_with_one_right_choice_each() -> None:
    task = tasks.SkillsTask("skills", shots=[0, 3], items=40)
    asked = {shots: task.queries(shots) for shots in (0, 3)}
    assert {q.task for q in asked[0]} == {"skills_new", "skills_old"}
    for bare, shown in zip(asked[0], asked[3], strict=True):
        assert shown.contexts[0].endswith(bare.contexts[0])
        assert shown.contexts[0].count("\n") == 3
        assert (bare.continuations, bare.gold, bare.item_id) == (shown.continuations, shown.gold, shown.item_id)
        assert len(set(bare.continuations)) == 4
        assert {len(choice) for choice in bare.continuations} == {6}
    golds = (
        np.bincount([q.gold for q in tasks.SkillsTask("skills", shots=[0], items=2000).queries(0)], minlength=4) / 4000
    )
    assert np.abs(golds - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / 4000)
    new, old = ({q.contexts[0] for q in asked[0] if q.task == name} for name in ("skills_new", "skills_old"))
    assert len(new & old) < 10  # 40 each of 1,600 inputs: by chance about one


def test_skill_queries_do_not_change_with_the_shots_or_the_limit() -> None:
    few, many = tasks.SkillsTask("skills", shots=[0], limit=5), tasks.SkillsTask("skills", shots=[0, 8])
    of = {(q.task, q.item_id): q for q in many.queries(0)}
    assert few.queries(0) == [of[q.task, q.item_id] for q in few.queries(0)]
    assert few.fingerprint() != many.fingerprint()


@pytest.mark.parametrize("make", [tasks.Mmlu, *SINGLE_SPLIT])
def test_the_fingerprint_is_of_content_never_of_path(make: type[Task], tmp_path: Path) -> None:
    source, name = (Path(MMLU), "test/astronomy_test.csv") if make is tasks.Mmlu else (Path(SINGLE_SPLIT[make]), "")
    copy = tmp_path / "elsewhere"
    for file in [source] if source.is_file() else source.rglob("*.csv"):
        target = copy / file.relative_to(source) if source.is_dir() else copy
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    before = make("x", str(source), [0, 2]).fingerprint()
    assert make("x", str(copy), [0, 2]).fingerprint() == before
    changed = copy / name if name else copy
    changed.write_text(changed.read_text(encoding="utf-8").replace(" the ", " one "), encoding="utf-8")
    assert make("x", str(copy), [0, 2]).fingerprint() != before


def test_first_n_and_hash_are_plain_functions_of_their_input() -> None:
    assert first_n([1, 2, 2, 3], 2, excluded=2) == [1, 3]
    assert first_n([1], 2) == [1]
    assert content_hash("é", 1) == content_hash("é", 1) != content_hash("e", 1)


CHOICES = {"skills": None, "mmlu": MMLU, "winogrande": WINOGRANDE, "hellaswag": HELLASWAG, "piqa": PIQA}
CHOICES |= {"arc_easy": ARC, "arc_challenge": ARC}


def test_every_choice_of_conf_is_tested(root: Path) -> None:
    assert {path.stem for path in (root / "conf" / "task").glob("*.yaml")} == {*CHOICES, "paper"}  # test_study_presets


@pytest.mark.parametrize(("name", "path"), CHOICES.items())
def test_every_choice_of_conf_makes_its_task(name: str, path: str | None, root: Path) -> None:
    config.register()
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        node = compose(overrides=[f"+task={name}", *([f"task.path={path}"] if path else [])]).task
    task = instantiate(node)
    assert (type(task).__name__.removesuffix("Task").lower(), task.name) == (name.split("_")[0], name)
    assert tasks.faults(node) == []
    if name.startswith("arc"):
        assert task.hub() == (
            "allenai/ai2_arc",
            {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}[name],
            "test",
        )
