"""Sharing the work of a step: among micro-batches, among processes (tests/integration), with other dtypes and hooks."""

import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from gainlora import distributed
from gainlora.__main__ import main
from gainlora.errors import GainLoRAError
from gainlora.runs import loading
from tests.runs import copy_of, create, learn, project, records, tensors


@pytest.fixture(params=["llama", "t5"])
def root(request, tmp_path):
    return project(tmp_path, request.param, 0.0, count=1)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("items", [1, 2, 3, 7])
def test_every_item_counts_once_and_all_processes_have_as_many(monkeypatch, processes, items):
    shares = []
    for process in range(processes):
        monkeypatch.setattr(distributed, "count", lambda: processes)
        monkeypatch.setattr(distributed, "index", lambda process=process: process)
        shares.append(distributed.split(list(range(items))))
    assert sorted(item for share in shares for item, counts in share if counts) == list(range(items))
    assert len({len(share) for share in shares}) == 1


def test_configurations_that_are_not_used_here_are_refused(monkeypatch):
    for variable, message in (
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "set it to false"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    ):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv(variable, "true")
        with pytest.raises(GainLoRAError, match=f"launch.config: .*{message}"):
            distributed.join(torch.device("cpu"))


def gradients(root, monkeypatch, **options):
    """Of the second step, before clipping; the first one moves every parameter alike, so that none stays 0."""
    seen = []

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        seen.append([p.grad.clone() for p in parameters])
        for p in parameters:
            p.data += 0.05

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with tempfile.TemporaryDirectory() as folder:  # micro-batches do not name a run: each needs a folder of its own
            learn(copy_of(root, Path(folder) / "copy"), train__max_grad_norm=None, **options)
    return seen[1]


def test_accumulation_and_checkpointing_change_no_gradient(root, monkeypatch):
    """One example at a time, eight times, is eight at once; recomputed activations are the activations."""
    whole = gradients(root, monkeypatch, train__batch_size=8)
    assert all(gradient.abs().max() > 0 for gradient in whole)
    for options in ({"train__micro_batch_size": 1}, {"train__gradient_checkpointing": True}):
        for a, b in zip(gradients(root, monkeypatch, train__batch_size=8, **options), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_base_in_bfloat16_trains(root):
    """With accumulation and checkpointing, too: the loss falls, and what is learned is float32."""
    options = {"train__micro_batch_size": 2, "train__gradient_checkpointing": True, "train__epochs": 8}
    method = {"train__learning_rate": 0.03, "method": "gainlora-inclora"}
    with create(root, model__dtype="bfloat16", **method, **options) as run:
        run.seal(1)
        assert run._learner.model.base.dtype == torch.bfloat16
    losses = [record["loss"] for record in records(run.task_folder(1))]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_a_base_that_accelerate_dispatched_learns_the_same(root, tmp_path_factory, monkeypatch):
    """Its hooks bring inputs to each layer's device; here that is the CPU for all, so every bit is the same."""
    expected = learn(root, model__device_map="auto").task_folder(1)
    again = copy_of(root, tmp_path_factory.mktemp("again") / "copy")
    load, dispatched = loading.load_base, []

    def load_base(*arguments):
        base, tokenizer = load(*arguments)
        parts = {name: "cpu" for name, module in base.named_modules() if not list(module.children())}
        dispatched.append(dispatch_model(base, parts, force_hooks=True))
        return dispatched[-1], tokenizer

    monkeypatch.setattr(loading, "load_base", load_base)
    learned = learn(again, model__device_map="auto").task_folder(1)
    assert any(hasattr(module, "_hf_hook") for module in dispatched[0].modules())
    assert tensors(learned) == tensors(expected)


def test_a_run_folder_for_processes_started_by_hand(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    assert main(["run", "tiny", "--folder-only", "--set", "launch.num_processes=2"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.parent == root / "runs" and (folder / "config.json").exists()
    assert learn(root).folder == folder  # whatever the number of processes
