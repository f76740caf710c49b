"""The model choices of conf/: each composes into a cell, has the published size, and takes the default adapters."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lyapft import config
from lyapft.peft.targets import LLAMA_LIKE, resolve_targets

# Parameters as the checkpoints on the hub have them, tied matrices counted once.
PARAMETERS = {
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1.4b": 1_372_178_432,
    "mamba_2.8b": 2_768_345_600,
    "mamba2_130m": 128_989_632,
    "mamba2_370m": 368_346_624,
    "mamba2_780m": 780_161_280,
    "mamba2_1.3b": 1_343_757_312,
    "mamba2_2.7b": 2_702_599_680,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1.4b": 1_414_647_808,
    "pythia_2.8b": 2_775_208_960,
    "olmo_1b": 1_176_764_416,
    "tinyllama_1.1b": 1_100_048_384,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1.7b": 1_711_376_384,
}
ADAPTED_PER_LAYER = {"mamba": 3, "mamba2": 2, "gpt_neox": 4, "llama": 7, "olmo": 7}  # and Mamba's embeddings
OPENELM = ("openelm_270m", "openelm_450m", "openelm_1.1b", "openelm_3b")
TINY = ("mamba_tiny", "mamba2_tiny", "pythia_tiny", "llama_tiny", "hf")


def test_every_choice_of_conf_is_tested(root: Path) -> None:
    assert {path.stem for path in (root / "conf" / "model").glob("*.yaml")} == {*PARAMETERS, *OPENELM, *TINY}


@pytest.mark.parametrize("name", [*PARAMETERS, *OPENELM])
def test_a_choice_composes_into_a_valid_cell(name: str, root: Path) -> None:
    config.register()
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[f"model={name}"])
    assert config.faults(cfg) == []
    assert cfg.model.name == name
    assert not cfg.model.trust_remote_code
    assert {"none", "lora"} <= set(cfg.model.learning_rate)


@pytest.mark.parametrize("name", PARAMETERS)
def test_dimensions_make_the_published_model_and_adapters_find_their_layers(name: str) -> None:
    dims = OmegaConf.to_container(config.load_choice("model", name).dims)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**dims))
    model.tie_weights()
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    kind = model.config.model_type
    found = resolve_targets(model, LLAMA_LIKE if kind == "olmo" else "auto")
    embeddings = kind.startswith("mamba")
    assert len(found) == ADAPTED_PER_LAYER[kind] * model.config.num_hidden_layers + embeddings
