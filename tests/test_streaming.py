"""Data that are read as they are needed: the same rows, each once a pass, from any place on, in little memory."""

import json
import multiprocessing
import os
import signal
import subprocess
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lyapft import cell, records, tasks
from lyapft.data import Alpaca, Sharegpt, Stream, Table, TextFile, build, hub, pack, readers
from lyapft.errors import InputError
from lyapft.probes import StepRecorder
from lyapft.resume.tree import pack as packed
from lyapft.resume.tree import unpack
from tests.test_cell import prepared, same_weights
from tests.test_data import tokenizer
from tests.test_resume import cut, same

__all__ = ["tokenizer"]  # a fixture
LENGTH = 96
KINDS = {"alpaca": Alpaca, "parquet": Alpaca, "sharegpt": Sharegpt, "text": TextFile}


def alpaca_rows(n: int) -> list[dict[str, str]]:
    return [{"instruction": f"Count to {i}" + "." * (i % 7), "input": "", "output": f"{i} é\u2028"} for i in range(n)]


def written(folder: Path, kind: str, n: int = 23) -> str:
    """Some rows in two files."""
    folder.mkdir(exist_ok=True)
    rows = alpaca_rows(n)
    for name, part in (("a", rows[: n // 3]), ("b", rows[n // 3 :])):
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=4)
        elif kind == "text":
            (folder / f"{name}.txt").write_text("".join(f"{row['output']} and more\n" for row in part), "utf-8")
        else:
            turns = [
                [{"from": "human", "value": r["instruction"]}, {"from": "gpt", "value": r["output"]}] for r in part
            ]
            lines = part if kind == "alpaca" else [{"conversations": turn} for turn in turns]
            text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
            (folder / f"{name}.jsonl").write_text(text, "utf-8")
    return str(folder)


def table(kind: str, path: str, **options) -> Table:
    return KINDS[kind](kind, path, streaming=True, **options)


def stream(source: Table, tokenizer, packing: bool = False) -> Stream:
    return Stream(source, tokenizer, LENGTH, source.fingerprint(), packing)


def drawn_from(batches) -> list[dict]:
    return [{name: value.tolist() for name, value in batch.items()} for batch in batches]


@pytest.fixture
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {kind: written(root / kind, kind) for kind in KINDS}


# readers


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_goes_on_from_any_place(folders, kind, monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 40)
    whole = list(table(kind, folders[kind]).reader())
    assert len(whole) > 5
    for first in range(len(whole) + 1):
        reader, again = (table(kind, folders[kind]).reader() for _ in range(2))
        assert list(islice(reader, first)) == whole[:first]
        again.load_state_dict(json.loads(json.dumps(reader.state_dict())))
        assert list(again) == whole[first:]


def test_streamed_rows_of_the_hub_go_on_from_any_place_too(tmp_path, folders, tokenizer, monkeypatch):
    asked = []

    def local(name, split, revision, streaming):
        asked.append((name, split, revision, streaming))
        return datasets.load_dataset("parquet", data_dir=folders["parquet"], split=split, streaming=True)

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "load_dataset", local)
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda api, name, timeout: type("Info", (), {"sha": "1f"}))
    far, near = (table("alpaca", path, shuffle_buffer=4) for path in ("someone/alpaca", folders["parquet"]))
    assert far.fingerprint() == "1f"
    expected = drawn_from(stream(near, tokenizer).batches(3, 20, seed=1))
    loader = stream(far, tokenizer).batches(3, 20, seed=1)
    assert drawn_from(islice(loader, 7)) == expected[:7]
    resumed = stream(far, tokenizer).batches(3, 20, seed=1)
    resumed.load_state_dict(unpack(*packed(loader.state_dict())))
    assert drawn_from(resumed) == expected[7:]
    assert set(asked) == {("someone/alpaca", "train", "1f", True)}


def test_a_hub_that_cannot_be_asked_is_named():
    with pytest.raises(InputError, match=r"nobody/nothing is no local file or folder.*network"):
        table("alpaca", "nobody/nothing").fingerprint()


