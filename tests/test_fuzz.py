"""Files and settings that anyone may hand over, or a dying machine may leave: read, or refused by a clear error.

Arbitrary bytes, cut and altered files, and JSON whose parts are of another kind than expected. Anything but a value or
an InputError is a failure. `python -m tests.campaigns.fuzz MINUTES` does the same for longer, with other examples.
"""

import copy
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file

from lyapft import backbone, cell, config, data, evaluation, precision, rates, records, recurrence, tasks
from lyapft.data.streaming import good_examples
from lyapft.errors import InputError
from lyapft.experiments import stall
from lyapft.plan import file as plan_file
from lyapft.report import experiments, summary_table
from lyapft.report.cells import load_study
from lyapft.resume import CheckpointFiles
from lyapft.resume.files import CELL, CHECKSUM, STATE, checksum
from tests.test_cell import prepared
from tests.test_config import composed
from tests.tiny import FIXTURES

FEW = settings(max_examples=10, phases=[Phase.generate])  # of what loads a model; no smaller example is sought
SHIPPED = Path(backbone.__file__).parent.parent / "checkpoints" / "mamba_tiny"

# -- what is handed over

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "0", "\x00", "é"])
)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
DEEP = b"[" * 5000


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The path of every part of a JSON tree but its root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in [(*path, key), *places(value, (*path, key))]]


@st.composite
def altered_tree(draw, tree: Any) -> Any:
    """A JSON tree with one to three of its parts replaced by something else, or taken away."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        known = places(tree)
        if not known:
            break
        *path, last = draw(st.sampled_from(known))
        parent = tree
        for key in path:
            parent = parent[key]
        if draw(st.booleans()):
            parent[last] = draw(trees)
        else:
            del parent[last]
    return tree


@st.composite
def altered_bytes(draw, content: bytes) -> bytes:
    """A file that was cut off, or has some bytes wrong, doubled or lost."""
    found = bytearray(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(found)))
        found[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(found)


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def files(valid: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that may be handed over as this file."""
    return altered_bytes(valid) | st.binary(max_size=64) | trees.map(as_json) | st.just(DEEP)


def json_files(tree: Any) -> st.SearchStrategy[bytes]:
    return files(as_json(tree)) | altered_tree(tree).map(as_json)


def clear(read: Callable[[], Any]) -> Any:
    """What was read; None where it was refused by an error that says something."""
    try:
        return read()
    except InputError as error:
        print(error)  # a message that cannot be shown is none
        return None


