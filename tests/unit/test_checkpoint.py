"""A task stopped in the middle of its training goes on to the same end, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from gainlora.learning import trainer
from gainlora.learning.checkpoint import Checkpoints, latest
from gainlora.learning.stream import Stream
from gainlora.learning.trainer import target_loss
from gainlora.params import load_config
from tests.unit.test_stream import learn, project

RUN = (
    "import sys; from pathlib import Path; from tests.unit.test_checkpoint import run\n"
    "run(Path(sys.argv[1]), sys.argv[2])\n"
)
ENVIRONMENT = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
OPTIONS = {"train__checkpoint_every": 2, "train__epochs": 2, "train__lr_scheduler": "cosine"}
"""24 examples in batches of 8, twice: 6 steps a task, checkpoints after 2, 4 and 6."""


class Stopped(Exception):
    pass


def run(root, method) -> None:
    """The whole stream, as a new process would find its folder."""
    Stream.close_all()
    stream = Stream.create(load_config("tiny", root / "params.yaml", {"method": method}), root)
    try:
        for t in range(1, len(stream.steps) + 1):
            for step in ("prepare", "train", "update", "evaluate", "finish"):
                getattr(stream, step)(t)
        stream.result()
    finally:
        stream._lock.close()


def stop_at(monkeypatch, partial, steps, when) -> None:
    """Let training stop just before or after the checkpoint of that many steps is written."""
    save = Checkpoints.save

    def stopping(self, *state):
        here = self.partial.name.startswith(f".task_{partial}") and len(state[3]) == steps
        if here and when == "before":
            raise Stopped
        save(self, *state)
        if here:
            raise Stopped

    monkeypatch.setattr(Checkpoints, "save", stopping)


def tensors(folder):
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    return {name: (folder / name).read_bytes() for name in names}


def assert_equal_runs(stopped, expected):
    """The same files, but for the seconds."""
    (one,), (other,) = (list(root.glob("runs/tiny-*")) for root in (stopped, expected))
    folders = sorted(path.name for path in other.glob("task_*"))
    assert sorted(path.name for path in one.glob("task_*")) == folders and folders
    for name in folders:
        assert tensors(one / name) == tensors(other / name)
        lines = [[json.loads(x) for x in (run / name / "train.jsonl").read_text().splitlines()] for run in (one, other)]
        for a, b in zip(*lines, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert (one / "result.json").read_bytes() == (other / "result.json").read_bytes()
    assert not list(one.glob(".task*")) and not list(one.rglob("*checkpoint*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Method -> a project in which it ran without a stop; made when first asked for."""
    made = {}

    def get(kind, method):
        if (kind, method) not in made:
            root = project(tmp_path_factory.mktemp("whole"), kind, **OPTIONS)
            run(root, method)
            made[kind, method] = root
        return made[kind, method]

    return get


def copy_of(root, target):
    """The same project without its runs; its base model stays where it is, so the configuration is the same."""
    return shutil.copytree(root, target, ignore=shutil.ignore_patterns("runs", "base"))


@pytest.mark.parametrize(
    "kind, method, task, steps, when",
    [
        ("llama", "gainlora-inflora", "02", 4, "before"),
        ("llama", "gainlora-inflora", "02", 4, "after"),
        ("llama", "gainlora-inflora", "03", 6, "after"),
        ("t5", "gainlora-olora", "02", 2, "after"),  # dropout draws random numbers
        ("llama", "ewc", "02", 4, "after"),
        ("llama", "slao", "03", 2, "after"),
        ("llama", "multitask", "01", 4, "after"),
    ],
)
def test_stopped_in_training_it_goes_on_to_the_same_end(whole, tmp_path, kind, method, task, steps, when):
    expected = whole(kind, method)
    root = copy_of(expected, tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, task, steps, when)
        run(root, method)
    (partial,) = root.glob("runs/tiny-*/.task*")
    assert latest(partial).name == f"checkpoint_{steps if when == 'after' else steps - 2:05d}"
    torch.manual_seed(random.randrange(1000))  # whatever the generators hold
    run(root, method)
    assert_equal_runs(root, expected)


def test_interrupted_in_a_step_it_keeps_all_steps_before(whole, tmp_path):
    expected = whole("t5", "gainlora-olora")
    root = copy_of(expected, tmp_path / "stopped")
    calls = []

    def interrupted(model, batch, encoder_decoder):
        calls.append(batch)
        loss = target_loss(model, batch, encoder_decoder)  # dropout draws its numbers, then Ctrl-C
        if len(calls) == 6 + 4:
            raise KeyboardInterrupt
        return loss

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "target_loss", interrupted)
        run(root, "gainlora-olora")
    (partial,) = root.glob("runs/tiny-*/.task_02_*")
    assert latest(partial).name == "checkpoint_00003"  # between those that were due
    run(root, "gainlora-olora")
    assert_equal_runs(root, expected)


def test_a_damaged_checkpoint_starts_the_task_again(whole, tmp_path):
    expected = whole("llama", "gainlora-inflora")
    root = copy_of(expected, tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "02", 4, "after")
        run(root, "gainlora-inflora")
    (state,) = root.glob("runs/tiny-*/.task*/checkpoint_00004/state.safetensors")
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(content)
    assert latest(state.parent.parent) is None
    run(root, "gainlora-inflora")
    assert_equal_runs(root, expected)


def test_no_checkpoints_when_none_are_asked_for(tmp_path):
    stream = learn(project(tmp_path), train__checkpoint_every=None)
    assert stream.finished == 3 and not list(stream.folder.rglob("*checkpoint*"))


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_when_the_disk_is_full_it_says_so_and_goes_on_once_there_is_room(whole, tmp_path, share):
    """A limit on the size of files stands for the disk; it fails at another file each."""
    expected = whole("llama", "gainlora-inflora")
    room = int(share * max(path.stat().st_size for path in expected.glob("runs/*/task_*/*")))
    root = copy_of(expected, tmp_path / "full")
    limited = (
        "import resource, signal, sys; from pathlib import Path; from tests.unit.test_checkpoint import run\n"
        "from gainlora.errors import GainLoRAError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, -1))\n"
        "try: run(Path(sys.argv[1]), sys.argv[2])\n"
        "except GainLoRAError as error: sys.exit(f'error: {error}')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-B", "-c", limited, root, "gainlora-inflora"],  # -B: nor can bytecode be written
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "not written: " in ended.stderr and "the same command again" in ended.stderr
    run(root, "gainlora-inflora")
    assert_equal_runs(root, expected)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_never_stopped(whole, tmp_path):
    """SIGKILL at 20 moments, wherever they fall, of as many streams as it takes."""
    method = "gainlora-inflora"
    expected = whole("llama", method)
    command = [sys.executable, "-c", RUN]
    started = time.monotonic()
    subprocess.run([*command, copy_of(expected, tmp_path / "timed"), method], env=ENVIRONMENT, check=True)
    length = time.monotonic() - started
    chooser, kills, streams = random.Random(0), 0, 0
    while kills < 20:
        streams += 1
        root = copy_of(expected, tmp_path / f"killed{streams}")
        while not list(root.glob("runs/*/result.json")):
            process = subprocess.Popen([*command, root, method], env=ENVIRONMENT)
            try:
                assert process.wait(timeout=chooser.uniform(0.3, 1.1) * length) == 0
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        assert_equal_runs(root, expected)
