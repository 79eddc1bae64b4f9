"""A run that lives on: taught by a deployment, by its inbox and by a command; and forgetting. Real servers."""

import json
import os
import shutil
import sqlite3
import time

import pytest
import yaml

from gainlora.learning.run_folder import hold
from tests.integration.conftest import SERVE, Project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory, model):
    """A project after `make serve`, with a finished run of two tasks; the third lies outside its data."""
    project = Project(tmp_path_factory.mktemp("learn"), model)
    params = yaml.safe_load((project.folder / "params.yaml").read_text())
    params["orders"]["tiny"]["tasks"] = ["task1", "task2"]
    params["promote"] = {"max_forgetting": None}
    (project.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.move(project.folder / "data" / "tiny" / "task3", project.folder / "task3")
    try:
        project(*SERVE, "start")
        assert "promoted: the order has no champion yet" in project.flow()
        yield project
    finally:
        project(*SERVE, "stop")


def run_of(project):
    (folder,) = (project.folder / "runs").glob("tiny-*")
    return folder


def query(project, text, *values):
    with sqlite3.connect(project.folder / "mlruns" / "mlflow.db") as store:
        return store.execute(text, values).fetchall()


def parent(project):
    """Id of the run's own MLflow run, its last AP and step, and the names of its children."""
    name = run_of(project).name
    ((run_id,),) = query(project, "select run_uuid from runs where name = ?", name)
    ((step, AP),) = query(project, "select step, value from latest_metrics where run_uuid = ? and key = 'AP'", run_id)
    children = query(
        project,
        "select r.name from runs r join tags t on t.run_uuid = r.run_uuid "
        "where t.key = 'mlflow.parentRunId' and t.value = ? and r.lifecycle_stage = 'active' order by r.name",
        run_id,
    )
    return run_id, step, AP, [name for (name,) in children]


def champion(project):
    ((version,),) = query(project, "select version from registered_model_aliases where alias = 'champion'")
    return version


def test_a_deployment_teaches_one_more_task_and_forget_takes_it_back(served):
    folder, before = run_of(served), parent(served)
    kept = {p.name: p.read_bytes() for p in folder.glob("*.json")}
    assert (before[1], champion(served)) == (2, 1)
    arguments = ("--param", f"run=runs/{folder.name}", "--param", "task=task3")
    output = served("prefect", "deployment", "run", "learn-task", *arguments, "--watch")
    assert "learn/task" in output and "finished successfully" in output

    result = json.loads((folder / "result.json").read_text())
    run_id, step, AP, children = parent(served)
    assert result["tasks"] == ["task1", "task2", "task3"] and (run_id, step) == (before[0], 3)
    assert pytest.approx(result["AP"], abs=1e-3) == AP
    assert children == ["task_01_task1", "task_02_task2", "task_03_task3"]
    rows = query(served, "select value from tags where run_uuid = ? and key = 'learned later'", run_id)
    assert rows == [("task3",)]
    artifacts = served.api("artifacts", flow_runs={"id": {"any_": [served.last_flow_run()["id"]]}})
    by_key = {artifact["key"].split("-tiny")[0]: artifact["data"] for artifact in artifacts}
    assert by_key["progress"] == 100 and "| 3 task3 |" in by_key["accuracy-matrix"]
    assert "AP of 2 common tasks" in by_key["promotion"]
    assert champion(served) == (2 if "**promoted" in by_key["promotion"] else 1)

    first = champion(served)
    said = served("gainlora", "forget", f"runs/{folder.name}", "--last")
    assert "forgot task3" in said and ("version 1, this run as it is now" in said) == (first == 2)
    assert {p.name: p.read_bytes() for p in folder.glob("*.json")} == kept
    run_id, step, AP, children = parent(served)
    assert (step, AP, children) == (*before[1:3], ["task_01_task1", "task_02_task2"]) and run_id != before[0]
    aside = query(served, "select name from runs where name like '%(forgot task3, %'")
    assert len(aside) == 2 and champion(served) == 1
    assert "was the first champion" in served("gainlora", "rollback", "tiny", code=1)


def test_two_processes_teach_it_too(served):
    folder, before = run_of(served), (run_of(served) / "result.json").read_bytes()
    params = served.folder / "params.yaml"
    alone = params.read_text()
    params.write_text(yaml.safe_dump({**yaml.safe_load(alone), "launch": {"num_processes": 2, "config": None}}))
    try:
        served("gainlora", "learn", f"runs/{folder.name}", "--task", "task3")
    finally:
        params.write_text(alone)
    scores = json.loads((folder / "task_03_task3" / "scores.json").read_text())
    assert scores["num_processes"] == 2 and set(scores["scores"]) == {"task1", "task2", "task3"}
    assert json.loads((folder / "result.json").read_text())["tasks"] == ["task1", "task2", "task3"]
    served("gainlora", "forget", f"runs/{folder.name}", "--last")
    assert (folder / "result.json").read_bytes() == before


def test_a_run_that_was_repaired_learns_what_it_lacks(served):
    """The command needs no task, and no other command to be remembered."""
    folder, before = run_of(served), parent(served)
    kept = {p: p.read_bytes() for p in (folder / "result.json", folder / "task_02_task2" / "adapter_model.safetensors")}
    said = served("gainlora", "repair", f"runs/{folder.name}", "--from-task", "2")
    assert f"1 good tasks; the command that made the run, or `gainlora learn runs/{folder.name}` goes on" in said
    assert not (folder / "result.json").exists()
    for _ in range(2):  # the second time there is nothing left to learn
        served("gainlora", "learn", f"runs/{folder.name}")
        assert {p: p.read_bytes() for p in kept} == kept
        assert parent(served) == before


def test_the_inbox(served):
    """A good task is learned, a bad one put aside with its reason, an unfinished one and those of a busy run stay."""
    run = run_of(served)
    inbox, busy = served.folder / "inbox" / run.name, served.folder / "inbox" / "busy"
    shutil.copytree(run, served.folder / "runs" / "busy")
    for place in (inbox / "task3", inbox / "half", inbox / "task1", busy / "task3", inbox / ".hidden"):
        shutil.copytree(served.folder / "task3", place)
    (inbox / "half" / "test.json").unlink()
    for file in inbox.parent.rglob("*.json"):
        os.utime(file, (time.time() - 60,) * 2)
    with hold(served.folder / "runs" / "busy"):
        served("prefect", "deployment", "run", "inbox-watch", "--watch", code=1)
    assert f"{run.name}/task1: --task: 'task1': was learned by runs/" in served.last_flow_run()["state"]["message"]
    left = sorted(str(p.relative_to(inbox.parent)) for p in inbox.parent.glob("*/*"))
    assert left == sorted([f"{run.name}/{n}" for n in (".hidden", "done", "failed", "half")] + ["busy/task3"])
    assert "was learned by" in (inbox / "failed" / "task1.txt").read_text()
    assert (inbox / "done" / "task3" / "train.json").exists()
    assert json.loads((run / "result.json").read_text())["tasks"] == ["task1", "task2", "task3"]
    assert parent(served)[3] == ["task_01_task1", "task_02_task2", "task_03_task3"]


def test_a_task_that_cannot_be_learned_leaves_the_run_as_it_was(served):
    folder = run_of(served)
    before = {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    config = json.loads((folder / "config.json").read_text())
    config["config"]["train"] |= {"learning_rate": 1e30, "max_grad_norm": None, "epochs": 4}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    before[str(folder / "config.json")] = (folder / "config.json").read_bytes()
    said = served("gainlora", "learn", f"runs/{folder.name}", "--task", "task3/train.json", code=1)
    assert "task train, step" in said and "the loss is" in said
    assert {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == before
