"""Validation: which examples are held out, which state is kept; neither test data nor validation changes training."""

import json
import shutil
from contextlib import suppress

import pytest

from gainlora.data.tasks import DEV, hold_out, limited, read_task
from gainlora.data.validation import split_off
from gainlora.errors import GainLoRAError, format_error
from gainlora.sections import DataConfig
from gainlora.training import validation
from gainlora.training.checkpoint import Checkpoints
from gainlora.training.evaluate import Prediction
from tests.runs import copy_of, learn, project, records, state, tensors
from tests.tiny import tiny_params


def validated(run, t):
    return records(run.task_folder(t), "validation")


def rewrite(file, change):
    content = json.loads(file.read_text())
    content["Instances"] = [change(n, i) for n, i in enumerate(content["Instances"])]
    file.write_text(json.dumps(content))


def with_dev(root):
    """dev.json of every task as a set of its own: other inputs than test.json's."""
    for file in root.glob("data/tiny/*/dev.json"):
        rewrite(file, lambda n, i: {**i, "input": f"{i['input']} w{n % 60} w1"})


OPTIONS = {"count": 2, "train__learning_rate": 0.05, "train__epochs": 2}


@pytest.fixture(scope="module", params=["llama", "t5"])
def root(request, tmp_path_factory):
    return project(tmp_path_factory.mktemp(request.param), request.param, **OPTIONS)


@pytest.fixture
def copy(root, tmp_path):
    return copy_of(root, tmp_path / "copy")


@pytest.mark.parametrize("held_out", [0.25, "dev"])
def test_no_test_example_decides_what_is_learned(root, tmp_path, held_out):
    """Every test file replaced: the same tensors and curves, other scores."""
    one, other = (copy_of(root, tmp_path / name) for name in "ab")
    for copy in (one, other):
        with_dev(copy)
    for file in other.glob("data/tiny/*/test.json"):
        rewrite(file, lambda n, i: {"input": f"w{n} w59 w58", "output": ["off", "w7"]})
    options = {"data__validation": held_out, "train__keep": "best", "data__references": "sampled"}
    first = learn(one, **options)
    second = learn(other, **options)
    assert state(first) == state(second)
    assert all(validated(first, t) == validated(second, t) for t in (1, 2))
    asked = [(s.task_folder(2) / "predictions" / "task1.jsonl").read_text() for s in (first, second)]
    assert asked[0] != asked[1]


def test_validation_changes_nothing_but_what_is_kept(copy):
    """Random numbers (T5's dropout), modes and coefficients are as without it."""
    with_dev(copy)
    plain = learn(copy)
    watched = learn(copy, data__validation="dev")
    assert state(plain) == state(watched) and records(plain.task_folder(2)) == records(watched.task_folder(2))
    assert [row["step"] for row in validated(watched, 1)] == [2, 3, 5, 6]  # 2 epochs of 3 steps
    assert not (plain.task_folder(1) / "validation.jsonl").exists()


def test_the_best_state_is_kept_and_survives_a_stop(copy, monkeypatch):
    """Whatever step is the best, bit for bit the state of a run that ends there; a stopped run keeps the same one."""
    options = {"data__validation": 0.25, "train__keep": "best", "train__epochs": 3, "train__checkpoint_every": 1}
    options |= {"train__learning_rate": 0.3, "evaluate__batch_size": 2}
    whole = learn(copy, **options)
    for t in (1, 2):
        rows = validated(whole, t)
        best = max(rows, key=lambda row: (row["score"], -row["loss"]))
        scores = json.loads((whole.task_folder(t) / "scores.json").read_text())
        assert scores["validation"]["step"] == best["step"] == [row for row in rows if row["best"]][-1]["step"]
    expected = [(tensors(whole.task_folder(t)), validated(whole, t)) for t in (1, 2)]
    shutil.rmtree(copy / "runs")
    save, stops = Checkpoints.save, []

    def stopping(self, *arguments):
        save(self, *arguments)
        if len(stops) < 8:
            stops.append(len(arguments[3]))
            raise RuntimeError("stopped")

    monkeypatch.setattr(Checkpoints, "save", stopping)
    for _ in range(9):
        with suppress(RuntimeError):
            again = learn(copy, **options)
    assert len(stops) == 8
    assert [(tensors(again.task_folder(t)), validated(again, t)) for t in (1, 2)] == expected