# rows


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_holds_everything_gives_the_batches_of_rows_in_memory(folders, tokenizer, kind, packing):
    """Rows, order, numbers and counts, over several passes."""
    source = KINDS[kind](kind, folders[kind])
    rows = build(source, tokenizer, LENGTH)
    streamed = stream(table(kind, folders[kind]), tokenizer, packing)
    memory = pack(rows, LENGTH) if packing else rows
    assert drawn_from(streamed.batches(5, 14, seed=3)) == drawn_from(memory.batches(5, 14, seed=3))
    first = next(iter(streamed.windows(streamed.start)))
    assert first.behind.counts == {key: rows.record()[key] for key in first.behind.counts}


def rows_of(batches) -> Counter:
    found = Counter()
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found[tuple(ids[mask.bool()].tolist())] += 1
    return found


@pytest.mark.parametrize("buffer", [1, 4, 7, 22, 23, 100])
@pytest.mark.parametrize("limit", [None, 9])
def test_every_row_comes_once_a_pass_in_an_order_of_its_own(folders, tokenizer, buffer, limit):
    rows = build(Alpaca("alpaca", folders["alpaca"], limit=limit), tokenizer, LENGTH)
    everything = Counter(tuple(rows[i]["input_ids"].tolist()) for i in range(len(rows)))
    streamed = stream(table("alpaca", folders["alpaca"], shuffle_buffer=buffer, limit=limit), tokenizer)
    drawn = list(streamed.batches(1, 3 * len(rows), seed=2))
    passes = [drawn[start : start + len(rows)] for start in range(0, len(drawn), len(rows))]
    assert [rows_of(one) for one in passes] == [everything] * 3
    orders = [[int(batch["rows"]) for batch in one] for one in passes]
    assert all(sorted(order) == list(range(len(rows))) for order in orders)
    assert (len({tuple(order) for order in orders}) == 3) == (buffer > 1)
    moved = [abs(row - place) for order in orders for place, row in enumerate(order)]
    assert max(moved) < buffer
    other = [int(batch["rows"]) for batch in streamed.batches(1, len(rows), seed=3)]
    assert (other != orders[0]) == (buffer > 1)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_processes_together_draw_what_one_would_from_any_place_on(folders, tokenizer, ranks, packing):
    def loader(rank: int = 0, of: int = 1):
        source = stream(table("alpaca", folders["alpaca"], shuffle_buffer=5), tokenizer, packing)
        return source.batches(2, 12 * ranks, seed=1).share(rank, of)

    whole = drawn_from(loader())
    shares = [loader(rank, ranks) for rank in range(ranks)]
    drawn = [drawn_from(share) for share in shares]
    assert [batch for together in zip(*drawn, strict=True) for batch in together] == whole
    for step in range(0, 12, 5):
        cut_off = loader(0, ranks)
        assert drawn_from(islice(cut_off, step)) == drawn[0][:step]
        state = unpack(*packed(cut_off.state_dict()))  # the first one's, as a checkpoint has it
        for rank in range(ranks):
            resumed = loader(rank, ranks)
            resumed.load_state_dict(state)
            assert len(resumed) == 12
            assert drawn_from(resumed) == drawn[rank][step:]
            assert resumed.state_dict() == shares[0].state_dict() == shares[rank].state_dict()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # of a machine of two cores
@pytest.mark.parametrize("workers", [1, 3])
def test_processes_that_read_ahead_change_nothing(folders, tokenizer, workers):
    def loader(count: int):
        return stream(table("alpaca", folders["alpaca"], shuffle_buffer=5, workers=count), tokenizer).batches(2, 12, 1)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    alone, several = loader(0).share(1, 2), loader(workers).share(1, 2)
    whole = drawn_from(alone)
    assert drawn_from(islice(several, 4)) == whole[:4]
    resumed = loader(workers).share(1, 2)
    resumed.load_state_dict(several.state_dict())
    assert drawn_from(resumed) == whole[4:]
    assert resumed.state_dict() == alone.state_dict()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_signal_to_every_process_leaves_those_that_read_ahead_at_work(folders, tokenizer):
    source = table("alpaca", folders["alpaca"], shuffle_buffer=5, workers=2)
    whole = drawn_from(stream(table("alpaca", folders["alpaca"], shuffle_buffer=5), tokenizer).batches(2, 30, 1))
    loader = iter(stream(source, tokenizer).batches(2, 30, 1))
    first, readers_ahead = drawn_from(islice(loader, 3)), multiprocessing.active_children()
    assert len(readers_ahead) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for one in readers_ahead:
            subprocess.run(["sh", "-c", f"kill -{int(number)} {one.pid}"], check=True)  # by another process
    assert first + drawn_from(islice(loader, 17)) == whole[:20]
    for one in readers_ahead:
        one.terminate()
        one.join(5)
    assert [one.exitcode for one in readers_ahead] == [0, 0]


