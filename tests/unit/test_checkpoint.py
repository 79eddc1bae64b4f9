"""A task stopped in the middle of its training goes on to the same end, bit for bit."""

import random
import resource
import signal

import pytest
import torch

from gainlora.errors import GainLoRAError
from gainlora.training import train
from gainlora.training.checkpoint import Checkpoints, latest
from gainlora.training.train import target_loss
from tests.dying import in_a_process
from tests.runs import assert_equal_runs, copy_of, flip, learn, project, run

OPTIONS = {"train__checkpoint_every": 2, "train__epochs": 2, "train__lr_scheduler": "cosine"}
"""24 examples in batches of 8, twice: 6 steps a task, checkpoints after 2, 4 and 6."""
METHOD = "gainlora-inflora"


class Stopped(Exception):
    pass


def stop_at(monkeypatch, partial, steps, when):
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
        patch.setattr(train, "target_loss", interrupted)
        run(root, "gainlora-olora")
    (partial,) = root.glob("runs/tiny-*/.task_02_*")
    assert latest(partial).name == "checkpoint_00003"  # between those that were due
    run(root, "gainlora-olora")
    assert_equal_runs(root, expected)


def test_a_damaged_checkpoint_starts_the_task_again(whole, tmp_path):
    expected = whole("llama", METHOD)
    root = copy_of(expected, tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "02", 4, "after")
        run(root, METHOD)
    (state,) = root.glob("runs/tiny-*/.task*/checkpoint_00004/state.safetensors")
    flip(state)
    assert latest(state.parent.parent) is None
    run(root, METHOD)
    assert_equal_runs(root, expected)


def test_no_checkpoints_when_none_are_asked_for(tmp_path):
    done = learn(project(tmp_path), train__checkpoint_every=None)
    assert done.finished == 3 and not list(done.folder.rglob("*checkpoint*"))


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_when_the_disk_is_full_it_says_so_and_goes_on_once_there_is_room(whole, tmp_path, share):
    """A limit on the size of files stands for the disk; it fails at another file each."""
    expected, said = whole("llama", METHOD), tmp_path / "said"
    room = int(share * max(path.stat().st_size for path in expected.glob("runs/*/task_*/*")))
    root = copy_of(expected, tmp_path / "full")
    assert in_a_process(run_in, room, root, said) == 0
    assert "not written: " in said.read_text() and "the same command again" in said.read_text()
    run(root, METHOD)
    assert_equal_runs(root, expected)


def run_in(room, root, said):
    """Run where no file may be larger, and write down what that ends with."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, -1))
    try:
        run(root, METHOD)
    except GainLoRAError as error:
        said.write_text(str(error))