def in_a_folder(read: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return clear(lambda: read(Path(folder)))


# -- records


@cache
def a_run() -> Path:
    """The folder of a finished cell."""
    one = prepared(Path(tempfile.mkdtemp()), "reference=off", "study.name=fuzz")
    assert cell.ensure(one)["status"] == "ok"
    return one.folder


def contents(name: str) -> bytes:
    return (a_run() / name).read_bytes()


@given(st.data())
def test_records(data_of):
    content = data_of.draw(json_files(json.loads(contents(records.RECORD))))

    def read(folder):
        (folder / "cell").mkdir()
        (folder / "cell" / records.RECORD).write_bytes(content)
        found = records.load_study(folder)
        assert found
        summary_table([record for _, record in found])
        return found

    in_a_folder(read)


@settings(max_examples=8)
@given(st.data())
def test_records_that_are_merged_or_scored(data_of):
    """What is built of one: of a wrong setting nothing is, and the file is named."""
    record = json.loads(contents(records.RECORD))
    used = {key: record[key] for key in ("schema_version", "id", "name", "status", "paths", "files")}
    used |= {"config": {group: record["config"][group] for group in (*evaluation.REBUILT, "kernel")}}
    content = data_of.draw(altered_tree(used))

    def read(folder):
        (folder / records.RECORD).write_bytes(as_json(content))
        _, found = evaluation.finished(folder)
        return backbone.faults(found.model) or precision.faults(found.precision, "cpu") or instantiate(found.peft)

    in_a_folder(read)


@given(st.data())
def test_tables_of_a_run(data_of):
    name = data_of.draw(st.sampled_from([records.STEPS, records.ITEMS, records.STABILITY]))
    content = data_of.draw(altered_bytes(contents(name)) | st.binary(max_size=64))

    def read(folder):
        shutil.copytree(a_run(), folder / "cell")
        (folder / "cell" / name).write_bytes(content)
        return load_study(folder)

    assert in_a_folder(read) is not None  # a broken table is left out, with a note


@given(st.data())
def test_plans(data_of):
    entry = {
        "key": "k",
        "recipe": "r",
        "role": "cell",
        "choices": {"model": "m"},
        "seed": 0,
        "replicate": 0,
        "threads": 1,
    }
    content = data_of.draw(json_files([entry, entry | {"key": "l"}]))

    def read(folder):
        (folder / plan_file.FILE).write_bytes(content)
        return plan_file.summary(plan_file.states(plan_file.load(folder), [json.loads(contents(records.RECORD))]))

    in_a_folder(read)


@cache
def an_experiment() -> dict[str, Any]:
    """The record of a small one."""
    found = stall.run(step=1e-3, starts=[0.0], tokens=200, draws=2, sweep=[1e-3], seed=0)
    return json.loads(json.dumps({"name": "stall", "rows": found.rows, "series": found.series}))


@given(st.data())
def test_experiments(data_of):
    content = data_of.draw(json_files(an_experiment()))

    def read(folder):
        shutil.copytree(a_run(), folder / "cell")
        (folder / records.EXPERIMENTS).mkdir()
        (folder / records.EXPERIMENTS / "stall-0.json").write_bytes(content)
        study = load_study(folder)
        for one in study.experiments:
            clear(lambda one=one: experiments.figures(one))
        return study

    assert in_a_folder(read) is not None


# -- checkpoints


STATES = {"loops": [1, (2.0, None)], "tensor": torch.arange(6).view(2, 3), "rows": torch.ones(3).numpy(), 3: "x"}


@given(st.data())
def test_checkpoints(data_of):
    with tempfile.TemporaryDirectory() as folder:
        kept = CheckpointFiles(Path(folder), "1f")
        kept.save_checkpoint(STATES, kept.newest)
        content = data_of.draw(files(kept.newest.read_bytes()))
        kept.newest.write_bytes(content)
        kept.latest()
        clear(lambda: kept.load_checkpoint(kept.newest))


@given(
    st.one_of(trees, altered_tree({"#": "dict", "items": [["a", {"#": "tensor", "name": "0"}], [3, {"#": "tuple"}]]}))
)
def test_checkpoints_whose_checksum_is_right(tree):
    with tempfile.TemporaryDirectory() as folder:
        kept, tensors, text = CheckpointFiles(Path(folder), "1f"), {"0": torch.ones(2)}, json.dumps(tree)
        save_file(tensors, kept.newest, {STATE: text, CELL: "1f", CHECKSUM: checksum("1f", text, tensors)})
        kept.latest()
        clear(lambda: kept.load_checkpoint(kept.newest))


# -- settings


@given(st.data())
def test_files_of_learning_rates(data_of):
    content = data_of.draw(files(b"mamba_tiny:\n  lora: 0.001\n  none: 1e-4\n") | st.text(max_size=40).map(str.encode))

    def read(folder):
        (folder / "rates.yaml").write_bytes(content)
        cfg = composed()
        cfg.rates = f"{folder}/rates.yaml"
        return rates.applied(cfg)

    in_a_folder(read)


SETTINGS = sorted(
    f"{group}.{key}"
    for group, node in composed("guard=stop", "probe=all", "logger=wandb").items()
    if OmegaConf.is_config(node)
    for key in node
    if not str(key).startswith("_")
)


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(SETTINGS), trees, min_size=1, max_size=3))
def test_settings(values):
    try:
        cfg = composed("guard=stop", "probe=all", "logger=wandb")
        for key, value in values.items():
            OmegaConf.update(cfg, key, value)
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # what Hydra shows as the error of a setting
        return
    if not clear(lambda: config.faults(cfg)):
        config.identity(config.science(cfg, {}, {}))


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=3))
def test_command_lines(arguments):
    try:
        composed(*arguments)
    except (HydraException, OmegaConfBaseException) as error:
        print(error)


@pytest.mark.parametrize("override", ["trainer.betas=[[1],2]", "task.shots=[[1],2]"])
def test_lists_within_lists_of_numbers_are_named(override):  # found by `test_settings`
    assert any(fault.startswith(override.partition("=")[0]) for fault in config.faults(composed(override)))


# -- data and tasks


EXAMPLES = {
    "Alpaca": [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "a", "input": "", "output": "b"},
    ],
    "Sharegpt": [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}],
}


