"""Records: atomic, never overwritten once finished, and refused when they cannot be trusted."""

import errno
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from lyapft import records
from lyapft.errors import InputError
from lyapft.peft.base import written_whole


def a_record(status: str = "running", **more) -> dict:
    return {"schema_version": records.SCHEMA_VERSION, "id": "0123456789ab", "status": status, **more}


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = a_record("ok", scores=[{"task": "t", "shots": 0, "value": 1 / 3}], text="λ ≤ 0")
    records.save(tmp_path / "cell", record)
    assert records.load(tmp_path / "cell") == record
    assert [path.name for path in (tmp_path / "cell").iterdir()] == ["record.json"]  # no temporary file stays


@pytest.mark.parametrize("status", records.FINAL)
def test_a_finished_record_is_never_overwritten(tmp_path, status):
    records.save(tmp_path, a_record(status, value=1))
    with pytest.raises(FileExistsError, match="never overwritten"):
        records.save(tmp_path, a_record("ok", value=2))
    assert records.load(tmp_path)["value"] == 1


@pytest.mark.parametrize("status", sorted(set(records.STATUSES) - set(records.FINAL)))
def test_an_unfinished_record_gives_way(tmp_path, status):
    records.save(tmp_path, a_record(status))
    records.save(tmp_path, a_record("ok"))
    assert records.load(tmp_path)["status"] == "ok"


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    records.save(tmp_path, a_record("ok", training={"loss": float("nan"), "rest": [1.5, float("-inf")]}))
    assert records.load(tmp_path)["training"] == {"loss": None, "rest": [1.5, None]}


def test_a_finished_record_can_only_be_completed(tmp_path):
    scores = [{"task": "t", "shots": 0, "value": 0.5}]
    records.save(tmp_path, a_record("ok", divergence=[], scores=scores))
    completed = records.save_divergence(tmp_path, [{"counterpart": "paper"}])
    assert completed == records.load(tmp_path) == a_record("ok", divergence=[{"counterpart": "paper"}], scores=scores)


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def half_a_write(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        records.write_atomically(target, half_a_write)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable record"),
        ("[]", "schema version None"),
        (json.dumps({"schema_version": 99}), "schema version 99"),
        ("\udcff", "not a readable record"),
    ],
)
def test_a_record_that_cannot_be_trusted_is_refused(tmp_path, content, message):
    (tmp_path / "record.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        records.load(tmp_path)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no record\.json"):
        records.load(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        records.load_study(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no records"):
        records.load_study(tmp_path)


def test_one_unreadable_record_hides_no_other(tmp_path, caplog):
    records.save(tmp_path / "good", a_record("ok"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_text("{")
    assert [folder.name for folder, _ in records.load_study(tmp_path)] == ["good"]
    assert "not a readable record" in caplog.text


def test_files_get_the_permissions_of_the_user(tmp_path):
    (tmp_path / "plain").touch()
    records.save(tmp_path, a_record())
    assert (tmp_path / "record.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_study_is_read_by_folder(tmp_path):
    records.save(tmp_path / "mamba-bf16-0123456789ab", a_record())
    assert [folder.name for folder, _ in records.load_study(tmp_path)] == ["mamba-bf16-0123456789ab"]


def test_a_step_series_can_be_read_while_it_grows(tmp_path):
    series = records.StepSeries(tmp_path / "steps.parquet")
    series.flush()
    assert not series.path.exists()
    series.append({"step": 1, "loss": 2.5, "skipped": False})
    series.flush()
    series.append({"step": 2, "loss": 1.5, "skipped": True})
    assert len(pd.read_parquet(series.path)) == 1
    series.flush()
    assert pd.read_parquet(series.path).to_dict("list") == {
        "step": [1, 2],
        "loss": [2.5, 1.5],
        "skipped": [False, True],
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="which file a descriptor is of is asked of Linux")
def test_what_a_rename_relies_on_is_on_disk_before_it_and_the_new_name_after(tmp_path, monkeypatch):
    """So that a power cut leaves the old file or the new one, and no record without its weights."""
    told = []
    replace, rename, fsync = os.replace, Path.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda place: (told.append(os.readlink(f"/proc/self/fd/{place}")), fsync(place)))
    monkeypatch.setattr(os, "replace", lambda a, b: (told.append("moved"), replace(a, b)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (told.append("moved"), rename(a, b)))
    records.write_atomically(tmp_path / "record.json", lambda path: path.write_text("{}"))
    assert [Path(one).name.startswith(".record.json") for one in told] == [True, False, False]
    assert told[1:] == ["moved", str(tmp_path)]
    told.clear()
    with written_whole(tmp_path / "adapter") as folder:
        (folder / "weights.safetensors").write_bytes(b"x")
    assert [Path(one).name for one in told] == ["weights.safetensors", ".adapter.partial", "moved", tmp_path.name]


def test_a_folder_that_cannot_be_flushed_fails_no_write(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(place: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{place}")).is_dir():
            raise OSError(errno.EINVAL, "no such call here")
        fsync(place)

    monkeypatch.setattr(os, "fsync", only_files)
    records.write_atomically(tmp_path / "record.json", lambda path: path.write_text("{}"))
    assert (tmp_path / "record.json").read_text() == "{}"
    monkeypatch.setattr(os, "fsync", lambda place: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        records.write_atomically(tmp_path / "record.json", lambda path: path.write_text("[]"))
    assert (tmp_path / "record.json").read_text() == "{}"
