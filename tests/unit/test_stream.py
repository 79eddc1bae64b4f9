"""Whole tiny streams: every method on both model families, what each rule promises, and resuming."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gainlora import rules
from gainlora.errors import GainLoRAError
from gainlora.learning import evaluate
from gainlora.learning import stream as stream_module
from gainlora.learning.rerun import differences
from gainlora.learning.run_folder import hold
from gainlora.learning.stream import Stream
from gainlora.model.gainlora_model import GainLoRAModel
from gainlora.params import load_config
from tests.tiny import tiny_llama, tiny_params, tiny_t5


def project(root: Path, kind: str = "llama", **options) -> Path:
    (tiny_t5 if kind == "t5" else tiny_llama)(root / "base")
    tiny_params(root, root / "base", **options)
    return root


def learn(root: Path, **overrides) -> Stream:
    options = {name.replace("__", "."): value for name, value in overrides.items()}
    stream = Stream.create(load_config("tiny", root / "params.yaml", options), root)
    for t in range(1, len(stream.steps) + 1):
        stream.prepare(t)
        stream.train(t)
        stream.update(t)
        stream.evaluate(t)
        stream.finish(t)
    return stream


@pytest.fixture(scope="module", params=["llama", "t5"])
def root(request, tmp_path_factory):
    return project(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("method", [m for m in rules.methods() if m != "multitask"])
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
    if rules.get(method).shared:
        assert [len(b[name]) for b in branches] == [1, 1, 1]
        assert not torch.equal(branches[0][B], branches[2][B])
    else:
        assert [len(b[name]) for b in branches] == [1, 2, 3]
        bound = torch.linalg.norm(branches[-1][name][0], dim=-1) * 3**0.5  # InfLoRA's rows: 1 / sqrt(3), untrained
        assert torch.allclose(bound, torch.ones(2), atol=1e-4) == method.endswith("inflora")
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


@pytest.mark.parametrize("kind", ["llama", "t5"])  # T5 has dropout, which draws random numbers
def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(tmp_path, kind):
    one, other = project(tmp_path / "one", kind), project(tmp_path / "other", kind)
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
        "from gainlora.params import load_config; from gainlora.learning.stream import Stream\n"
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


def memory_sizes(stream: Stream, t: int) -> dict:
    return json.loads((stream.task_folder(t) / "subspace.json").read_text())


def test_thresholds_energy_and_schedule_decide_how_much_is_remembered(tmp_path):
    root = project(tmp_path)
    low = memory_sizes(learn(root), 3)
    gate = learn(root, subspace__gate_threshold=0.9999)  # after task 1 each shows in its own memory only
    first = memory_sizes(learn(root), 1)
    assert memory_sizes(gate, 1)["gate"]["3"] > first["gate"]["3"]
    assert memory_sizes(gate, 1)["layers"] == first["layers"]
    layers = memory_sizes(learn(root, subspace__threshold=0.97), 1)
    assert sum(layers["layers"].values()) > sum(first["layers"].values()) and layers["gate"] == first["gate"]
    energy = memory_sizes(learn(root, subspace__energy="representation", subspace__threshold=0.6), 1)
    assert energy["layers"] != memory_sizes(learn(root, subspace__threshold=0.6), 1)["layers"]
    flat = memory_sizes(learn(root, subspace__horizon=1000), 3)  # the threshold hardly rises
    assert sum(flat["layers"].values()) < sum(low["layers"].values())


def test_ablations_lift_their_constraint_and_only_that(tmp_path):
    root = project(tmp_path)

    def leaks(**options) -> tuple[float, float]:
        """How much of key 2, and of the change of gate 2's hidden layers, lies in the memory of task 1."""
        stream = learn(root, method="gainlora-inclora", **options)
        gates = load_file(stream.task_folder(2) / "gate.safetensors")
        memory = load_file(stream.task_folder(1) / "subspace.safetensors")
        key, change = gates["key"][1], gates["hidden.1"][1] - gates["hidden.1"][0]
        return float((key @ memory["gate.3"]).norm() / key.norm()), float((change @ memory["gate.1"]).abs().max())

    assert max(leaks()) < 1e-5
    key, change = leaks(gate__constrain_init=False)
    assert key > 0.1 and change < 1e-5
    key, change = leaks(gate__constrain_update=False)
    assert change > 1e-4


