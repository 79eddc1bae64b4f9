"""The inbox: a task is taken only when it is whole and has settled; a failure lies beside its reason."""

import os
import time

import pytest

pytest.importorskip("prefect")
from flows.grow import FAILED, SETTLED, incomplete, put_away


def write(path, age=SETTLED + 1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_only_whole_and_settled_tasks_are_taken(tmp_path):
    task = write(tmp_path / "task" / "train.json").parent
    assert incomplete(task) == "waits for test.json"
    write(task / "test.json")
    assert incomplete(task) is None
    write(task / "test.json", age=0)
    assert "may still be written" in incomplete(task)
    for name in ("one.json", "one.csv", "one.parquet", "trace/test.jsonl"):
        dropped = write(tmp_path / name)
        if dropped.parent != tmp_path:
            dropped = write(dropped.with_name("train.csv")).parent
        assert incomplete(dropped) is None, name
    assert incomplete(write(tmp_path / "future.json", age=-3600)) is None
    assert "may still be written" in incomplete(write(tmp_path / "growing.json", age=0))
    assert "not a task's file" in incomplete(write(tmp_path / "notes.txt"))
    (tmp_path / "empty").mkdir()
    assert incomplete(tmp_path / "empty") == "waits for train.json, test.json"


def test_a_saved_data_set_is_a_task(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a", "label": "b"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    assert "may still be written" in incomplete(tmp_path / "saved")
    for file in filter(os.path.isfile, (tmp_path / "saved").rglob("*")):
        os.utime(file, (time.time() - SETTLED - 1,) * 2)
    assert incomplete(tmp_path / "saved") is None


def test_a_failure_lies_beside_its_reason_and_replaces_an_earlier_one(tmp_path):
    for reason in ("first", "second"):
        put_away(write(tmp_path / "task" / "train.json").parent, FAILED, reason)
        assert not (tmp_path / "task").exists()
        assert (tmp_path / FAILED / "task" / "train.json").exists()
        assert (tmp_path / FAILED / "task.txt").read_text() == f"{reason}\n"