def test_the_first_rows_are_kept_from_training(folders, tokenizer):
    rows = build(Alpaca("alpaca", folders["alpaca"]), tokenizer, LENGTH)
    train, held_out = stream(table("alpaca", folders["alpaca"], shuffle_buffer=4), tokenizer).split(5)
    assert [held_out[i]["input_ids"].tolist() for i in range(5)] == [rows[i]["input_ids"].tolist() for i in range(5)]
    drawn = [int(batch["rows"]) for batch in train.batches(1, 36, seed=0)]
    assert sorted(drawn) == sorted([*range(5, 23)] * 2)
    assert train.record()["rows"] == 36
    for too_many in (23, 100):
        with pytest.raises(InputError, match=f"validation_rows={too_many} leaves nothing"):
            stream(table("alpaca", folders["alpaca"]), tokenizer).split(too_many)


def test_text_is_read_in_pieces_and_its_tokens_are_those_of_the_whole(tmp_path, tokenizer, monkeypatch):
    text = "".join(f"line {i} of a longer text\r\n" for i in range(60))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt").write_text("the end")
    monkeypatch.setattr(readers, "PIECE", 100)
    whole = build(TextFile("text", str(tmp_path)), tokenizer, LENGTH)
    streamed = stream(table("text", str(tmp_path), shuffle_buffer=3), tokenizer)
    windows = []
    for window in streamed.windows(streamed.start):
        windows.append(window.rows)
        if window.last:
            break
    assert len(windows) > 3
    found = [i for rows in windows for i in rows.ids.tolist()]
    assert found == whole.ids.tolist()
    assert found.count(tokenizer.eos_token_id) == 2
    one = table("text", str(tmp_path), limit=1)
    assert [row[readers.ENDS] for row in one.reader()].count(True) == 1


# errors