def test_a_stop_in_validation_repeats_it(copy, monkeypatch):
    options = {"data__validation": 0.25, "train__keep": "best"}
    expected = learn(copy, **options)
    told, kept = [validated(expected, t) for t in (1, 2)], state(expected)
    shutil.rmtree(copy / "runs")
    evaluate, calls = validation.evaluate_task, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(validation, "evaluate_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(copy, **options)
    again = learn(copy, **options)
    assert [validated(again, t) for t in (1, 2)] == told and state(again) == kept


@pytest.mark.parametrize("scores, best", [([10, 50, 20, 20], 3), ([10, 50, 50, 50], None), ([0, 0, 0, 0], None)])
def test_the_kept_state_is_that_of_the_best_step(copy, monkeypatch, scores, best):
    """2 epochs of 3 steps; with the best step at the end of the first one, the state of a run of one epoch."""
    shorter = learn(copy, data__validation=0.25, train__epochs=1)
    given = iter(scores * 2)
    monkeypatch.setattr(validation, "evaluate_task", lambda *_: [Prediction("", [""], next(given), None)])
    stream = learn(copy, data__validation=0.25, train__keep="best")
    rows = validated(stream, 1)
    assert [(row["step"], row["score"]) for row in rows] == list(zip((2, 3, 5, 6), scores, strict=True))
    ties = [row for row in rows if row["score"] == max(scores)]
    chosen = json.loads((stream.task_folder(1) / "scores.json").read_text())["validation"]
    assert chosen["step"] == min(ties, key=lambda row: row["loss"])["step"] and best in (None, chosen["step"])
    assert (tensors(stream.task_folder(1)) == tensors(shorter.task_folder(1))) == (chosen["step"] == 3)


def test_patience_ends_a_task_that_grows_no_better(copy, monkeypatch):
    """Validations after steps 2, 3, 5 and 6 of 6: the second is the best, so the third ends the task."""
    given = {"keep": iter([10, 50, 20] * 4), "last": iter([10, 50, 20] * 4)}
    for keep, scores in given.items():
        monkeypatch.setattr(validation, "evaluate_task", lambda *_, s=scores: [Prediction("", [""], next(s), None)])
        options = {"train__keep": "best"} if keep == "keep" else {}
        stream = learn(copy, data__validation=0.25, train__patience=1, **options)
        assert [[row["step"] for row in records(stream.task_folder(t))] for t in (1, 2)] == [[1, 2, 3, 4, 5]] * 2
        assert [row["score"] for row in validated(stream, 1)] == [10, 50, 20]
    with pytest.raises(GainLoRAError, match=r"train\.patience: 1 needs validation examples"):
        learn(copy, train__patience=1)


def test_equal_inputs_are_held_out_together_in_any_order():
    inputs = [f"text {n}" for n in range(40)] + ["Text  6", "TEXT 13", "\uff54ext 16", "text 7"]
    held, twins = split_off(inputs, 0.2, "t"), {40: 6, 41: 13, 42: 16, 43: 7}
    assert held & twins.keys() == {n for n, first in twins.items() if first in held} == {40, 41, 42}  # equal inputs
    assert len(held - twins.keys()) == 8
    moved = split_off(inputs[::-1], 0.2, "t")  # not a matter of the file's order
    assert {inputs[::-1][n] for n in moved} == {inputs[n] for n in held}
    assert split_off(inputs, 0.2, "other") != held and held < split_off(inputs, 0.5, "t")
    assert [len(split_off(inputs[:n], f, "t")) for n, f in ((1, 0.5), (2, 0.9), (3, 0.01), (10, 0.25))] == [0, 1, 1, 2]


def test_limits_come_after(tmp_path):
    tiny_params(tmp_path, "m", count=1)
    folder, found = tmp_path / "data" / "tiny" / "task1", []
    plain = limited(read_task(folder, "long_sequence", "exact_match"), DataConfig(train_limit=5))
    assert plain.validation == ()
    for limit in (3, 10, None):
        data = DataConfig(validation=0.25, train_limit=limit, validation_limit=4)
        task = limited(hold_out(read_task(folder, "long_sequence", "exact_match"), folder, data), data)
        assert len(task.validation) == 4 and len(task.train) == (limit or 18)
        assert not {e.input for e in task.train} & {e.input for e in task.validation}
        assert task.validation_from == "train.json"
        found.append(task.validation)
    assert found[0] == found[1] == found[2]


def test_dev_json(tmp_path):
    tiny_params(tmp_path, "m", count=1)
    folder = tmp_path / "data" / "tiny" / "task1"
    read = read_task(folder, "long_sequence", "exact_match")
    shutil.copyfile(folder / "test.json", folder / DEV)  # as the benchmark had it
    with pytest.raises(GainLoRAError, match=r"data\.validation: dev: .*dev\.json shares 8 of its 8 inputs"):
        hold_out(read, folder, DataConfig(validation="dev"))
    carved = hold_out(read, folder, DataConfig(validation="auto"))
    assert (carved.validation_from, len(carved.validation)) == ("train.json", 5)
    rewrite(folder / DEV, lambda n, i: {**i, "input": i["input"].upper() if n == 3 else f"new {n}"})
    with pytest.raises(GainLoRAError, match="shares 1 of its 8 inputs"):  # case does not make it another
        hold_out(read, folder, DataConfig(validation="dev"))
    rewrite(folder / DEV, lambda n, i: {**i, "input": f"new {n}"})
    for option in ("dev", "auto"):
        task = hold_out(read, folder, DataConfig(validation=option))
        assert (task.validation_from, len(task.validation), task.train) == (DEV, 8, read.train)
        assert task.sha256 not in (read.sha256, carved.sha256)  # a run notices when the file changes
    content = json.loads((folder / DEV).read_text())
    (folder / DEV).write_text(json.dumps({**content, "Definition": ["Another"]}))
    with pytest.raises(GainLoRAError, match=r"dev\.json: 'Definition' differs from train\.json's"):
        hold_out(read, folder, DataConfig(validation="dev"))
    (folder / DEV).unlink()
    with pytest.raises(GainLoRAError, match=r"dev\.json: not found; set data\.validation") as caught:
        hold_out(read, folder, DataConfig(validation="dev"))
    assert format_error(str(caught.value)).endswith("troubleshooting.md#data")
    assert hold_out(read, folder, DataConfig(validation="auto")).validation_from == "train.json"
    rewrite(folder / "train.json", lambda n, i: {**i, "input": "the same"})
    with pytest.raises(GainLoRAError, match="has one input, so none can be held out"):
        hold_out(read_task(folder, "long_sequence", "exact_match"), folder, DataConfig(validation=0.5))


def test_the_published_protocol_trains_on_the_dev_json_that_was_split_off(tmp_path):
    """As the authors' correction moves a part of the training examples to dev.json."""
    root = project(tmp_path, protocols__published={}, **OPTIONS)
    folder = root / "data" / "tiny" / "task1"
    read, published = read_task(folder, "long_sequence", "exact_match"), DataConfig(protocol="published")

    def trained(data):
        task = hold_out(read, folder, data)
        return len(task.train), len(task.validation), [note for note in task.notes if note.startswith(DEV)]

    shutil.copyfile(folder / "test.json", folder / DEV)  # as the benchmark first had it
    assert trained(published) == (24, 0, [])
    rewrite(folder / DEV, lambda n, i: {**i, "input": f"new {n}"} if n else i)
    for data in (published, DataConfig(validation="auto")):
        assert ["1 of 8 inputs are also in test.json" in note for note in trained(data)[2]] == [True]
    rewrite(folder / DEV, lambda n, i: {**i, "input": f"new {n}"})
    assert trained(published)[:2] == (32, 0) and "8 instances" in trained(published)[2][0]
    assert trained(DataConfig(protocol="published", validation="dev")) == (24, 8, [])
    assert trained(DataConfig(protocol="published", validation=0.25))[:2] == (24, 8)
    assert trained(DataConfig(protocol="corrected")) == (24, 0, [])
    stream = learn(root, data__protocol="published")
    assert [stream.recorded[name]["train"] for name in stream.tasks] == [32, 32]
    assert sum("8 instances" in note for note in stream.notices) == 2  # once a task
    assert [row["step"] for row in records(stream.task_folder(1))] == list(range(1, 9))  # 2 epochs of 32 examples
