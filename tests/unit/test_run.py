"""Whole tiny runs: every method on both model families, what each rule promises, phases, locks, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gainlora import rules
from gainlora.data.tasks import load_order
from gainlora.errors import GainLoRAError, RunLocked
from gainlora.model.base import load_base
from gainlora.model.modeling import GainLoRAModel
from gainlora.runs.rerun import differences
from gainlora.runs.run import Run
from gainlora.training.callbacks import Callback, Console
from gainlora.training.learner import ContinualLearner
from tests.runs import config_of, create, learn, project, state, tensors
from tests.tiny import tiny_llama


@pytest.fixture(scope="module", params=["llama", "t5"])
def root(request, tmp_path_factory):
    return project(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("method", [m for m in rules.methods() if m != "multitask"])
def test_a_run_of_three_tasks(root, method):
    run = learn(root, method=method)
    result = json.loads((run.folder / "result.json").read_text())
    assert [[s is not None for s in row] for row in result["R"]] == [[j <= i for j in range(3)] for i in range(3)]
    assert result["AP"] == pytest.approx(sum(result["R"][2]) / 3, abs=1e-3)
    folders = [run.task_folder(t) for t in (1, 2, 3)]
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


def test_a_learner_in_memory_learns_what_a_run_learns(tmp_path):
    root = project(tmp_path / "project")
    run, config = learn(root), config_of(root)
    base, tokenizer = load_base(str(root / "base"), torch.float32)
    learner = ContinualLearner((base, tokenizer), config)
    tasks = load_order(config.order, config.data, root)[0]
    for task in tasks:
        learner.learn(task)
    learner.save(tmp_path / "adapter")
    assert tensors(tmp_path / "adapter") == tensors(run.task_folder(3))
    base, _ = load_base(str(root / "base"), torch.float32)
    loaded = ContinualLearner.load(tmp_path / "adapter", (base, tokenizer))
    for name, answers in loaded.predictions(tasks).items():
        lines = (run.task_folder(3) / "predictions" / f"{name}.jsonl").read_text().splitlines()
        inputs = [{"input": example.input} for example in tasks[int(name[-1]) - 1].test]
        wanted = [given | vars(answer) for given, answer in zip(inputs, answers, strict=True)]
        assert wanted == [json.loads(line) for line in lines]


def test_every_step_records_its_task_without_learning(tmp_path):
    """The base model's score, though branches are loaded, and that of the most frequent training label."""
    run = learn(project(tmp_path))
    fresh = create(tmp_path, seed=9)  # another run, without branches
    learner = fresh._learner_after(0)
    for t, (name, task) in enumerate(fresh.data.items(), start=1):
        row = json.loads((run.task_folder(t) / "scores.json").read_text())
        (answers,) = learner.predictions([task]).values()
        assert row["base"] == {name: pytest.approx(sum(a.score for a in answers) / len(answers))}
        labels = [example.references[0] for example in task.train]
        most = max(labels, key=labels.count)
        assert row["majority"] == {name: 100 * sum(most in e.references for e in task.test) / len(task.test)}
    fresh.close()


def test_callbacks_see_every_step_and_task(tmp_path):
    root = project(tmp_path)
    seen = []

    class Watching(Callback):
        def on_run_begin(self, run):
            seen.append(("run", len(run.steps)))

        def on_task_begin(self, t, name):
            seen.append(("begin", name))

        def on_step(self, record):
            seen.append(("step", record["step"]))

        def on_task_end(self, t, name, row):
            seen.append((name, list(row["scores"]), set(row["seconds"])))

        def on_run_end(self, result):
            seen.append(("end", result["tasks"]))

    with create(root) as run:
        run.learn([Watching()])
    tasks, seconds = ["task1", "task2", "task3"], {"prepare", "train", "update", "evaluate", "base", "before"}
    assert seen[0] == ("run", 3) and seen[-1] == ("end", tasks)
    assert [x for x in seen if x[0] == "begin"] == [("begin", task) for task in tasks]
    assert [x for x in seen if x[0] == "step"] == [("step", s) for s in (1, 2, 3)] * 3
    assert [x for x in seen if x[0] in tasks] == [(f"task{t}", tasks[:t], seconds) for t in (1, 2, 3)]


def test_a_task_that_falls_by_more_than_chance_is_named(tmp_path):
    run = learn(project(tmp_path))
    for t, scores in ((1, [100.0] * 8), (2, [100.0] * 7 + [0.0]), (3, [0.0, 100.0] + [0.0] * 6)):
        file = run.task_folder(t) / "predictions" / "task1.jsonl"
        lines = [
            {**json.loads(line), "score": s} for line, s in zip(file.read_text().splitlines(), scores, strict=True)
        ]
        file.chmod(0o644)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.falls(1) == run.falls(2) == {}  # one example of eight may fall by chance
    assert run.falls(3) == {"task1": (87.5, 12.5)}
    row = {"scores": {}, "AP": 0.0, "seconds": {}, "falls": run.falls(3)}
    assert "task1 fell from 87.5 to 12.5, more than by chance" in Console.line(3, 3, "task3", row)


