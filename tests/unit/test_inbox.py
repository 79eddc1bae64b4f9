"""The inbox: nothing is taken that is not whole, or that somebody still writes."""

import os
import time
from pathlib import Path

import pytest

from gainlora.errors import Busy, GainLoRAError, Passing

pytest.importorskip("prefect")
from flows import learn
from flows.learn import FAILED, STILL, complete, put_away


def write(path, age=STILL + 1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_is_complete(tmp_path):
    task = write(tmp_path / "task" / "train.json").parent
    assert not complete(task)
    write(task / "test.json")
    assert complete(task)
    write(task / "test.json", age=0)
    assert not complete(task)
    assert complete(write(tmp_path / "one.json"))
    assert not complete(write(tmp_path / "growing.json", age=0))
    assert not complete(write(tmp_path / "notes.txt"))


def test_a_failure_lies_beside_its_reason_and_replaces_an_earlier_one(tmp_path):
    for reason in ("first", "second"):
        put_away(write(tmp_path / "task" / "train.json").parent, FAILED, reason)
        assert not (tmp_path / "task").exists()
        assert (tmp_path / FAILED / "task" / "train.json").exists()
        assert (tmp_path / FAILED / "task.txt").read_text() == f"{reason}\n"


@pytest.mark.parametrize("error, dropped", [(GainLoRAError, True), (Passing, False), (Busy, False)])
def test_what_passes_by_itself_takes_nothing_back(monkeypatch, error, dropped):
    """A full disk, a process that was lost: the same command goes on from the checkpoint."""

    def step(**_):
        raise error("no")

    found = []
    monkeypatch.setattr(learn, "begin", lambda folder, source: (folder, ["task"], 0))
    monkeypatch.setattr(learn, "drop", found.append)
    monkeypatch.setattr(learn, "PHASES", (step,))
    monkeypatch.setattr(learn, "Progress", lambda *_, **__: None)
    monkeypatch.setattr(learn.continual, "section", lambda name: {"num_processes": 1})
    with pytest.raises(error, match=r"^no$"):
        learn.learn_task(Path("run"), Path("task"))
    assert bool(found) == dropped