def test_bad_rows_are_counted_and_too_many_of_them_stop_the_run(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = alpaca_rows(300)
    rows[10]["output"] = None
    path.write_text("\n".join(map(json.dumps, rows)))
    source = table("alpaca", str(path), shuffle_buffer=50)
    streamed = stream(source, tokenizer)
    list(streamed.batches(299, 1, seed=0))
    assert (streamed.record()["rows_bad"], streamed.record()["rows"]) == (1, 299)
    late = alpaca_rows(3000)
    for row in late[2000:]:
        row["input"] = None
    path.write_text("\n".join(map(json.dumps, late)))
    streamed = stream(table("alpaca", str(path), shuffle_buffer=50), tokenizer)  # its first rows are good
    with pytest.raises(InputError, match=r"of .* rows .* have missing, null or non-string fields.*max_bad_fraction"):
        list(streamed.batches(100, 30, seed=0))
    with pytest.raises(InputError, match=r"row 2001 .input is null"):
        table("alpaca", str(path)).fingerprint()


BAD = {
    "one list": ("a.json", '[{"instruction": ""}]', "one JSON list.*JSON lines.*streaming=false"),
    "no JSON": ("a.jsonl", json.dumps(alpaca_rows(1)[0]) + "\n\n{oops\n", "a.jsonl, line 3, column 2: invalid JSON"),
    "no object": ("a.jsonl", "[1]\n".replace("[1]", "7"), "line 1: expected an object"),
    "empty": ("a.jsonl", "", "is empty"),
    "no rows": ("a.jsonl", "\n\n", "no column"),
    "other columns": ("a.jsonl", '{"prompt": "x"}', "no column instruction.*found prompt"),
    "no Parquet": ("a.parquet", "PAR1", "no Parquet file"),
    "all bad": ("a.jsonl", '{"instruction": null, "input": "", "output": ""}', "1 of 1 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_before_a_weight_is_loaded(tmp_path, case):
    name, content, message = BAD[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        table("alpaca", str(tmp_path / name)).fingerprint()


def test_what_cannot_be_streamed_says_so(tmp_path, folders, tokenizer):
    for options in ({"shuffle_buffer": 0}, {"workers": -1}):
        with pytest.raises(InputError, match="must be at least"):
            table("alpaca", folders["alpaca"], **options)
    (tmp_path / "latin.jsonl").write_bytes(b'{"instruction": "caf\xe9"}')
    with pytest.raises(InputError, match="line 1, byte 20: not UTF-8"):
        table("alpaca", str(tmp_path / "latin.jsonl")).fingerprint()
    short = Stream(table("alpaca", folders["alpaca"], workers=1), tokenizer, 4, "1f")
    with pytest.raises(InputError, match=r"no row is left to train on .23 lost their whole response") as raised:
        list(short.batches(2, 3, seed=0))
    assert "Traceback" not in str(raised.value)


def replaced(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_text(path.read_text().replace("Count", "Climb"))
    os.replace(other, path)


CHANGES = {
    "another in its place": replaced,
    "appended": lambda path: path.write_text(path.read_text() + "\n"),
    "cut within a line": lambda path: os.truncate(path, path.stat().st_size - 5),
    "cut between lines": lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:2])),
    "emptied": lambda path: os.truncate(path, 0),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_meanwhile_stops_the_training(folders, tokenizer, change, workers):
    """Also where every pass opens it anew, and whichever row of it comes next."""
    source = table("alpaca", folders["alpaca"], shuffle_buffer=2, workers=workers)
    loader = iter(stream(source, tokenizer).batches(2, 400, seed=0))
    next(loader)
    CHANGES[change](Path(folders["alpaca"]) / "b.jsonl")
    with pytest.raises(InputError, match=r"b.jsonl has changed while the cell trained on it") as raised:
        list(loader)
    assert "Traceback" not in str(raised.value)


def test_a_changed_file_stops_the_next_cell_of_the_same_table_too(folders, tokenizer):
    """A reference takes the fingerprint over from its cell."""
    source = table("alpaca", folders["alpaca"])
    first = stream(source, tokenizer)
    list(first.batches(2, 3, seed=0))
    replaced(Path(folders["alpaca"]) / "a.jsonl")
    with pytest.raises(InputError, match=r"a.jsonl has changed while"):
        list(stream(source, tokenizer).batches(2, 3, seed=0))


def test_a_training_whose_file_was_replaced_is_no_finished_cell(tmp_path, folders, monkeypatch):
    one = prepared(tmp_path, *overrides(folders["alpaca"], "data.streaming=true", "trainer.steps=9"))

    def change(_, trainer, *__):
        if trainer.global_step == 2:
            replaced(Path(folders["alpaca"]) / "b.jsonl")

    monkeypatch.setattr(StepRecorder, "on_before_optimizer_step", change)
    record = cell.ensure(one)
    assert record["status"] == "failed"
    assert "b.jsonl has changed while the cell trained on it" in record["error"]["message"]


def test_the_fingerprint_depends_on_content_never_on_the_path(tmp_path, folders):
    other = written(tmp_path / "elsewhere", "alpaca")
    assert table("alpaca", other).fingerprint() == table("alpaca", folders["alpaca"]).fingerprint()
    assert (
        table("alpaca", written(tmp_path / "more", "alpaca", 24)).fingerprint() != table("alpaca", other).fingerprint()
    )


def test_memory_does_not_grow_with_the_data(tmp_path, tokenizer):
    def peak(rows: int, name: str) -> int:
        path = tmp_path / name
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in alpaca_rows(rows))
        streamed = stream(table("alpaca", str(path), shuffle_buffer=100), tokenizer)
        tracemalloc.start()
        assert sum(len(batch["rows"]) for batch in streamed.batches(50, rows // 50, seed=0)) == rows
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(500, "first.jsonl")  # what is allocated once
    small, large = peak(500, "small.jsonl"), peak(5000, "large.jsonl")
    assert large < 1.2 * small


def refused(source: Table, match: str) -> int:
    """Bytes that were held at most until a file was refused."""
    tracemalloc.start()
    with pytest.raises(InputError, match=match):
        source.fingerprint()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


@pytest.mark.parametrize("kind", ["alpaca", "text"])
def test_a_line_without_end_is_refused_before_it_is_held(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 2**18)
    path = tmp_path / f"a.{'txt' if kind == 'text' else 'jsonl'}"
    fits = json.dumps(alpaca_rows(1)[0])
    path.write_text(f"{fits:<{2**18 - 1}}\n" + "word " * 2**21)
    expected = r"line 2, is longer than the 262144 bytes .*streaming=false"
    assert refused(table(kind, str(path)), expected) < path.stat().st_size / 2


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n" * 2**17])
def test_a_json_list_on_one_line_is_refused_by_its_first_byte(tmp_path, before):
    path = tmp_path / "a.json"
    path.write_bytes(before + json.dumps(alpaca_rows(1) * 2**16).encode())
    assert refused(table("alpaca", str(path)), "one JSON list") < path.stat().st_size / 8


# cells


def overrides(path: str, *more: str) -> list[str]:
    how = ["data=alpaca", f"data.path={path}", "data.limit=null", "data.max_length=96", "data.shuffle_buffer=8"]
    return ["reference=off", "precision=fp32", "trainer.checkpoint_every_s=0", *how, *more]


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", [[], ["data.packing=true", "trainer.accumulate=2"], ["data.workers=2"]])
def test_a_streamed_training_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path, folders, monkeypatch, how):
    asked = overrides(folders["alpaca"], "data.streaming=true", "trainer.steps=9", "trainer.validation_rows=3", *how)
    whole, torn = (prepared(tmp_path / name, *asked) for name in ("whole", "torn"))
    record = cell.ensure(whole)
    assert record["status"] == "ok", record["error"]
    assert record["data"]["streamed"]
    assert record["data"]["rows"] >= 36 if not how else record["data"]["rows"]
    assert record["validation"]["rows"] == 3
    for step in (1, 6):
        assert cut(monkeypatch, torn, step, signal.SIGTERM) == 128 + signal.SIGTERM
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            cell.ensure(torn)
    assert cell.ensure(torn)["resumed"]["at_steps"] == [2, 7]
    same(whole, torn)
    assert records.load(torn.folder)["data"] == record["data"]


def test_streaming_is_part_of_the_identity_and_a_large_window_changes_nothing_else(tmp_path, folders):
    memory = prepared(tmp_path, *overrides(folders["alpaca"]))
    assert prepared(tmp_path, *overrides(folders["alpaca"], "data.shuffle_buffer=7", "data.workers=1")).id == memory.id
    assert not {"streaming", "shuffle_buffer", "workers"} & set(memory.science["data"])
    streamed = prepared(tmp_path, *overrides(folders["alpaca"], "data.streaming=true", "data.shuffle_buffer=64"))
    ahead = prepared(
        tmp_path, *overrides(folders["alpaca"], "data.streaming=true", "data.shuffle_buffer=64", "data.workers=1")
    )
    narrow = prepared(tmp_path, *overrides(folders["alpaca"], "data.streaming=true"))
    assert memory.id != streamed.id == ahead.id != narrow.id
    for one in (memory, streamed):
        assert cell.ensure(one)["status"] == "ok"
    assert same_weights(memory.folder, streamed.folder)


@pytest.mark.parametrize("made", ["skills", "mixture", "pydoc"])
def test_made_data_cannot_be_streamed(tmp_path, made):
    with pytest.raises(InputError, match=f"streaming=true: data={made} is made.*data=alpaca, sharegpt or text"):
        prepared(tmp_path, f"data={made}", "data.streaming=true", "trainer.steps=1")
