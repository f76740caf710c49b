"""Scores equal lm-eval's to the item: its own harness, its own task files, pointed at the same local rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from lyapft import tasks
from lyapft.tasks.base import Task
from tests.tiny import FIXTURES, byte_tokenizer, random_model
from tests.tolerances import TOL

lm_eval = pytest.importorskip("lm_eval", reason="the oracle of this file; it comes with the development extra")

from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"


def harness_task(yaml: str, splits: dict[str, list[dict[str, Any]]], **changes: Any) -> ConfigurableTask:
    """A task of lm-eval from its own file, its rows replaced by local ones."""
    rows = {name: datasets.Dataset.from_list(split) for name, split in splits.items()}
    return ConfigurableTask(config=load_yaml(TASKS / yaml) | {"custom_dataset": lambda **_: rows} | changes)


def mmlu_of_harness(folder: Path) -> list[ConfigurableTask]:
    """One task per subject, with the columns of the hub's data set; read by other code than the product's."""

    def rows(file: Path) -> list[dict[str, Any]]:
        table = pd.read_csv(file, header=None, dtype=str, keep_default_na=False)
        return [
            {"question": r[0], "choices": list(r[1:5]), "answer": "ABCD".index(r[5])} for r in table.values.tolist()
        ]

    subjects = sorted(file.name.removesuffix("_test.csv") for file in (folder / "test").iterdir())
    return [
        harness_task(
            f"mmlu/default/mmlu_{name}.yaml",
            {split: rows(folder / split / f"{name}_{split}.csv") for split in ("dev", "test")},
        )
        for name in subjects
    ]


def single_split_of_harness(yaml: str, file: Path) -> list[ConfigurableTask]:
    """The one split is scored and shown, the scored row left out by lm-eval's own sampler."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    one_split = {"training_split": None, "validation_split": None, "test_split": "rows", "fewshot_split": "rows"}
    changes = one_split | {"fewshot_config": {"sampler": "first_n"}}
    return [harness_task(yaml, {"rows": rows}, **changes)]


def harness_items(
    lm: HFLM, made: list[ConfigurableTask], shots: int, limit: int | None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """lm-eval's likelihoods per choice and its `acc` of every item, and its own summary."""
    found = lm_eval.simple_evaluate(
        lm,
        tasks=made,
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=1,
        task_manager=TaskManager(include_defaults=False),
    )
    items = [
        {
            "subset": name.removeprefix("mmlu_"),
            "item": sample["doc_id"],
            "logprobs": [float(answer[0]) for answer in sample["filtered_resps"]],
            "correct": bool(sample["acc"]),
            "correct_norm": bool(sample["acc_norm"]) if "acc_norm" in sample else None,
        }
        for name, samples in found["samples"].items()
        for sample in samples
    ]
    return pd.DataFrame(items), found["results"]


def assert_equal_to_the_item(
    model: torch.nn.Module, tokenizer: Any, task: Task, made: Callable[[], list[ConfigurableTask]], max_positions: int
) -> None:
    """Every likelihood within the tolerance; every choice and verdict the same, and so the score and its error."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=max_positions, backend="causal")
    scores, items = tasks.evaluate(model, tokenizer, task, max_positions=max_positions, progress=False)
    for shots in task.shots:
        theirs, summary = harness_items(lm, made(), shots, task.limit)
        own = {score.metric: score for score in scores if score.shots == shots}
        both = items[items.shots == shots].merge(theirs, on=["subset", "item"], validate="one_to_one")
        assert len(both) == own["acc"].n == len(theirs)
        for ours, expected in zip(both.logprobs_x, both.logprobs_y, strict=True):  # the number of choices may vary
            np.testing.assert_allclose(ours, expected, **TOL[torch.float32])
        assert both.choice.tolist() == [int(np.argmax(expected)) for expected in both.logprobs_y]
        assert both.correct_x.tolist() == both.correct_y.tolist()
        if "acc_norm" in own:
            assert (both.choice_norm == both.gold).tolist() == both.correct_norm.tolist()
        else:
            assert both.choice_norm.isna().all()
        if len(summary) == 1:
            (only,) = summary.values()
            assert {f"{metric},none" for metric in own} == {key for key in only if key in ("acc,none", "acc_norm,none")}
            for metric, score in own.items():
                assert score.value == pytest.approx(only[f"{metric},none"])
                assert score.stderr == pytest.approx(only[f"{metric}_stderr,none"])


YAML = {
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}
MAKE = {"winogrande": tasks.Winogrande, "hellaswag": tasks.Hellaswag, "piqa": tasks.Piqa}
NAMES = ("mmlu", *YAML)


def task_and_oracle(name: str, data: Path, **options: Any) -> tuple[Task, Callable[[], list[ConfigurableTask]]]:
    if name == "mmlu":
        return tasks.Mmlu("mmlu", str(data), [0, 5], **options), lambda: mmlu_of_harness(data)
    task = MAKE.get(name, tasks.Arc)(name, str(data), [0, 5], **options)
    return task, lambda: single_split_of_harness(YAML[name], data)


def fixture(name: str) -> Path:
    return FIXTURES / ("mmlu" if name == "mmlu" else f"{name.split('_')[0]}.jsonl")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("architecture", "bos"), [("llama", False), ("gpt2", True), ("mamba", True)])
def test_fixtures_score_as_in_lm_eval(name: str, architecture: str, bos: bool) -> None:
    task, oracle = task_and_oracle(name, fixture(name))
    assert_equal_to_the_item(random_model(architecture), byte_tokenizer(bos), task, oracle, 4096)


@pytest.mark.parametrize("name", ["mmlu", "winogrande", "hellaswag"])
def test_contexts_that_do_not_fit_are_cut_as_in_lm_eval(name: str) -> None:
    task, oracle = task_and_oracle(name, fixture(name), truncate=True)
    assert_equal_to_the_item(random_model("gpt2"), byte_tokenizer(), task, oracle, 64)


@pytest.mark.parametrize(
    ("name", "file", "limit"),
    [
        ("mmlu", "mmlu", 10),
        ("winogrande", "winogrande/winogrande_xl_validation.jsonl", 150),
        ("piqa", "piqa/piqa_validation.jsonl", 100),
        ("arc_easy", "arc_easy/ARC-Easy_validation.jsonl", 100),
    ],
)
def test_published_rows_score_as_in_lm_eval(name: str, file: str, limit: int, shared_data: Path) -> None:
    task, oracle = task_and_oracle(name, shared_data / file, limit=limit)
    text = (shared_data / "winogrande" / "winogrande_xl_validation.jsonl").read_text(encoding="utf-8")[:200_000]
    tokenizer = byte_tokenizer(texts=(text,), vocabulary=2000)
    model = random_model("llama", vocab_size=2000, max_position_embeddings=8192)
    assert_equal_to_the_item(model, tokenizer, task, oracle, 8192)
