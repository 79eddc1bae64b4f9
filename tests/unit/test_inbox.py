"""The inbox: a task is taken only when it is whole and has settled; a failure lies beside its reason."""

import os
import time

import pytest

pytest.importorskip("prefect")
from flows.grow import FAILED, SETTLED, is_settled, put_away


def write(path, age=SETTLED + 1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_only_whole_and_settled_tasks_are_taken(tmp_path):
    task = write(tmp_path / "task" / "train.json").parent
    assert not is_settled(task)
    write(task / "test.json")
    assert is_settled(task)
    write(task / "test.json", age=0)
    assert not is_settled(task)
    assert is_settled(write(tmp_path / "one.json"))
    assert is_settled(write(tmp_path / "future.json", age=-3600))
    assert not is_settled(write(tmp_path / "growing.json", age=0))
    assert not is_settled(write(tmp_path / "notes.txt"))


def test_a_failure_lies_beside_its_reason_and_replaces_an_earlier_one(tmp_path):
    for reason in ("first", "second"):
        put_away(write(tmp_path / "task" / "train.json").parent, FAILED, reason)
        assert not (tmp_path / "task").exists()
        assert (tmp_path / FAILED / "task" / "train.json").exists()
        assert (tmp_path / FAILED / "task.txt").read_text() == f"{reason}\n"
