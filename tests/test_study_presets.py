"""Presets of studies: what they span, suites of tasks, bases as they are, noise floors, rates by validation loss."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from lyapft import backbone, cell, config, data, rates, records, tasks, verdict
from lyapft.cell.validation import validation
from lyapft.errors import InputError
from lyapft.plan import cells as plan
from tests.test_cell import SMALL, prepared
from tests.test_config import CONF, composed, identity
from tests.tiny import ARC, HELLASWAG, MMLU, PIQA, WINOGRANDE

CELLS = {"smoke": 2, "matrix": 216, "paper": 459, "inference": 12, "lr": 108, "tied": 64, "icl": 64}


def spanned(preset: str) -> list[dict[str, str]]:
    """The overrides of every cell of a preset, as Hydra's sweeper spans them."""
    GlobalHydra.instance().clear()
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"study={preset}"], return_hydra_config=True)
    assert cfg.hydra.mode == RunMode.MULTIRUN
    parser = OverridesParser.create()
    found: list[dict[str, str]] = [{}]
    for key, value in cfg.hydra.sweeper.params.items():
        override = parser.parse_override(f"{key}={value}")
        choices = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(value)]
        found = [cell | {key: choice} for choice in choices for cell in found]
    return found


@pytest.mark.parametrize(("preset", "count"), CELLS.items())
def test_a_preset_spans_its_matrix_and_every_cell_is_sound(preset, count):
    cells = spanned(preset)
    assert len(cells) == count
    ids = set()
    for overrides in cells[:: max(1, count // 12)]:
        cfg = composed(f"study={preset}", *(f"{key}={value}" for key, value in overrides.items()))
        assert config.faults(cfg) == []
        assert cfg.study.name == preset
        ids.add(identity(f"study={preset}", *(f"{key}={value}" for key, value in overrides.items())))
    assert len(ids) == len(cells[:: max(1, count // 12)])


def test_what_the_paper_preset_leaves_out_is_added_as_its_comment_says():
    text = (CONF / "study" / "paper.yaml").read_text(encoding="utf-8")
    whole, openhermes, openelm = (line.split()[2:] for line in re.findall(r"^#   python (.+)$", text, re.MULTILINE))
    assert whole == []
    assert not [cell for cell in spanned("paper") if "openelm" in cell["model"]]
    with plan.composing():
        some = plan.cells(plan.composed(["study=paper", *openhermes, "seed=0", "model=mamba_130m", "precision=bf16"]))
        added = plan.cells(plan.composed(["study=paper", *openelm, "seed=0"]))
    assert {(one.config.data.path, one.config.study.name) for one in some} == {
        ("teknium/OpenHermes-2.5", "paper_openhermes")
    }
    assert {one.choices["data"] for one in some} == {"sharegpt"}
    assert {(one.choices["model"], one.choices["peft"]) for one in added} == {
        ("openelm_270m", "none"),
        ("openelm_270m", "lora_all"),
    }
    assert all(one.config.model.trust_remote_code and not config.faults(one.config) for one in added)


def test_the_matrix_names_its_references_so_none_is_made_beside_it():
    cells = [{k: v for k, v in c.items() if k != "seed"} for c in spanned("matrix") if c["seed"] == "0"]
    for model in ("mamba_tiny", "mamba2_tiny", "llama_tiny"):
        for peft in ("none", "lora", "lora_all"):
            assert {"model": model, "peft": peft, "precision": "fp32"} in cells


def test_a_base_is_scored_as_it_is(tmp_path):
    record = cell.ensure(prepared(tmp_path, "trainer.steps=0", "peft=none", "precision=fp32"))
    assert record["status"] == "ok"
    assert record["files"]["weights"] is None
    assert "training" not in record
    assert record["cost"]["eval_wall_s"] > 0
    prepared_base = prepared(tmp_path, "trainer.steps=0", "peft=none", "precision=fp32")
    base = backbone.load(prepared_base.config.model)
    scores, _ = tasks.evaluate(base.model, base.tokenizer, prepared_base.task, trained_length=base.trained_length)
    assert [s["value"] for s in record["scores"]] == [score.value for score in scores]


def test_held_out_rows_are_not_trained_on_and_their_loss_is_recorded(tmp_path):
    held = prepared(tmp_path, "trainer.validation_rows=16", "precision=fp32", "reference=off")
    assert held.id != prepared(tmp_path, "precision=fp32", "reference=off").id
    record = cell.ensure(held)
    assert record["validation"]["rows"] == 16
    assert record["data"]["rows"] == 64 - 16
    assert math.isfinite(record["validation"]["loss"])
    empty = cell.ensure(prepared(tmp_path, "trainer.validation_rows=64", "reference=off"))
    assert "validation_rows=64 leaves nothing" in empty["error"]["message"]


def test_no_rows_held_out_is_the_identity_of_before():
    assert identity() == identity("trainer.validation_rows=0") != identity("trainer.validation_rows=8")


def test_the_validation_loss_is_the_mean_over_targets(tmp_path):
    held = prepared(tmp_path, "model=llama_tiny", "precision=fp32", "trainer.batch_size=3")
    base = backbone.load(held.config.model)
    rows = data.build(held.source, base.tokenizer, 64).split(8)[1]
    assert rows is not None
    found = validation(base.model, rows, held, torch.no_grad, rows=2)
    losses = []
    base.model.requires_grad_(False)
    for i in range(len(rows)):
        row = rows[i]
        logits = base.model(row["input_ids"][None]).logits[0].double().log_softmax(-1)
        losses += [-logits[t - 1, int(label)] for t, label in enumerate(row["labels"]) if t and label != -100]
    assert found["target_tokens"] == len(losses)
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_the_noise_floor_reruns_the_cells_of_its_seeds():
    cfg = composed("study.noise_floor=[replicate,threads]")
    twins = config.noise_floor_configs(cfg, threads=1)
    assert (twins["replicate"].replicate, twins["threads"].threads) == (1, 2)
    assert {twin.reference for twin in twins.values()} == {"off"}
    assert config.noise_floor_configs(cfg, threads=4)["threads"].threads == 1
    assert config.noise_floor_configs(composed("study.noise_floor=[replicate]", "seed=1"), 1) == {}
    assert config.noise_floor_configs(composed("study.noise_floor=[replicate]", "replicate=1"), 1) == {}
    assert any("study.noise_floor" in fault for fault in config.faults(composed("study.noise_floor=[again]")))


def test_a_run_with_a_noise_floor_leaves_reruns_that_the_verdict_measures(tmp_path, monkeypatch):
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"overrides": {"task": []}}))
    cfg = composed(*SMALL, f"runs={tmp_path}", "study.noise_floor=[replicate,threads]", "reference=off")
    cell.run(cfg)
    found = [record for _, record in records.load_study(tmp_path / "default")]
    assert sorted(record["role"] for record in found) == ["cell", "rerun", "rerun"]
    floors = {floor.kind: floor for floor in verdict.judge(found).floors}
    assert set(floors) == {"replicate", "threads"}
    assert floors["replicate"].mean_abs == 0  # the same seed on the same machine


def test_rates_choose_the_smallest_mean_validation_loss_and_say_where_it_is_the_last(tmp_path, capsys):
    losses = {("a", 1e-3): [2.0, 2.2], ("a", 1e-2): [1.0, 1.2], ("a", 1e-1): [0.5, None], ("b", 1e-3): [3.0, 3.0]}
    found = [
        {
            "schema_version": 1,
            "choices": {"model": model, "peft": "lora"},
            "config": {"trainer": {"learning_rate": rate}},
            "status": "ok" if loss else "nonfinite",
            **({"validation": {"loss": loss}} if loss else {}),
        }
        for (model, rate), both in losses.items()
        for loss in both
    ]
    choices = rates.table(found)
    assert rates.chosen(choices) == {"a": {"lora": 1e-2}, "b": {"lora": 1e-3}}
    assert list(choices[choices["edge"]]["model"]) == ["b"]
    for i, record in enumerate(found):
        records.save(tmp_path / "lr" / str(i), record)
    assert rates.main([str(tmp_path / "lr")]) == 0
    assert "b, lora: the best rate 0.001 is the last one tried" in capsys.readouterr().err
    made = tmp_path / "lr" / rates.FILE
    cfg = composed(f"rates={made}", "model.name=a")
    before = dict(cfg.model.learning_rate)
    used = rates.applied(cfg)
    assert dict(used.model.learning_rate) == before | {"lora": 1e-2}
    assert rates.applied(composed(f"rates={made}")) == composed("model=mamba_tiny")  # a model that it does not know


@pytest.mark.parametrize("text", [None, "- 1", "a: [", "mamba_tiny: 3", "mamba_tiny: {lora: fast}"])
def test_a_file_that_holds_no_rates_is_refused(tmp_path, text):
    path = tmp_path / "rates.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match="rates="):
        rates.applied(composed(f"rates={path}"))


def test_a_study_without_validation_losses_chooses_nothing():
    with pytest.raises(InputError, match="study=lr"):
        rates.table([{"status": "ok", "choices": {}, "config": {}}])


PATHS = {"mmlu": MMLU, "winogrande": WINOGRANDE, "hellaswag": HELLASWAG, "piqa": PIQA, "arc_easy": ARC}


def suite(*names: str) -> list[str]:
    paths = [f"task.tasks.{name}.path={PATHS[name]}" for name in names]
    return ["task=paper", f"task.names=[{','.join(names)}]", "task.limit=3", *paths]


def test_a_suite_scores_each_task_as_if_it_were_asked_alone(tmp_path):
    names = ("piqa", "mmlu", "winogrande")
    still = ("trainer.steps=0", "peft=none", "precision=fp32", "reference=off")
    together = cell.ensure(prepared(tmp_path, *still, *suite(*names), "task.shots=[0,1]"))
    alone = []
    for name in names:
        own = prepared(tmp_path, *still, f"task={name}", f"task.path={PATHS[name]}", "task.limit=3", "task.shots=[0,1]")
        alone += cell.ensure(own)["scores"]
    assert together["status"] == "ok"
    assert sorted(map(str, together["scores"])) == sorted(map(str, alone))
    items = pd.read_parquet(next(tmp_path.glob("default/*-" + together["id"])) / records.ITEMS)
    assert set(items["task"]) == set(names)
    assert set(together["tasks"]["tasks"]) == set(names)


def test_a_suite_is_known_by_content_and_its_paths_are_kept(tmp_path):
    from lyapft.evaluation import rebuild_config

    one = prepared(tmp_path, *suite("piqa"), "trainer.steps=0", "peft=none", "reference=off")
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(Path(PIQA).read_bytes())
    moved = prepared(
        tmp_path, *suite("piqa"), f"task.tasks.piqa.path={copy}", "trainer.steps=0", "peft=none", "reference=off"
    )
    assert one.id == moved.id
    record = cell.ensure(moved)
    assert rebuild_config(record).task.tasks.piqa.path == str(copy)
    assert str(copy) not in str(record["config"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.names=[mmlu,sat]", "sat not in this suite"),
        ("task.names=[]", "task.names is empty"),
        ("task.path=x", "task.tasks.NAME.path"),
        ("task.tasks.piqa.path=/nowhere", "/nowhere"),
        ("task.tasks.piqa.limit=0", "task.limit=0"),
    ],
)
def test_a_wrong_suite_is_refused_before_anything_runs(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        prepared(tmp_path, *suite("piqa"), override)
