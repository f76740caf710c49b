"""Backbones: shipped, local, hub, scratch and state-spaces' layout; faults before weights; fingerprints by content."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lyapft import backbone
from lyapft.config import ModelConfig, load_choice
from lyapft.errors import InputError
from tests.tolerances import TOL

TINY = ("mamba_tiny", "mamba2_tiny", "pythia_tiny", "llama_tiny")
BIG = {"mamba_130m": 129_135_360, "mamba2_130m": 128_989_632, "pythia_160m": 162_322_944}  # published parameter counts
VOCABULARY = 40


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def scratch(name: str, tokenizer_folder: Path, **dims: object) -> ModelConfig:
    """A shipped choice, built from its dimensions."""
    cfg = load_choice("model", name)
    cfg.init = "scratch"
    cfg.tokenizer = str(tokenizer_folder)
    cfg.dims.update(dims)
    return cfg


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A small Llama in transformers' layout, with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    base = backbone.load(
        scratch("llama_tiny", tokenizer_folder, hidden_size=16, intermediate_size=16, vocab_size=VOCABULARY)
    )
    base.model.config.trained_length = 64
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def local(folder: Path, **fields: object) -> ModelConfig:
    return ModelConfig(name="hf", path=str(folder), **fields)  # type: ignore[arg-type]


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


# ---- from dimensions


@pytest.mark.parametrize("name", TINY)
def test_tiny_dimensions_build_a_small_float32_model_with_room_for_long_contexts(
    name: str, tokenizer_folder: Path
) -> None:
    torch.manual_seed(0)
    base = backbone.load(scratch(name, tokenizer_folder))
    size = sum(p.numel() for p in base.model.parameters())
    assert 0.2e6 < size < 0.5e6  # under 2 MB in float32
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert base.max_positions is None or base.max_positions >= 4096
    assert (base.max_positions is None) == name.startswith("mamba")
    head, embedding = base.model.get_output_embeddings(), base.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == (name != "pythia_tiny")
    tokens = torch.randint(VOCABULARY, (2, 9))
    assert base.model(input_ids=tokens).logits.shape == (2, 9, 1024)


@pytest.mark.parametrize("name", BIG)
def test_dimensions_of_published_models_have_their_published_size(name: str) -> None:
    cfg = load_choice("model", name)
    from transformers import AutoConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**backbone.source.plain_dims(cfg)))
    assert sum(p.numel() for p in model.parameters()) == BIG[name]


def test_scratch_weights_follow_the_seed_and_train_every_embedding(tokenizer_folder: Path) -> None:
    cfg = scratch("llama_tiny", tokenizer_folder)
    torch.manual_seed(3)
    first = backbone.load(cfg)
    torch.manual_seed(3)
    second = backbone.load(cfg)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    # padding with the end token must not freeze the end token's own embedding
    assert first.tokenizer.pad_token_id == first.tokenizer.eos_token_id
    assert first.model.get_input_embeddings().padding_idx is None


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"hiden_size": 3}, "model.dims.hiden_size is not a setting of Mamba2Config"),
        ({"num_heads": 5}, "hidden_size"),
        ({"model_type": "nothing"}, "'nothing'"),
    ],
)
def test_wrong_dimensions_are_named(dims: dict[str, object], message: str, tokenizer_folder: Path) -> None:
    (fault,) = backbone.faults(scratch("mamba2_tiny", tokenizer_folder, **dims))
    assert message in fault


# ---- from a folder


def test_a_local_checkpoint_gives_the_weights_that_were_saved(checkpoint: Path) -> None:
    base = backbone.load(local(checkpoint))
    expected = load_file(checkpoint / "model.safetensors")
    actual = dict(base.model.named_parameters())
    assert expected.keys() <= actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value)
    assert base.architecture == "llama"
    assert (base.max_positions, base.trained_length) == (4096, 64)
    assert backbone.max_positions(local(checkpoint)) == 4096
    assert base.hash == backbone.fingerprint(local(checkpoint))


def test_half_precision_checkpoints_are_loaded_in_float32(copied: Path) -> None:
    weights = {k: v.half() for k, v in load_file(copied / "model.safetensors").items()}
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    base = backbone.load(local(copied))
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert torch.equal(base.model.model.norm.weight, weights["model.norm.weight"].float())


def test_a_model_without_a_padding_token_pads_with_its_end_token_and_masks_it(checkpoint: Path) -> None:
    base = backbone.load(local(checkpoint))
    assert base.tokenizer.pad_token == base.tokenizer.eos_token
    batch = base.tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    alone = base.model(**base.tokenizer(["w4"], return_tensors="pt")).logits
    assert_close(base.model(**batch).logits[1, :1], alone[0], **TOL[torch.float32])


def test_a_bin_checkpoint_is_read_as_plain_tensors_and_a_pickle_with_code_is_refused(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    base = backbone.load(local(copied))
    assert torch.equal(base.model.model.norm.weight, tensors["model.norm.weight"])

    witness = copied / "ran"
    torch.save(tensors | {"lm_head.weight": Malicious(witness)}, copied / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        backbone.load(local(copied))
    assert not witness.exists()


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.witness),)


def test_the_malicious_pickle_of_these_tests_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


# ---- fingerprints


def test_fingerprint_follows_content_and_not_place(checkpoint: Path, copied: Path) -> None:
    original = backbone.fingerprint(local(checkpoint))
    assert backbone.fingerprint(local(copied)) == original
    (copied / "README.md").write_text("notes")
    assert backbone.fingerprint(local(copied)) == original


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_fingerprint_changes_with_each_input(name: str, checkpoint: Path, copied: Path) -> None:
    if name == "model.safetensors":
        weights = load_file(copied / name)
        weights["model.norm.weight"][0] += 1e-3
        save_file(weights, copied / name, metadata={"format": "pt"})
    elif name == "config.json":
        config = json.loads((copied / name).read_text())
        (copied / name).write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    else:
        text = (copied / name).read_text()
        (copied / name).write_text(text.replace("w39", "w93"))
    assert backbone.fingerprint(local(copied)) != backbone.fingerprint(local(checkpoint))


def test_fingerprint_of_scratch_follows_dimensions(tokenizer_folder: Path) -> None:
    same = [backbone.fingerprint(scratch("mamba_tiny", tokenizer_folder)) for _ in range(2)]
    assert same[0] == same[1]
    assert backbone.fingerprint(scratch("mamba_tiny", tokenizer_folder, state_size=4)) != same[0]


# ---- faults


def test_every_fault_of_a_folder_is_reported_at_once(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    for file in copied.glob("tokenizer*"):
        file.unlink()
    found = backbone.faults(local(copied))
    assert len(found) == 2
    assert "holds no weights: expected model.safetensors or pytorch_model.bin" in found[0]
    assert "holds no tokenizer" in found[1]
    assert "model.tokenizer=FOLDER" in found[1]
    with pytest.raises(InputError, match=r"(?s)no weights.*no tokenizer"):
        backbone.load(local(copied))


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


def custom_code(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')


def cut_weights_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "is not valid JSON"),
        (unknown_architecture, "'vit' is no causal language model"),
        (custom_code, "model.trust_remote_code=true"),
        (cut_weights_short, "damaged or cut short"),
        (empty_weights, "is empty"),
        (missing_shard, "is missing though the index beside it names it"),
    ],
)
def test_damage_is_found_before_a_weight_is_read(damage, message: str, copied: Path) -> None:
    damage(copied)
    (fault,) = backbone.faults(local(copied))
    assert message in fault
    assert str(copied) in fault


def test_a_checkpoint_of_another_architecture_is_refused_under_a_models_name(checkpoint: Path) -> None:
    cfg = load_choice("model", "mamba_130m")
    cfg.path = str(checkpoint)
    (fault,) = backbone.faults(cfg)
    assert "model=mamba_130m is a mamba model" in fault
    assert f"model=hf model.path={checkpoint}" in fault


def test_a_missing_folder_a_file_and_an_unreachable_hub_name_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "file").write_text("x")
    cases = {
        str(tmp_path / "nowhere"): "there is no such folder",
        str(tmp_path / "file"): "is a file: give the folder",
        "state-spaces/mamba-130m-hf": "hf download state-spaces/mamba-130m-hf --local-dir FOLDER",
    }
    for path, message in cases.items():
        (fault,) = backbone.faults(ModelConfig(name="hf", path=path))
        assert message in fault, fault
        assert path in fault


def test_hf_without_a_path_and_a_name_that_does_not_ship_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lyapft.backbone.source.SHIPPED", tmp_path)
    assert "needs model.path" in backbone.faults(load_choice("model", "hf"))[0]
    (fault,) = backbone.faults(load_choice("model", "mamba_tiny"))
    assert "no checkpoint that ships" in fault
    assert "model.init=scratch" in fault


def test_weights_that_lack_a_tensor_are_not_filled_with_random_numbers(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors of the model, first model\.layers\.1\.mlp\.up_proj\.weight"):
        backbone.load(local(copied))


def test_weights_of_another_shape_and_a_tokenizer_that_is_too_large_are_refused(
    copied: Path, tokenizer_folder: Path
) -> None:
    with pytest.raises(InputError, match=f"{VOCABULARY} tokens but model=mamba_tiny embeds only 20"):
        backbone.load(scratch("mamba_tiny", tokenizer_folder, vocab_size=20))
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(17)
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot be loaded"):
        backbone.load(local(copied))


# ---- what ships


@pytest.mark.parametrize("name", TINY)
def test_shipped_checkpoints_load_and_are_small(name: str) -> None:
    folder = backbone.source.SHIPPED / name
    if not folder.is_dir():
        pytest.skip(f"no shipped checkpoint of {name} yet")
    cfg = load_choice("model", name)
    base = backbone.load(cfg)
    actual = base.model.config.to_dict()
    assert {key: actual[key] for key in cfg.dims} == backbone.source.plain_dims(cfg)
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 2 * 2**20
    assert len(base.tokenizer) <= base.model.config.vocab_size
    assert base.max_positions is None or base.max_positions >= 4096
    assert base.tokenizer.pad_token_id is not None
    text = "abc -> cba"
    assert base.tokenizer.decode(base.tokenizer(text, add_special_tokens=False).input_ids) == text
