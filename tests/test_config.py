"""The schema refuses what it does not know, all faults come at once, and the identity follows the science alone."""

from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from lyapft import config
from lyapft.errors import InputError

CONF = Path(__file__).parent.parent / "conf"
GROUPS = ("model", "data", "task", "peft", "precision", "kernel", "probe", "trainer", "logger", "study")
FINGERPRINTS = {"model": "m" * 64, "data": "d" * 64, "task": "t" * 64}


@cache
def _composed(name: str, overrides: tuple[str, ...]):
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def composed(*overrides: str, name: str = "train"):
    """A fresh copy: composing takes longer than most tests."""
    return _composed(name, overrides).copy()


def identity(*overrides: str, threads: int = 2, device: str = "cpu", kernel: str = "cpu", **content: str) -> str:
    cfg = composed(*overrides)
    runs_as = {"threads": threads, "device": device, "kernel": kernel}
    return config.identity(config.science(cfg, FINGERPRINTS | content, runs_as))


@pytest.mark.parametrize(
    ("group", "choice"), [(g, p.stem) for g in GROUPS for p in sorted((CONF / g).glob("*.yaml")) if CONF.is_dir()]
)
def test_every_choice_composes_and_is_typed(group, choice):
    cfg = composed(f"{group}={choice}")
    assert OmegaConf.get_type(cfg) is config.CellConfig
    if group not in ("probe", "study"):
        assert OmegaConf.get_type(cfg[group]) in config.SCHEMAS[group].values()
    if group in ("model", "data", "task", "peft", "precision", "kernel", "logger"):
        assert cfg[group].name == choice  # the record names choices by this


@pytest.mark.parametrize(
    "override",
    [
        "trainer.stepz=3",
        "peft=lorra",
        "trainer.steps=many",
        "seed=None",
        "model.pth=x",
        "precision=fp8",
        "data.max_length=1.5",
    ],
)
def test_unknown_keys_choices_and_wrong_types_are_refused(override):
    with pytest.raises(HydraException):
        composed(override)


def test_every_fault_is_reported_at_once():
    cfg = composed(
        "trainer.steps=-1",
        "trainer.batch_size=0",
        "data.max_length=0",
        "task.shots=[0,0]",
        "seed=-1",
        "trainer.schedule=x",
    )
    found = "\n".join(config.faults(cfg))
    for name in (
        "trainer.steps=-1",
        "trainer.batch_size=0",
        "data.max_length=0",
        "task.shots",
        "seed=-1",
        "trainer.schedule=x",
    ):
        assert name in found
    assert config.faults(composed()) == []


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", ""])
def test_a_study_cannot_leave_the_runs_folder(name):
    cfg = composed()
    cfg.study.name = name
    assert any("study.name" in fault for fault in config.faults(cfg))


def test_a_missing_learning_rate_is_named():
    cfg = composed()
    cfg.model.learning_rate = {}
    assert any("no learning rate for peft=lora" in fault for fault in config.faults(cfg))
    assert any("full fine-tuning reference" in fault for fault in config.faults(cfg))
    cfg.trainer.learning_rate = 1e-3
    assert config.faults(cfg) == []


@pytest.mark.parametrize(
    "override",
    ["runs=elsewhere", "study.name=other", "trainer.progress=false", "logger=csv", "probe=none", "reference=off",
     "data.path=x", "trainer.record_every_s=1", "device=cpu"],
)  # fmt: skip
def test_what_changes_no_number_changes_no_identity(override):
    assert identity(override) == identity()


@pytest.mark.parametrize(
    "override",
    ["seed=1", "replicate=1", "precision=fp16", "peft=none", "peft.r=4", "trainer.steps=7", "trainer.learning_rate=0.1",
     "data.max_length=32", "task.shots=[0]", "model=mamba2_tiny", "kernel=reference", "trainer.max_nonfinite=3"],
)  # fmt: skip
def test_what_can_change_a_number_changes_the_identity(override):
    assert identity(override) != identity()


def test_content_threads_device_and_kernel_are_science():
    base = identity()
    others = [identity(**{key: "x"}) for key in ("model", "data", "task")]
    others += [identity(threads=1), identity(device="cuda"), identity(kernel="torch")]
    assert len({base, *others}) == 7
    assert len(base) == 12
    assert int(base, 16) >= 0


def test_a_rate_that_is_written_out_is_the_same_cell():
    rate = composed().model.learning_rate.lora
    assert identity(f"trainer.learning_rate={rate}") == identity()


def test_references_are_full_precision_twins():
    cfg = composed("precision=fp16", "peft.r=4", "seed=3", "replicate=2")
    twins = config.reference_configs(cfg)
    assert {role: (t.precision.name, t.peft.name) for role, t in twins.items()} == {
        "paper": ("fp32", "none"),
        "precision_only": ("fp32", "lora"),
    }
    for twin in twins.values():
        assert (twin.seed, twin.replicate) == (3, 0)
        assert twin.data == cfg.data
    assert twins["precision_only"].peft.r == 4
    assert config.learning_rate(twins["paper"]) == cfg.model.learning_rate.none
    same = config.reference_configs(composed("precision=fp32", "peft=none"))
    assert same["paper"] == composed("precision=fp32", "peft=none")


def test_a_reference_made_for_a_cell_is_the_cell_that_a_user_would_type():
    twin = config.reference_configs(composed("precision=bf16", "peft=lora"))["paper"]
    typed = composed("precision=fp32", "peft=none")
    assert config.science(twin, FINGERPRINTS, {}) == config.science(typed, FINGERPRINTS, {})


def test_a_preset_acts_on_the_whole_cell_and_a_user_on_the_preset():
    preset = composed("study=pretrain", "model=llama_tiny")
    assert (preset.study.name, preset.reference, preset.model.init) == ("pretrain", "off", "scratch")
    assert (preset.seed, preset.trainer.steps, preset.data.rows) == (1, 3000, 3000 * 24)
    assert composed("study=pretrain", "model=mamba_tiny").seed == 0
    assert composed("study=pretrain", "model=llama_tiny", "seed=5", "reference=auto").seed == 5


def test_unknown_choice_names_the_known_ones():
    with pytest.raises(InputError, match=r"use one of .*lora.*none"):
        config.load_choice("peft", "nonsense")


def test_evaluate_composes():
    cfg = composed("run=runs/a/b", name="evaluate")
    assert cfg.run == "runs/a/b"
    assert cfg.task is None
    assert composed("run=x", "task=mmlu", "task.path=p", name="evaluate").task.path == "p"
