"""What cannot go on says why, by task and layer or by file, keeps what is whole, and goes on once it is mended."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from gainlora.errors import GainLoRAError
from gainlora.io import verify_checksums
from tests.runs import copy_of, learn, project, tensors

LAYER = r"model\.layers\.\d\.self_attn\.q_proj"


def left(root):
    """What is in the run folder, beside its description; every task folder in it is whole."""
    (folder,) = root.glob("runs/tiny-*")
    for task in folder.glob("task_*"):
        verify_checksums(task)
    return sorted(path.name for path in folder.glob("*task_*"))


def infinite_inputs(root):
    """Words of task 2 get an embedding that is not finite."""
    path = root / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][17 + 15 : 17 + 30] = torch.inf  # after 17 other tokens; 15 words a task
    save_file(weights, path, metadata={"format": "pt"})


def test_inputs_that_are_not_finite_are_named_with_task_and_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("gainlora.training.learner.check_behavior", lambda *_: None)  # may meet those inputs first
    root = project(tmp_path)
    infinite_inputs(root)
    with pytest.raises(
        GainLoRAError, match=rf"^task task2: {LAYER}: the covariance of its inputs is not finite; lower"
    ):
        learn(root, method="inflora")
    assert left(root) == ["task_01_task1"]
    with pytest.raises(GainLoRAError, match=r"^task task2: gate layer 1: the covariance of its inputs is not finite"):
        learn(root, method="gainlora-olora")


@pytest.mark.parametrize("which", [0, -1])  # of task 2's: for its A, and for its gate's memory
def test_a_decomposition_that_fails_is_named_and_taken_again(tmp_path, monkeypatch, which):
    root, whole = project(tmp_path, count=2), tmp_path / "expected"
    calls = []  # whether task 1 is learned
    fails = []
    eigh = torch.linalg.eigh

    def counted(matrix):
        calls.append(any(whole.glob("runs/*/task_01_*")))
        if len(calls) in fails:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    expected = learn(copy_of(root, whole), model__name=str(root / "base")).task_folder(2)
    of_task_2 = [number for number, later in enumerate(calls, start=1) if later]
    fails.append(len(calls) + of_task_2[which])
    with pytest.raises(GainLoRAError, match=rf"^task task2: ({LAYER}|gate layer \d): .*cannot be decomposed"):
        learn(root)
    assert "task_01_task1" in left(root) and "task_02_task2" not in left(root)
    assert tensors(learn(root).task_folder(2)) == tensors(expected)


def test_a_branch_that_is_not_finite_after_its_last_step_is_refused(tmp_path, monkeypatch):
    """No later loss would show it."""
    root, step = project(tmp_path, count=1), torch.optim.AdamW.step

    def overflowing(self, *arguments):
        step(self, *arguments)
        self.param_groups[0]["params"][-1].data[0, 0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(GainLoRAError, match=r"^task task1: its branch is not finite after training; lower train\.l"):
        learn(root, method="seqlora", data__train_limit=8)
    assert "task_01_task1" not in left(root)