def test_phases_return_at_once_where_their_work_is_done(tmp_path):
    root = project(tmp_path)
    expected = learn(root)
    with create(project(tmp_path / "again"), model__name=str(root / "base")) as run:
        for t in (1, 2, 3):
            for phase in ("begin", "train", "update", "evaluate", "seal"):
                for _ in range(2):
                    getattr(run, phase)(t)
    assert state(run) == state(expected)


def test_data_that_changed_under_a_run_are_named(tmp_path):
    root = project(tmp_path)
    with create(root) as run:
        run.seal(1)
    path = root / "data" / "tiny" / "task2" / "train.json"
    path.write_text(path.read_text().replace("w1", "w2"))
    with Run.open(run.folder) as run, pytest.raises(GainLoRAError, match=r"data/tiny/task2: changed since this run"):
        run.begin(2)


def test_a_run_without_a_task_that_is_incomplete(tmp_path):
    root = project(tmp_path)
    (root / "data" / "tiny" / "task2" / "train.json").unlink()
    run = learn(root, data__skip_incomplete=True)
    assert (run.tasks, run.horizon, run.described["skipped"]) == (["task1", "task3"], 2, ["task2"])


def test_another_base_model_in_the_same_place_is_another_run(tmp_path):
    root = project(tmp_path)
    first = learn(root, method="inclora")
    with create(root, seed=5) as begun:
        begun.seal(1)
    tiny_llama(root / "base", initializer_range=0.21)
    again = learn(root, method="inclora")
    assert again.folder != first.folder and state(again) != state(first)
    assert [line.split(":")[0] for line in differences(first.folder)] == ["base"]
    with (
        Run.open(begun.folder) as run,
        pytest.raises(GainLoRAError, match=f"a base model with other .* {root / 'base'}"),
    ):
        run.begin(2)
    with pytest.raises(GainLoRAError, match=rf"task_02_task2: was learned on .* than {root / 'base'} has; give the"):
        GainLoRAModel.from_pretrained(first.task_folder(2))


def test_a_second_process_on_a_run_is_refused(tmp_path):
    code = "import sys; from gainlora.runs.run import Run; Run.open(sys.argv[1])"
    with create(project(tmp_path)) as run:
        command = [sys.executable, "-c", code, str(run.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "RunLocked: " in done.stderr and "in progress already (process " in done.stderr
        with pytest.raises(RunLocked):
            Run.open(run.folder)
    (run.folder / "data.json").write_text("{}")
    with pytest.raises(GainLoRAError, match=r"data\.json") as kept:  # a traceback refers to what failed
        Run.open(run.folder)
    with pytest.raises(GainLoRAError, match=r"data\.json"):  # not: in progress
        Run.open(run.folder)
    assert kept.value.__traceback__


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(tmp_path):
    run = learn(project(tmp_path))
    described = json.loads((run.folder / "config.json").read_text())
    (run.folder / "config.json").write_text(json.dumps({k: v for k, v in described.items() if k != "ids"}))
    with pytest.raises(GainLoRAError, match=r"an earlier version made this run, .* run its order again"):
        Run.open(run.folder)
    assert GainLoRAModel.from_pretrained(run.folder).branches == 3


def test_loss_that_is_not_finite_is_refused(tmp_path):
    options = {"train__learning_rate": 1e9, "train__max_grad_norm": None, "train__epochs": 4}
    with pytest.raises(GainLoRAError, match=r"task task1, step \d+: the loss is (nan|inf)"):
        learn(project(tmp_path), method="seqlora", **options)


def test_ablations_lift_their_constraint_and_only_that(tmp_path):
    root = project(tmp_path)

    def leaks(**options):
        """How much of key 2, and of the change of gate 2's hidden layers, lies in the memory of task 1."""
        run = learn(root, method="gainlora-inclora", **options)
        gates = load_file(run.task_folder(2) / "gate.safetensors")
        memory = load_file(run.task_folder(1) / "subspace.safetensors")
        key, change = gates["key"][1], gates["hidden.1"][1] - gates["hidden.1"][0]
        return float((key @ memory["gate.3"]).norm() / key.norm()), float((change @ memory["gate.1"]).abs().max())

    assert max(leaks()) < 1e-5
    for first in ("random", "open"):
        key, change = leaks(gate__initial_key=first)
        assert key > 0.1 and change < 1e-5
    key, change = leaks(gate__constrain_update=False)
    assert change > 1e-4