def test_blocks_depths_scores_and_bfloat16_run_a_stream(tmp_path):
    root = project(tmp_path)
    options = {"subspace__covariance_blocks": 2, "gate__depth": 3, "gate__score": "linear", "model__dtype": "bfloat16"}
    stream = learn(root, subspace__threshold=0.5, **options)
    state = load_file(stream.task_folder(3) / "subspace.safetensors")
    adapter = load_file(stream.task_folder(3) / "adapter_model.safetensors")
    assert {t.dtype for t in [*state.values(), *adapter.values()]} == {torch.float32}
    for group in json.loads((stream.task_folder(3) / "subspace.json").read_text())["layers"]:
        old = load_file(stream.task_folder(2) / "subspace.safetensors")
        u = torch.block_diag(old[f"layer.{group}.0"], old[f"layer.{group}.1"])
        assert (adapter[f"{group}.lora_A"][2] @ u).abs().max() < 1e-5


def test_a_step_that_failed_half_way_is_taken_again_from_its_start(tmp_path, monkeypatch):
    root = project(tmp_path)
    expected = learn(root).task_folder(1)
    stream = Stream.create(load_config("tiny", root / "params.yaml", {"data.test_limit": 7}), root)  # same training
    stream.prepare(1)
    with monkeypatch.context() as patch:
        patch.setattr(stream_module.GainLoRAModel, "forward", _fails_at(2, GainLoRAModel.forward))
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.train(1)
    with monkeypatch.context() as patch:
        patch.setattr(stream_module, "flush", _full_disk)
        with pytest.raises(OSError, match="No space"):
            stream.update(1)
    stream.update(1)
    stream.evaluate(1)
    for name in ("adapter_model.safetensors", "gate.safetensors", "subspace.safetensors"):
        assert (stream.finish(1) / name).read_bytes() == (expected / name).read_bytes()


def _fails_at(step: int, forward):
    count = 0

    def failing(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == step:
            raise RuntimeError("out of memory")
        return forward(self, *args, **kwargs)

    return failing


def _full_disk(folder):
    raise OSError("No space left on device")


def test_data_that_changed_under_a_run_are_named(tmp_path):
    root = project(tmp_path)
    stream = Stream.create(load_config("tiny", root / "params.yaml"), root)
    path = root / "data" / "tiny" / "task2" / "train.json"
    path.write_text(path.read_text().replace("w1", "w2"))
    with pytest.raises(GainLoRAError, match=r"data/tiny/task2: changed since this run began"):
        stream.prepare(1)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    root = project(tmp_path)
    path = root / "base" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(GainLoRAError, match=r"model\.name: .*weights lack model\.layers\.1\.self_attn\.q_proj"):
        learn(root)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(GainLoRAError, match=r"model\.name: .*cannot be loaded"):
        learn(root)


def test_another_base_model_in_the_same_place_is_another_run(tmp_path):
    root = project(tmp_path)
    first = learn(root)
    tiny_llama(root / "base", initializer_range=0.21)
    again = Stream.create(load_config("tiny", root / "params.yaml"), root)
    assert again.folder != first.folder and again.finished == 0
    assert [line.split(":")[0] for line in differences(first.folder)] == ["base"]
    first._loaded = None
    for k in (0, 2):
        with pytest.raises(GainLoRAError, match=rf"{first.folder}: was begun on a base .* than {root / 'base'} has"):
            first._model_after(k)
    first.base = None  # a run of a version that did not name it
    with pytest.raises(GainLoRAError, match=rf"task_02_task2: was learned on .* than {root / 'base'} has; give the"):
        first._model_after(2)


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


def test_a_run_is_let_go_of_though_something_still_refers_to_it(tmp_path):
    """An error's traceback keeps what its frames refer to."""
    stream = learn(project(tmp_path))
    Stream.close_all()
    hold(stream.folder).close()
    (stream.folder / "data.json").write_text("{}")
    with pytest.raises(GainLoRAError, match=r"data\.json") as kept:
        Stream.open(stream.folder)
    hold(stream.folder).close()
    assert kept.value.__traceback__


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


def test_answers_may_be_as_long_for_every_task(tmp_path, monkeypatch):
    """Labels of a task are no limit: what runs on after a right label is wrong, and the limit would name the task."""
    stream = learn(project(tmp_path))
    limits, answer_batch = set(), evaluate.answer_batch

    def watched(model, tokenizer, rows, max_new_tokens, num_beams):
        limits.add(max_new_tokens)
        return answer_batch(model, tokenizer, rows, max_new_tokens, num_beams)

    monkeypatch.setattr(evaluate, "answer_batch", watched)
    assert stream.config.order.metric == "exact_match"
    for name in stream.tasks:
        stream._predict(name, 3)
    assert limits == {stream.config.data.max_target_tokens}