@settings(max_examples=60)
@given(st.data())
def test_data(data_of):
    kind = data_of.draw(st.sampled_from(sorted(EXAMPLES)))
    content = data_of.draw(json_files(EXAMPLES[kind]))
    fraction = data_of.draw(st.sampled_from([0.01, 1.0]))

    def read(folder):
        (folder / "data.json").write_bytes(content)
        source = getattr(data, kind)("name", str(folder / "data.json"), max_bad_fraction=fraction)
        source.fingerprint()
        return list(source.examples())

    in_a_folder(read)


@cache
def streamable() -> dict[str, bytes]:
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(EXAMPLES["Alpaca"]), table)
    return {"jsonl": b"\n".join(map(as_json, EXAMPLES["Alpaca"])), "parquet": table.getvalue()}


@settings(max_examples=60)
@given(st.data())
def test_streamed_data(data_of):
    suffix = data_of.draw(st.sampled_from(sorted(streamable())))
    content = data_of.draw(files(streamable()[suffix]))
    fraction = data_of.draw(st.sampled_from([0.01, 1.0]))

    def read(folder):
        (folder / f"data.{suffix}").write_bytes(content)
        source = data.Alpaca("name", str(folder), streaming=True, max_bad_fraction=fraction)
        source.fingerprint()
        return good_examples(source, iter(source.reader()), 9)

    in_a_folder(read)


@given(st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_text(content):
    def read(folder):
        (folder / "data.txt").write_bytes(content)
        return [data.TextFile("text", str(folder / "data.txt"), streaming=on).fingerprint() for on in (False, True)]

    in_a_folder(read)


TASKS = {"Winogrande": "winogrande", "Hellaswag": "hellaswag", "Piqa": "piqa", "Arc": "arc"}


@settings(max_examples=60)
@given(st.data())
def test_task_files(data_of):
    kind = data_of.draw(st.sampled_from(sorted(TASKS)))
    lines = (FIXTURES / f"{TASKS[kind]}.jsonl").read_bytes().splitlines()[:6]
    line = data_of.draw(st.sampled_from(range(len(lines))))
    lines[line] = data_of.draw(json_files(json.loads(lines[line])))
    fraction = data_of.draw(st.sampled_from([0.01, 1.0]))

    def read(folder):
        (folder / "task.jsonl").write_bytes(b"\n".join(lines))
        task = getattr(tasks, kind)(TASKS[kind], str(folder / "task.jsonl"), [0, 1], max_bad_fraction=fraction)
        task.fingerprint()
        return [task.queries(shots) for shots in (0, 1)]

    in_a_folder(read)


@given(st.data())
def test_mmlu_folders(data_of):
    paths = sorted(path.relative_to(FIXTURES / "mmlu") for path in (FIXTURES / "mmlu").rglob("*.csv"))
    path = data_of.draw(st.sampled_from(paths))
    content = data_of.draw(files((FIXTURES / "mmlu" / path).read_bytes()))

    def read(folder):
        shutil.copytree(FIXTURES / "mmlu", folder / "mmlu")
        (folder / "mmlu" / path).write_bytes(content)
        task = tasks.Mmlu("mmlu", str(folder / "mmlu"), [0, 1])
        task.fingerprint()
        return [task.queries(shots) for shots in (0, 1)]

    in_a_folder(read)


# -- weights


@FEW
@given(st.data())
def test_model_folders(data_of):
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    name = data_of.draw(st.sampled_from(names))
    valid = (SHIPPED / name).read_bytes()
    content = data_of.draw(files(valid) if name == "model.safetensors" else json_files(json.loads(valid)))

    def read(folder):
        shutil.copytree(SHIPPED, folder / "model")
        (folder / "model" / name).write_bytes(content)
        cfg = composed(f"model.path={folder}/model").model
        backbone.fingerprint(cfg)
        backbone.max_positions(cfg)
        backbone.skeleton(cfg)
        return backbone.load(cfg)

    in_a_folder(read)


@FEW
@given(st.data())
def test_adapters(data_of):
    home = a_run() / "adapter"
    name = data_of.draw(st.sampled_from(sorted(path.name for path in home.iterdir())))
    valid = (home / name).read_bytes()
    content = data_of.draw(json_files(json.loads(valid)) if name.endswith(".json") else files(valid))

    def read(folder):
        shutil.copytree(home, folder / "adapter")
        (folder / "adapter" / name).write_bytes(content)
        strategy().load(folder)

    in_a_folder(read)


@cache
def strategy():
    cfg = composed()
    base = backbone.load(cfg.model)
    found = instantiate(cfg.peft)
    found.attach(base, recurrence.install(base.model))
    return found


TARGETS = [value for value in dict(globals()).values() if hasattr(value, "hypothesis")]
