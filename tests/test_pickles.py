"""Pickles as models, adapters, checkpoints and data sets are refused unread."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from lyapft import (
    backbone,
    cell,
    data,
    recurrence,
    tasks,
)
from lyapft.config import ModelConfig
from lyapft.errors import InputError
from lyapft.peft import Lora
from lyapft.peft.base import ADAPTER_FOLDER, TENSORS
from lyapft.resume import CheckpointFiles
from tests.test_cell import prepared
from tests.test_cli import ROOT, SMALL, typed  # noqa: F401 - a fixture

SHIPPED = ROOT / "lyapft" / "checkpoints" / "mamba_tiny"


class Mine:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def payloads(mark: Path) -> dict[str, bytes]:
    zipped, old, array, arrays = (io.BytesIO() for _ in range(4))
    torch.save({"w": Mine(mark)}, zipped)
    torch.save({"w": Mine(mark)}, old, _use_new_zipfile_serialization=False)
    objects = np.array([Mine(mark)], dtype=object)
    np.save(array, objects)
    np.savez(arrays, w=objects)
    return {
        "pickle": pickle.dumps(Mine(mark), protocol=2),
        "torch": zipped.getvalue(),
        "torch before 1.6": old.getvalue(),
        "numpy": array.getvalue(),
        "numpy archive": arrays.getvalue(),
    }


KINDS_OF_PICKLE = ["pickle", "torch", "torch before 1.6", "numpy", "numpy archive"]


@pytest.fixture(params=KINDS_OF_PICKLE)
def payload(request, tmp_path):
    """Bytes that leave `touched` when they are unpickled; none of the tests may leave it."""
    mark = tmp_path / "touched"
    content = payloads(mark)[request.param]
    yield content
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS_OF_PICKLE)
def test_the_payloads_are_live(tmp_path, kind):
    mark, read = tmp_path / "touched", {"pickle": pickle.load, "torch": torch_load, "numpy": numpy_load}
    read[kind.split()[0]](io.BytesIO(payloads(mark)[kind]))
    assert mark.exists()


def torch_load(file: io.BytesIO) -> None:
    torch.load(file, weights_only=False)


def numpy_load(file: io.BytesIO) -> None:
    found = np.load(file, allow_pickle=True)
    if isinstance(found, np.lib.npyio.NpzFile):
        found["w"]


def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in SHIPPED.glob("*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_as_model_is_refused_unread(payload, tmp_path, name):
    folder = model_folder(tmp_path)
    (folder / name).write_bytes(payload)
    with pytest.raises(InputError, match=r"cannot be loaded|damaged"):
        backbone.load(ModelConfig(name="hf", path=str(folder)))


def test_a_pickle_beside_safetensors_is_not_touched(payload, tmp_path):
    folder = model_folder(tmp_path)
    shutil.copy(SHIPPED / "model.safetensors", folder)
    for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(payload)
    assert backbone.load(ModelConfig(name="hf", path=str(folder))).hash


def test_an_adapter_in_a_model_folder_is_refused(payload, tmp_path):
    folder = model_folder(tmp_path)
    shutil.copy(SHIPPED / "model.safetensors", folder)
    (folder / "adapter_model.bin").write_bytes(payload)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        backbone.load(ModelConfig(name="hf", path=str(folder)))


def test_a_pickle_as_checkpoint_of_state_spaces_is_refused_unread(payload, tmp_path):
    folder = model_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps({"d_model": 96, "n_layer": 2, "vocab_size": 1024, "ssm_cfg": {}}))
    (folder / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        backbone.load(ModelConfig(name="hf", path=str(folder)))


@pytest.mark.parametrize("suffix", ["pkl", "pt", "npz", "arrow", "json", "parquet"])
@pytest.mark.parametrize("kind", [data.Alpaca, data.Sharegpt, data.TextFile])
def test_a_pickle_as_data_set_is_refused_unread(payload, tmp_path, kind, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(payload)
    with pytest.raises(InputError):
        kind(name="x", path=str(path)).fingerprint()


@pytest.mark.parametrize("named", ["a pickle", "a type that was one"])
def test_pickles_inside_of_a_parquet_file_are_refused_unread(payload, tmp_path, named):
    """Columns of bytes, and Arrow's extension types, which whoever read them unpickled before its release 14."""
    content = {name: pa.array([payload] * 3) for name in ("instruction", "input", "output")}
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    fields = [pa.field(name, pa.binary(), metadata=metadata if named != "a pickle" else None) for name in content]
    pq.write_table(pa.table(list(content.values()), schema=pa.schema(fields)), tmp_path / "rows.parquet")
    with pytest.raises(InputError):
        data.Alpaca(name="x", path=str(tmp_path / "rows.parquet")).fingerprint()


def test_a_pickle_as_tokenised_data_is_passed_over_unread(payload, tmp_path, caplog):
    source = data.Alpaca(name="x", path=str(ROOT / "tests" / "fixtures" / "alpaca.jsonl"))
    settings = {"content": source.fingerprint()}
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    first = data.tokenised(source, tokenizer, 64, settings, tmp_path / "tokens")
    (kept,) = (tmp_path / "tokens").glob("*.safetensors")
    kept.write_bytes(payload)
    again = data.tokenised(source, tokenizer, 64, settings, tmp_path / "tokens")
    assert np.array_equal(first.ids, again.ids)
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("kind", [tasks.Winogrande, tasks.Hellaswag, tasks.Piqa, tasks.Arc])
def test_a_pickle_as_task_is_refused_unread(payload, tmp_path, kind):
    (tmp_path / "rows.jsonl").write_bytes(payload)
    with pytest.raises(InputError):
        kind("x", str(tmp_path / "rows.jsonl"), [0]).queries(0)


@pytest.mark.parametrize("payload", KINDS_OF_PICKLE[:2], indirect=True)
def test_a_pickle_as_checkpoint_of_a_training_is_passed_over_unread(payload, tmp_path, caplog):
    one = prepared(tmp_path / "runs", *SMALL, "reference=off")
    files = CheckpointFiles(one.folder, one.id)
    one.folder.mkdir(parents=True)
    for path in (files.newest, files.before):
        path.write_bytes(payload)
    record = cell.ensure(one)
    assert (record["status"], record["resumed"]["at_steps"]) == ("ok", [])
    assert caplog.text.count("cannot be read") == 2


def test_a_pickle_as_adapter_of_a_run_is_refused_unread(payload, tmp_path):
    base = backbone.load(ModelConfig(name="mamba_tiny"))
    peft = Lora(name="lora", targets=["in_proj"], min_coverage=1.0, memory_buffer="tied")
    peft.attach(base, recurrence.install(base.model, "torch"))
    peft.save(tmp_path)
    peft.load(tmp_path)
    (tmp_path / ADAPTER_FOLDER / TENSORS).write_bytes(payload)
    with pytest.raises(InputError, match="Only safetensors are read"):
        peft.load(tmp_path)
