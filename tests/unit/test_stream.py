"""Whole tiny streams: every method on both model families, what each rule promises, and resuming."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gainlora.config import load_config
from gainlora.errors import GainLoRAError
from gainlora.learning import stream as stream_module
from gainlora.learning.stream import Stream
from gainlora.model.gainlora_model import GainLoRAModel
from tests.tiny import tiny_llama, tiny_params, tiny_t5


def project(root: Path, kind: str = "llama", **options) -> Path:
    (tiny_t5 if kind == "t5" else tiny_llama)(root / "base")
    tiny_params(root, root / "base", **options)
    return root


def learn(root: Path, **overrides) -> Stream:
    options = {name.replace("__", "."): value for name, value in overrides.items()}
    stream = Stream.create(load_config("tiny", root / "params.yaml", options), root)
    for t in range(1, len(stream.tasks) + 1):
        stream.prepare(t)
        stream.train(t)
        stream.update(t)
        stream.evaluate(t)
        stream.finish(t)
    return stream


@pytest.fixture(scope="module", params=["llama", "t5"])
def root(request, tmp_path_factory):
    return project(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("method", ["seqlora", "inclora", "inflora", "gainlora-inclora", "gainlora-inflora"])
def test_a_stream_of_three_tasks(root, method):
    stream = learn(root, method=method)
    result = stream.result()
    assert [[s is not None for s in row] for row in result["R"]] == [[j <= i for j in range(3)] for i in range(3)]
    assert result["AP"] == pytest.approx(sum(result["R"][2]) / 3, abs=1e-3)
    assert json.loads((stream.folder / "result.json").read_text()) == result
    folders = [stream.task_folder(t) for t in (1, 2, 3)]
    branches = [load_file(f / "adapter_model.safetensors") for f in folders]
    name = next(n for n in branches[0] if n.endswith("lora_A"))
    B = name.replace("lora_A", "lora_B")
    if method == "seqlora":
        assert [len(b[name]) for b in branches] == [1, 1, 1]
        assert not torch.equal(branches[0][B], branches[2][B])
    else:
        assert [len(b[name]) for b in branches] == [1, 2, 3]
        for key in branches[0]:  # what was learned stays as it was
            assert torch.equal(branches[0][key], branches[2][key][:1])
    assert branches[-1][B].abs().max() > 0
    assert (folders[0] / "gate.safetensors").exists() == method.startswith("gainlora")
    sizes = [json.loads((f / "subspace.json").read_text()) for f in folders]
    if method.endswith("inflora"):
        for t in (1, 2):  # A_t outside the memory that stood when it was made; B_t alone trained
            memory = load_file(folders[t - 1] / "subspace.safetensors")
            for group in sizes[0]["layers"]:
                u = memory[f"layer.{group}.0"]
                assert (branches[t][f"{group}.lora_A"][t] @ u).abs().max() < 1e-5
                torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1]), atol=1e-5, rtol=0)
        assert all(sizes[2]["layers"][g] >= sizes[0]["layers"][g] >= 1 for g in sizes[0]["layers"])
    else:
        assert sizes[2]["layers"] == {}
    if method.startswith("gainlora"):
        gates = load_file(folders[2] / "gate.safetensors")
        for t in (1, 2):  # gate t moved, yet not along what gates 1..t-1 stored
            memory = load_file(folders[t - 1] / "subspace.safetensors")
            for layer in (1, 2):
                change = gates[f"hidden.{layer}"][t] - gates[f"hidden.{layer}"][t - 1]
                assert change.abs().max() > 1e-4
                assert (change @ memory[f"gate.{layer}"]).abs().max() < 1e-5
            key = gates["key"][t]
            assert (key @ memory["gate.3"]).abs().max() / key.norm() < 1e-5


def test_learning_happens(tmp_path):
    """The loss falls on every task, by a wide margin."""
    options = {"train__epochs": 12, "train__learning_rate": 0.05, "lora__rank": 4, "lora__alpha": 16}
    stream = learn(project(tmp_path), method="gainlora-inclora", **options)
    for t in (1, 2, 3):
        losses = [json.loads(line)["loss"] for line in (stream.task_folder(t) / "train.jsonl").read_text().splitlines()]
        assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(tmp_path):
    one, other = project(tmp_path / "one"), project(tmp_path / "other")
    first, second = learn(one).task_folder(3), learn(other, model__name=str(one / "base")).task_folder(3)
    third = learn(one, seed=2).task_folder(3)

    def content(folder):
        return [(folder / f"{n}.safetensors").read_bytes() for n in ("adapter_model", "gate", "subspace")]

    assert content(first) == content(second)
    assert content(first) != content(third)


@pytest.mark.parametrize("stop", [(2, "prepare"), (2, "train"), (2, "update"), (2, "evaluate"), (3, "update")])
def test_a_stopped_run_continues_to_the_same_end(tmp_path_factory, whole, stop):
    root, expected = whole
    resumed = tmp_path_factory.mktemp("resumed")
    shutil.copytree(root, resumed, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs"))
    task, last = stop
    code = (
        "import sys, os; from pathlib import Path\n"
        "from gainlora.config import load_config; from gainlora.learning.stream import Stream\n"
        "root = Path(sys.argv[1])\n"
        "s = Stream.create(load_config('tiny', root / 'params.yaml'), root)\n"
        "for t in range(1, 4):\n"
        "    for step in ('prepare', 'train', 'update', 'evaluate', 'finish'):\n"
        "        getattr(s, step)(t)\n"
        f"        if (t, step) == ({task}, {last!r}): os._exit(9)\n"
    )
    environment = {"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", code, str(resumed)], env=environment, check=False).returncode == 9
    kept = {f.name: f.stat().st_mtime_ns for f in resumed.glob("runs/*/task_*")}
    assert len(kept) == task - 1
    stream = learn(resumed)
    assert stream.result()["R"] == expected.result()["R"]
    for t in (1, 2, 3):
        for name in ("adapter_model.safetensors", "gate.safetensors", "subspace.safetensors"):
            assert (stream.task_folder(t) / name).read_bytes() == (expected.task_folder(t) / name).read_bytes()
    assert kept.items() <= {f.name: f.stat().st_mtime_ns for f in resumed.glob("runs/*/task_*")}.items()
    assert not list(stream.folder.glob(".task*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = project(tmp_path_factory.mktemp("whole"))
    params = (root / "params.yaml").read_text()
    # the base is named relative to nothing, so a copy of the folder uses the same one: one configuration, one digest
    assert str(root / "base") in params
    return root, learn(root)


def test_micro_batches_give_the_same_training(tmp_path):
    root = project(tmp_path)
    whole = learn(root).task_folder(1)
    split = learn(root, train__micro_batch_size=1).task_folder(1)
    losses = [
        [json.loads(line)["loss"] for line in (f / "train.jsonl").read_text().splitlines()] for f in (whole, split)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_changed_file_of_a_finished_task_is_named(tmp_path):
    stream = learn(project(tmp_path))
    path = stream.task_folder(2) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(GainLoRAError, match=r"task_02_task2/adapter_model\.safetensors: changed"):
        stream._loaded = None
        stream._model_after(2)


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    stream = learn(project(tmp_path))
    code = "import sys; from gainlora.learning.stream import Stream; Stream.open(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(stream.folder)], capture_output=True, text=True, check=False)
    assert "in progress already (process " in done.stderr and done.returncode != 0


def test_loss_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    root = project(tmp_path)
    with pytest.raises(GainLoRAError, match=r"task task1, step \d+: the loss is (nan|inf)"):
        learn(root, train__learning_rate=1e30, train__max_grad_norm=None, method="seqlora", train__epochs=4)


def test_incomplete_orders_are_refused_or_skipped(tmp_path):
    root = project(tmp_path)
    (root / "data" / "tiny" / "task2" / "train.json").unlink()
    with pytest.raises(GainLoRAError, match=r"task2.*train\.json"):
        learn(root)
    stream = learn(root, data__skip_incomplete=True)
    assert (stream.tasks, stream.skipped) == (["task1", "task3"], ["task2"])
    assert stream.horizon == 2
    assert stream_module.read_json(stream.folder / "config.json")["skipped"] == ["task2"]


def test_the_last_task_folder_is_a_model(tmp_path):
    stream = learn(project(tmp_path))
    model = GainLoRAModel.from_pretrained(stream.task_folder(3))
    assert model.config.tasks == ("task1", "task2", "task3") and model.branches == 3
