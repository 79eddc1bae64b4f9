"""The library: tasks are learned in memory, without a project; what it saves is what a run saves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gainlora import Callback, ContinualLearner, GainLoRAError, Task
from gainlora.cli import app
from gainlora.config import RunConfig
from gainlora.export.saved import open_saved
from gainlora.inference import Predictor, make_prompt
from tests.runs import learn, learner, project, rows, tensors
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def test_the_example_runs_anywhere_and_leaves_no_file(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "HF_HOME": str(tmp_path / "hub")}
    (tmp_path / "empty").mkdir()
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, ROOT / "examples" / "learn_in_memory.py"]
    done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "empty").iterdir())
    first, second = [line for line in done.stdout.splitlines() if line.startswith("task")]
    assert first.startswith("task 1 tickets | tickets ") and second.startswith("task 2 urgency | tickets ")
    assert "support" in done.stdout.splitlines()[-1]


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    notebook = json.loads((ROOT / "examples" / "learn_in_memory.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    program = "names = {}\nfor cell in __import__('json').loads(input()): exec(cell, names)\n"
    program += "print(names['learner'].accuracy_matrix, sorted(p.name for p in names['folder'].iterdir()))"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HF_HOME": str(tmp_path / "hub")}
    command, cwd = [sys.executable, "-c", program], tmp_path
    done = subprocess.run(command, cwd=cwd, env=environment, input=json.dumps(cells), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("[[100.0], [100.0, 100.0]]") and "adapter_model.safetensors" in last


def test_a_saved_learner_goes_on_where_it_stood(tmp_path):
    one, two = learner(), learner()
    for mine in (one, two):
        mine.learn(Task("task1", rows(0), rows(0), "Sort"))
    one.save(tmp_path / "adapter")
    loaded = ContinualLearner.load(tmp_path / "adapter", (tiny_llama(), tiny_tokenizer()), callbacks=[])
    assert loaded.evaluate() == one.evaluate() and loaded.accuracy_matrix == one.accuracy_matrix
    texts = ["w3 w4", "w1"]
    assert loaded.generate(texts) == one.generate(texts)
    scores = [mine.learn(Task("task2", rows(30), rows(30), "Sort")) for mine in (two, loaded)]
    assert scores[0] == scores[1] and list(scores[0]) == ["task1", "task2"]
    two.save(tmp_path / "two")
    loaded.save(tmp_path / "adapter")  # replaces the earlier state
    assert tensors(tmp_path / "two") == tensors(tmp_path / "adapter")


def test_a_saved_learner_is_a_released_adapter(tmp_path):
    base = tmp_path / "base"
    tiny_llama(base)
    mine = learner(base)
    for name, first in (("task1", 0), ("task2", 30)):
        mine.learn(Task(name, rows(first), rows(first), "Sort"))
    mine.save(tmp_path / "adapter")
    saved = open_saved(tmp_path / "adapter")
    assert saved.run.complete and [[*mine.accuracy_matrix[0], None], mine.accuracy_matrix[1]] == saved.run.R
    assert saved.run.data["task1"]["definition"] == "Sort" and saved.config.lora.rank == 2
    answers = Predictor(saved).answer([make_prompt(saved, text, "task2") for text in ("w3 w4", "w1")])
    told = mine.generate(["w3 w4", "w1"], task="task2")
    assert [answer.text for answer in answers] == told
    adapter = str(tmp_path / "adapter")
    assert CliRunner().invoke(app, ["predict", adapter, "--task", "task2", "w3 w4"]).output.strip() == told[0]
    for options in (["--branch", "task1"], ["--prompt", "w3 w4", "--task", "task2"]):
        done = CliRunner().invoke(app, ["export", adapter, *options, "--out", str(tmp_path / options[0])])
        assert done.exit_code == 0 and (tmp_path / options[0] / "adapter_model.safetensors").is_file(), done.output


def test_a_run_continues_in_memory(tmp_path):
    run = learn(project(tmp_path))
    loaded = ContinualLearner.load(run.folder, tmp_path / "base", callbacks=[])
    row = json.loads((run.task_folder(3) / "scores.json").read_text())
    assert loaded.evaluate() == row["scores"] and loaded.horizon == run.horizon
    assert list(loaded.learn(Task("task4", rows(0), rows(0)))) == [*run.tasks, "task4"]


def test_its_defaults_are_those_of_a_run():
    mine, order = learner(), {"name": "o", "data": "d", "template": "superni", "metric": "rouge_l", "tasks": ["a"]}
    plain = RunConfig.from_stored({"order": order, "train": {"min_steps": 64}}).learning()
    known = {"order", "model"}
    assert {k: v for k, v in RunConfig.of("m").learning().items() if k not in known} == {
        k: v for k, v in plain.items() if k not in known
    }
    assert (mine.config.lora.rank, mine.config.order.metric) == (2, "exact_match")
    assert learner(metric="rouge_l", train__batch_size=2).config.train.batch_size == 2


REFUSED = {
    "an unknown option": ({"ranks": 2}, "ranks: unknown option; did you mean 'rank'"),
    "an option of two sections": ({"batch_size": 2}, "batch_size: is train__batch_size or evaluate__batch_size"),
    "a wrong value": ({"rank": 0}, "lora.rank: got 0, expected 1 or more"),
    "an unknown method": ({"method": "lora"}, "method: 'lora' is unknown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_options_are_refused(case):
    options, message = REFUSED[case]
    with pytest.raises(GainLoRAError) as caught:
        learner(**options)
    assert message in str(caught.value)


def test_what_cannot_be_learned_changes_nothing(tmp_path):
    mine = learner()
    with pytest.raises(GainLoRAError, match="nothing is learned yet"):
        mine.save(tmp_path / "adapter")
    mine.learn(Task("task1", rows(0), rows(0), "Sort"))
    before = mine.evaluate()
    for bad, message in (
        (Task("task1", rows(9), rows(9)), "task task1: is learned already"),
        ([Task("a", rows(0), rows(0)), Task("b", rows(0), rows(0))], "learns one task at a time"),
        (Task("c", [{"text": "w1", "label": x} for x in ("unknown", "unseen")], rows(0)), "are the same tokens"),
    ):
        with pytest.raises(GainLoRAError, match=message):
            mine.learn(bad)
    assert mine.evaluate() == before and mine.stage == "ready"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(GainLoRAError, match="holds other files"):
        mine.save(tmp_path / "other")
    for name, message in (("../x", "cannot name a task"), ("few", "too few to hold one in 5 out to test")):
        with pytest.raises(GainLoRAError, match=message):
            Task(name, rows(0, 3))


def test_an_interrupted_evaluation_is_made_up_for_and_nothing_is_counted_without_it(tmp_path, monkeypatch):
    first, second, third = (Task(f"task{n}", rows(30 * n), rows(30 * n), "Sort") for n in range(3))
    whole, mine = learner(), learner()
    whole.learn(first)
    mine.learn(first)
    with monkeypatch.context() as patch:
        patch.setattr(ContinualLearner, "predictions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mine.learn(second)
    for refused in (lambda: mine.learn(third), lambda: mine.save(tmp_path / "adapter")):
        with pytest.raises(GainLoRAError, match="task1: learned, but not evaluated; `learn` it again"):
            refused()
    assert mine.learn(second) == whole.learn(second) and mine.accuracy_matrix == whole.accuracy_matrix
    mine.save(tmp_path / "adapter")
    assert mine.learn(third) == whole.learn(third)


def test_what_was_learned_with_held_out_examples_is_evaluated_after_loading(tmp_path):
    mine = learner(validation=0.2, keep="best")
    mine.learn(Task("task1", rows(0), rows(0), "Sort"))
    mine.save(tmp_path / "adapter")
    loaded = ContinualLearner.load(tmp_path / "adapter", (tiny_llama(), tiny_tokenizer()), callbacks=[])
    assert loaded.evaluate() == mine.evaluate()


ARGUMENTS = {
    "a task without a text as name": (lambda _: Task(5, rows(0)), "task: 5 cannot name a task"),
    "a file as rows": (lambda _: Task("t", Path("mine.csv")), "task t: train: .* give a list of dicts"),
    "no rows": (lambda _: Task("t", None), "task t: train: None: give a list of dicts"),
    "misspelled columns": (lambda _: Task("t", rows(0), columns={"inptu": "text"}), "columns: .* give the names"),
    "no base": (lambda _: ContinualLearner(None), "base: None: give a folder"),
    "no task": (lambda mine: mine.learn(None), "task: None: give a gainlora.Task"),
    "no tasks": (lambda mine: mine.learn([]), r"task: \[\]: give a gainlora.Task"),
    "a name to evaluate": (lambda mine: mine.evaluate(["task1"]), r"task: .*: give a gainlora.Task"),
    "texts that are none": (lambda mine: mine.generate([None]), r"texts: .* give a list of texts"),
    "no new tokens": (lambda mine: mine.generate(["w1"], max_new_tokens=0), "max_new_tokens: 0: give 1 or more"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments_are_named(case):
    call, message = ARGUMENTS[case]
    mine = learner()
    mine.entries["task1"] = {"definition": "Sort"}
    with pytest.raises(GainLoRAError, match=message):
        call(mine)


def test_a_base_model_serves_one_learner():
    base = (tiny_llama(), tiny_tokenizer())
    learner(base)
    with pytest.raises(GainLoRAError, match="holds the branches of another learner; load it anew"):
        learner(base)


def test_several_instructions_need_the_task_s_name():
    mine = learner()
    for name, text in (("task1", "Sort"), ("task2", "Sort task")):
        mine.learn(Task(name, rows(0), rows(0), text))
    with pytest.raises(GainLoRAError, match=r"name the one whose instruction to ask with.*task1, task2"):
        mine.generate(["w1"])
    asked = mine.generate(["w1 w2"], task="task2")
    assert asked == mine.generate(["Sort task\nw1 w2\nOutput: "])
    with pytest.raises(GainLoRAError, match=r"task: 'other' is not learned"):
        mine.generate(["w1"], task="other")


def test_all_tasks_at_once(tmp_path):
    mine = learner(method="multitask")
    scores = mine.learn([Task("task1", rows(0), rows(0)), Task("task2", rows(30), rows(30))])
    assert list(scores) == ["task1", "task2"] and mine.learned == 1
    mine.save(tmp_path / "adapter")
    assert open_saved(tmp_path / "adapter").run.at_once


def test_few_rows_get_more_epochs_and_limits_are_said():
    said = []

    class Listening(Callback):
        def on_note(self, text):
            said.append(text)

    mine = learner(min_steps=12, train_limit=16)
    mine.learn(Task("task1", rows(0), rows(0)), callbacks=[Listening()])
    assert len(mine.records) == 12 and said[1:] == ["task1: 16 of 20 train examples are used (data.train_limit)."]


def test_validation_compares_as_the_test_does_whatever_the_limits():
    rows = [{"input": f"number {i}", "output": ("-1", "1")[i % 2]} for i in range(20)]
    mine = learner(train_limit=1, validation=0.2, min_steps=1)
    mine.learn(Task("sign", rows, rows[:2], "Which sign?"))  # one label alone looks the same without punctuation
    assert mine.entries["sign"]["keep_punctuation"] and mine.validation.keep_punctuation == {"sign": True}


def test_mlflow_has_the_curves_and_scores_of_what_is_learned_in_memory(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from gainlora.tracking.in_memory import MlflowMetrics

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mine = learner(validation=0.2)
    with mlflow.start_run() as run:
        for name, first in (("task1", 0), ("task2", 30)):
            mine.learn(Task(name, rows(first), rows(first)), callbacks=[MlflowMetrics()])
        mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    losses = client.get_metric_history(run.info.run_id, "task2.loss")
    assert [m.value for m in losses] == [record["loss"] for record in mine.records]
    scores = [m.value for m in client.get_metric_history(run.info.run_id, "score.task1")]
    assert scores == [row[0] for row in mine.accuracy_matrix]
    assert {"AP", "FT", "task1.validation.score"} <= set(client.get_run(run.info.run_id).data.metrics)
