"""Two processes on the CPU (gloo, float32) learn what one learns; what goes wrong in one ends both, and they go on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gainlora.errors import GainLoRAError, RetryableError
from gainlora.io import lock
from gainlora.launch import HERE, launch
from gainlora.runs.run import Run
from tests.runs import config_of, copy_of, learn, project, records, tensors

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
FSDP = ["--config_file", str(ROOT / "configs" / "fsdp.yaml")]
SIZES = {"lora__rank": 4, "lora__alpha": 16, "evaluate__batch_size": 3, "data__train_limit": 23}
OPTIONS = {"count": 2, "train__epochs": 4, "train__batch_size": 6, **SIZES}
"""Two tasks of 23 examples: 4 batches of which the last has 5, for two; 8 test examples in 3 batches."""


def new_run(root):
    with Run.create(config_of(root), root, load=False) as made:
        return made.folder


def run(*command):
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def learning(process, folder, pattern):
    """What a launcher has started, once files of the run match."""
    while not list(folder.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.01)
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Kind of model -> the run that one process learned; with an input memory, or a penalty."""
    learned = {}
    for kind, method, rate in (("llama", "gainlora-inflora", 0.02), ("t5", "gainlora-olora", 0.005)):
        root = tmp_path_factory.mktemp(kind)
        learned[kind] = learn(project(root, kind, 0.0, method=method, train__learning_rate=rate, **OPTIONS))
    return learned


@pytest.mark.parametrize("how", [HERE, FSDP], ids=["whole", "sharded"])
def test_two_processes_learn_what_one_learns(alone, tmp_path, how):
    folders = []
    for kind, stream in alone.items():
        folders.append(new_run(copy_of(stream.root, tmp_path / kind)))
    run(*LAUNCH, *how, "-m", "tests.launched", *map(str, folders))
    for folder, expected in zip(folders, alone.values(), strict=True):
        seen = json.loads((folder / "seen.json").read_text())
        assert seen["equal"] and seen["apart"] < 1e-5
        assert seen["held"] == 1 if how is HERE else seen["held"] < 0.8  # embeddings, half of the rest
        R, there = (json.loads((f / "result.json").read_text())["R"] for f in (folder, expected.folder))
        assert there == R and any(score for row in there for score in row if score)
        for t in (1, 2):
            one, two = expected.task_folder(t), folder / expected.task_folder(t).name
            steps = list(zip(records(one), records(two), strict=True))
            assert len(steps) == 16
            for expected_step, step in steps:
                assert step["loss"] == pytest.approx(expected_step["loss"], abs=1e-4)
                assert step.get("penalty") == pytest.approx(expected_step.get("penalty"), abs=1e-4)
            assert {path.name for path in one.rglob("*")} == {path.name for path in two.rglob("*")}
            assert json.loads((two / "scores.json").read_text())["num_processes"] == 2
        assert not [path for path in folder.rglob("*") if "part" in path.name or "checkpoint" in path.name]


def test_killed_in_training_they_go_on_to_the_same_end(tmp_path):
    """SIGKILL for the launcher alone. T5's dropout draws other random numbers in each process."""
    root = project(tmp_path / "whole", "t5", **{**OPTIONS, "train__checkpoint_every": 2, "train__epochs": 12})
    whole, killed = (new_run(place) for place in (root, copy_of(root, tmp_path / "killed")))
    command = [*LAUNCH, *HERE, "-m", "gainlora.launch"]
    run(*command, str(whole))
    assert (whole / "result.json").exists()

    process = subprocess.Popen([*command, str(killed)], cwd=ROOT)
    processes = learning(process, killed, ".task_02_*/checkpoint_*")
    for worker in processes:
        worker.suspend()  # so they do not learn on to the end; the launcher's death reaches a stopped process, too
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(processes, timeout=30)
    assert not left and not (killed / "result.json").exists()
    run(*command, str(killed))
    for t in (1, 2):
        one, two = (folder / f"task_{t:02d}_task{t}" for folder in (whole, killed))
        assert tensors(one) == tensors(two) and records(one) == records(two)


def test_what_fails_in_one_process_is_the_one_error(tmp_path):
    folder = new_run(project(tmp_path, **OPTIONS))
    with lock(folder / ".lock", "this run"), pytest.raises(RetryableError, match="this run is in progress already"):
        launch(folder, 1, 2)  # the first process alone asks for it; the second waits for the first
    config = tmp_path / "launch.yaml"
    config.write_text("distributed_type: NOWHERE\n")
    with pytest.raises(GainLoRAError, match=r"launch.config: .*2 processes cannot start: .*NOWHERE") as failed:
        launch(folder, 1, 2, str(config))
    assert not isinstance(failed.value, RetryableError)  # the inbox would try it for ever


def test_a_process_that_is_killed_ends_the_other(tmp_path):
    folder = new_run(project(tmp_path, **{**OPTIONS, "train__epochs": 500}))
    code = "import sys; from pathlib import Path; from gainlora.launch import launch; launch(Path(sys.argv[1]), 1, 2)"
    command = [sys.executable, "-c", code, folder]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    processes = learning(process, folder, ".task_01_*/checkpoint_*")
    next(p for p in processes if "accelerate.commands.launch" not in p.cmdline()).kill()
    output, _ = process.communicate(timeout=60)
    assert "RetryableError: one of 2 processes was killed" in output.splitlines()[-1]
    assert not psutil.wait_procs(processes, timeout=30)[1]
