"""A damaged run: found before use, named, and mended from another run or by going back to the last good task."""

import random
import shutil

import pytest

from gainlora.__main__ import main
from gainlora.errors import GainLoRAError, RunLocked
from gainlora.io import is_whole, lock
from gainlora.runs.repair import repair
from tests.runs import assert_equal_runs, create, flip, learn, project, run, state

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


def test_every_file_of_every_task_is_checked_before_use(copied):
    root, folder = copied
    files = [path for path in sorted(folder.glob("task_*/**/*")) if path.is_file() and path.stat().st_size]
    assert len({path.suffix for path in files}) == 3 and len(files) > 24
    assert not any(path.stat().st_mode & 0o222 for path in files)  # read-only
    for path in random.Random(0).sample(files, 12):
        flip(path)
        with pytest.raises(GainLoRAError) as error:
            run(root, METHOD)
        assert path.name in str(error.value) or path.name == "checksums.json"
        assert "gainlora repair" in str(error.value) or "damaged" in str(error.value)
        flip(path)
    run(root, METHOD)


@pytest.mark.parametrize("damaged, kept", [("task_02_task2/gate.safetensors", 1), ("task_01_task1/scores.json", 0)])
def test_repair_goes_back_to_the_last_good_task_and_the_run_to_the_same_end(copied, finished, damaged, kept, capsys):
    root, folder = copied
    flip(folder / damaged)
    assert main(["repair", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{kept} good tasks" in shown and "dropped task_03_task3" in shown
    assert len(list(folder.glob("task_*"))) == kept and not (folder / "result.json").exists()
    run(root, METHOD)
    assert_equal_runs(root, finished)


def test_damage_that_runs_share_is_mended_in_each_and_no_file_is_written_to(copied):
    root, folder = copied
    shorter = learn(root, method=METHOD, subspace__horizon=3, order__tasks=["task1", "task2"])
    expected = state(shorter)
    shared = folder / "task_01_task1" / "gate.safetensors"
    assert shared.samefile(shorter.task_folder(1) / shared.name)
    flip(shared)
    assert repair(folder).dropped == ["task_01_task1", "task_02_task2", "task_03_task3"]
    run(root, METHOD)  # learned again: the only other copy is the same damaged file
    assert repair(shorter.folder).mended == ["task_01_task1"] and state(shorter) == expected
    assert all(is_whole(step) for step in root.glob("runs/*/task_*"))
    assert len(list(root.glob("runs/*/task_*"))) == 5


def test_repair_from_a_task_that_is_not_damaged(copied, finished):
    root, folder = copied
    done = repair(folder)
    assert (done.kept, done.dropped, done.mended) == (3, [], []) and (folder / "result.json").exists()
    assert repair(folder, 3).dropped == ["task_03_task3"]
    run(root, METHOD)
    assert_equal_runs(root, finished)


def test_repair_leaves_a_run_in_progress_alone(copied, tmp_path):
    _, folder = copied
    with lock(folder / ".lock", "this run"), pytest.raises(RunLocked, match="in progress already"):
        repair(folder)
    with pytest.raises(GainLoRAError, match=r"config\.json: not found"):
        repair(tmp_path)


def test_repair_drops_the_task_that_was_being_learned(tmp_path):
    with create(project(tmp_path), method=METHOD) as half:
        half.seal(1)
        half.train(2)
    assert list(half.folder.glob(".task_02*"))
    assert repair(half.folder, 2).dropped == ["task_02_task2"] and half.finished == 1
    assert not list(half.folder.glob(".task*"))
