"""config.json is enough to repeat a run."""

import hashlib
import json
import random
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch

from gainlora.__main__ import main
from gainlora.config import RunConfig
from gainlora.errors import GainLoRAError
from gainlora.io import lock
from gainlora.runs.identity import PACKAGES, code_digest
from gainlora.runs.rerun import differences, rerun
from gainlora.training import learner
from gainlora.training.train import derive_seed
from tests.runs import flip, learn, project, state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    return learn(project(tmp_path_factory.mktemp("finished")), method="gainlora-olora").folder


def test_a_rerun_gives_every_score_and_every_tensor_again(finished, capsys):
    (finished.parent.parent / "params.yaml").write_text("orders: {}")  # the run's own description is all that counts
    assert main(["rerun", str(finished)]) == 0
    assert "the same result: every score and every tensor" in capsys.readouterr().out
    again = finished.with_name(f"{finished.name}.rerun")
    assert json.loads((again / "config.json").read_text())["run_id"] == again.name
    assert differences(finished) == []


def test_a_run_says_all_that_repeating_it_takes(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["seed"] == config["seed"] == 1
    assert (config["dtype"], config["device"], config["code"]) == ("float32", "cpu", code_digest())
    assert set(PACKAGES) == set(config["versions"]) and config["versions"]["torch"] == version("torch")
    assert RunConfig.from_stored(config["config"]).learning() == config["config"]  # complete, whatever later defaults
    data = json.loads((finished / "data.json").read_text())
    assert list(data) == config["tasks"]
    for name, entry in data.items():
        digest = hashlib.sha256()
        for file in ("train.json", "test.json"):
            content = (finished.parent.parent / entry["path"] / file).read_bytes()
            digest.update(hashlib.sha256(content).digest())
        assert entry["sha256"] == digest.hexdigest(), name


@pytest.mark.parametrize("method", ["gainlora-inflora", "olora"])
def test_a_tasks_randomness_comes_from_seed_and_task_alone(tmp_path, monkeypatch, method):
    """Whatever was drawn before, by anyone, in the process or an earlier one. T5 has dropout, which draws too."""
    root = project(tmp_path, "t5")
    expected = state(learn(root, method=method))
    shutil.rmtree(root / "runs")
    for name in ("prepare_task", "train_task", "update_memory", "evaluate_task"):
        original = getattr(learner, name)

        def scrambled(*arguments, original=original, **named):
            noise = random.SystemRandom().randrange(2**32)
            random.seed(noise)
            np.random.seed(noise)
            torch.manual_seed(noise)
            return original(*arguments, **named)

        monkeypatch.setattr(learner, name, scrambled)
    assert state(learn(root, method=method)) == expected
    draws = {derive_seed(seed, task, what) for seed in (1, 2) for task in (1, 2, 12) for what in ("train", "prepare")}
    assert len(draws) == 12


def test_what_differs_is_said(finished, tmp_path, capsys):
    root = shutil.copytree(finished.parent.parent, tmp_path / "copy")
    folder = root / "runs" / finished.name
    shutil.rmtree(folder.with_name(f"{folder.name}.rerun"), ignore_errors=True)
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    config["learning_version"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    scores = json.loads((folder / "task_02_task2" / "scores.json").read_text())
    scores["scores"]["task1"] = 99.5
    (folder / "task_02_task2" / "scores.json").chmod(0o644)
    (folder / "task_02_task2" / "scores.json").write_text(json.dumps(scores))
    flip(folder / "task_03_task3" / "gate.safetensors")
    assert main(["rerun", str(folder)]) == 1
    said = capsys.readouterr().out
    assert (
        "environment differs: torch: 1.0 then" in said
        and "environment differs: learning_version: 000000000000 then" in said
    )
    assert "after task_02_task2, score on task1: 99.5000 then" in said
    assert "result differs: task_03_task3/gate.safetensors: other bytes" in said
    assert said.count("result differs") == 2


def test_a_rerun_needs_a_run(tmp_path, finished):
    with pytest.raises(GainLoRAError, match=r"config\.json: not found"):
        rerun(tmp_path)
    with lock(finished / ".lock", "this run"):  # it is only read
        assert rerun(finished)[1] == []
