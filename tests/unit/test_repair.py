"""A damaged run: found before use, named, and mended by going back to the last good task."""

import random
import shutil

import pytest

from gainlora.__main__ import main
from gainlora.errors import GainLoRAError
from gainlora.learning.repair import repair
from gainlora.learning.run_folder import hold
from gainlora.learning.stream import Stream
from gainlora.params import load_config
from tests.unit.test_checkpoint import assert_equal_runs, copy_of, run
from tests.unit.test_stream import project

METHOD = "gainlora-inflora"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = project(tmp_path_factory.mktemp("finished"))
    run(root, METHOD)
    return root


@pytest.fixture
def copied(finished, tmp_path):
    """A project with a finished run, and that run's folder."""
    root = shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("base"))
    (folder,) = root.glob("runs/tiny-*")
    return root, folder


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def test_every_file_of_every_task_is_checked_before_use(copied):
    root, folder = copied
    files = [path for path in sorted(folder.glob("task_*/**/*")) if path.is_file() and path.stat().st_size]
    assert len({path.suffix for path in files}) == 3 and len(files) > 24
    for path in random.Random(0).sample(files, 12):
        before = path.read_bytes()
        flip(path)
        with pytest.raises(GainLoRAError) as error:
            run(root, METHOD)
        named = "checksums.json" if path.name == "checksums.json" else path.name
        assert named in str(error.value) or path.name == "checksums.json"
        assert "gainlora repair" in str(error.value) or "damaged" in str(error.value)
        path.write_bytes(before)
    run(root, METHOD)


@pytest.mark.parametrize("damaged, kept", [("task_02_task2/gate.safetensors", 1), ("task_01_task1/scores.json", 0)])
def test_repair_goes_back_to_the_last_good_task_and_the_run_to_the_same_end(copied, finished, damaged, kept, capsys):
    root, folder = copied
    flip(folder / damaged)
    assert main(["repair", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"{kept} good tasks" in said and "dropped task_03_task3" in said
    assert len(list(folder.glob("task_*"))) == kept and not (folder / "result.json").exists()
    run(root, METHOD)
    assert_equal_runs(root, finished)


def test_repair_from_a_task_that_is_not_damaged(copied, finished):
    root, folder = copied
    assert repair(folder) == (3, [])
    assert (folder / "result.json").exists()
    assert repair(folder, 3) == (2, ["task_03_task3"])
    with pytest.raises(GainLoRAError, match="--from-task: 3: this run has 1 to 2 of its 3 tasks"):
        repair(folder, 3)
    with pytest.raises(GainLoRAError, match="--from-task: 0:"):
        repair(folder, 0)
    run(root, METHOD)
    assert_equal_runs(root, finished)


def test_repair_leaves_a_run_in_progress_alone(copied, tmp_path):
    _, folder = copied
    with hold(folder), pytest.raises(GainLoRAError, match="in progress already"):
        repair(folder)
    with pytest.raises(GainLoRAError, match=r"config\.json: not found"):
        repair(tmp_path)


def test_repair_drops_the_task_that_was_being_learned(finished, tmp_path):
    root = copy_of(finished, tmp_path / "half")
    stream = Stream.create(load_config("tiny", root / "params.yaml", {"method": METHOD}), root)
    for step in ("prepare", "train", "update", "evaluate", "finish"):
        getattr(stream, step)(1)
    stream.train(2)
    stream._lock.close()
    assert list(stream.folder.glob(".task_02*"))
    assert repair(stream.folder, 2) == (1, ["task_02_task2"])
    assert not list(stream.folder.glob(".task*"))
