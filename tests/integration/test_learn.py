"""A run that lives on: taught by a deployment, by its inbox and by a command; and forgetting. Real servers."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from gainlora.io import lock

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect")]


@pytest.fixture(scope="module")
def lineage(served):
    """Name of a lineage whose run has learned two tasks."""
    served("gainlora", "run", "two", "--seed", "5")
    (folder,) = (served.folder / "runs").glob("two-*-5-*")
    return folder.name


def head(served, lineage):
    return served.read(f"runs/lineages/{lineage}.json")["head"]


def tasks(served, lineage):
    return served.read(f"runs/{head(served, lineage)}/result.json")["tasks"]


def recorded(served, run):
    """Status of an MLflow run, the step of its last AP, and its children."""
    ((run_id, status),) = served.query(
        "select run_uuid, status from runs join tags using (run_uuid) where key = 'gainlora.key' and value = ?", run
    )
    ((step,),) = served.query("select step from latest_metrics where run_uuid = ? and key = 'AP'", run_id)
    children = served.query(
        "select r.name from runs r join tags t on t.run_uuid = r.run_uuid "
        "where t.key = 'mlflow.parentRunId' and t.value = ? order by r.name",
        run_id,
    )
    return status, step, [name for (name,) in children]


def champion(served):
    """The run whose version it is."""
    ((run,),) = served.query(
        "select t.value from registered_model_aliases a join model_version_tags t on t.name = a.name "
        "and t.version = a.version where a.name = 'gainlora-two' and alias = 'champion' and t.key = 'gainlora.key'"
    )
    return run


def test_a_deployment_teaches_one_more_task_and_forget_takes_it_back(served, lineage):
    (result,) = served.folder.glob(f"runs/{lineage}/result.json")
    before = result.read_bytes()
    assert champion(served) == head(served, lineage) == lineage
    output = served(
        *("prefect", "deployment", "run", "learn-task", "--watch"),
        *("--param", f"run={lineage}", "--param", "task=data/tiny/task3"),
    )
    assert "learn/task" in output and "finished successfully" in output
    longer = head(served, lineage)
    assert longer != lineage and tasks(served, lineage) == ["task1", "task2", "task3"]
    assert recorded(served, longer) == ("FINISHED", 3, ["task_01_task1", "task_02_task2", "task_03_task3"])
    assert result.read_bytes() == before and recorded(served, lineage)[:2] == ("FINISHED", 2)
    promoted = champion(served) == longer
    if not promoted:
        served("gainlora", "promote", longer, "--reason", "it knows more")

    said = served("gainlora", "forget", lineage, "--last")
    assert f"forgot task3; now runs/{lineage}" in said and "champion of its order: version " in said
    assert head(served, lineage) == lineage == champion(served)
    assert not (served.folder / "runs" / longer).exists() and result.read_bytes() == before


def test_a_task_that_cannot_be_learned_leaves_the_lineage_as_it_was(served, lineage):
    (served.folder / "bad.json").write_text(json.dumps({"Definition": [""], "Instances": []}))
    before = sorted(path.name for path in (served.folder / "runs").iterdir())
    said = served("gainlora", "learn", lineage, "--task", "bad.json", code=1)
    assert said.startswith("error: bad.json: ")
    assert sorted(path.name for path in (served.folder / "runs").iterdir()) == before


def test_the_inbox(served, lineage):
    """Good tasks are learned one after the other, a bad one is put aside with its reason; an unfinished one and those
    of a busy run stay."""
    inbox, busy = served.folder / "inbox" / lineage, served.folder / "inbox" / "busy"
    shutil.copytree(served.folder / "runs" / lineage, served.folder / "runs" / "busy")
    for place in (inbox / "task3", inbox / "half", inbox / "task1", busy / "task3", inbox / ".hidden"):
        shutil.copytree(served.folder / "data" / "tiny" / "task3", place)
    (inbox / "half" / "test.json").unlink()
    rows = json.loads((inbox / "task3" / "train.json").read_text())["Instances"]
    pytest.importorskip("pandas").DataFrame([{"text": r["input"], "label": r["output"]} for r in rows]).to_csv(
        inbox / "task4.csv", index=False
    )
    for file in filter(Path.is_file, inbox.parent.rglob("*")):
        os.utime(file, (time.time() - 60,) * 2)
    with lock(served.folder / "runs" / "busy" / ".lock", "this run"):
        served("prefect", "deployment", "run", "inbox-watch", "--watch", code=1)
    state = served.last_flow_run()["state"]
    assert (
        state["type"] == "FAILED" and f"{lineage}/task1: inbox/{lineage}/task1: 'task1' is known to" in state["message"]
    )
    assert "half: waits for test.json" in state["message"]
    left = sorted(str(p.relative_to(inbox.parent)) for p in inbox.parent.glob("*/*"))
    assert left == sorted([f"{lineage}/{n}" for n in (".hidden", "done", "failed", "half")] + ["busy/task3"])
    assert "is known to" in (inbox / "failed" / "task1.txt").read_text()
    assert sorted(path.name for path in (inbox / "done").iterdir()) == ["task3", "task4.csv"]
    assert tasks(served, lineage) == ["task1", "task2", "task3", "task4"]
    assert recorded(served, head(served, lineage))[:2] == ("FINISHED", 4)


@pytest.mark.long
def test_two_processes_teach_it_too_and_a_repaired_run_learns_what_it_lacks(served):
    served("gainlora", "run", "two", "--seed", "6")
    (folder,) = (served.folder / "runs").glob("two-*-6-*")
    served.set(launch={"num_processes": 2})
    try:
        served("gainlora", "learn", folder.name, "--task", "data/tiny/task3")
    finally:
        served.set(launch={"num_processes": 1})
    longer = head(served, folder.name)
    scores = served.read(f"runs/{longer}/task_03_task3/scores.json")
    assert scores["num_processes"] == 2 and set(scores["scores"]) == {"task1", "task2", "task3"}

    kept = {p: p.read_bytes() for p in (folder / "result.json", folder / "task_02_task2" / "adapter_model.safetensors")}
    served("gainlora", "forget", folder.name, "--last")
    said = served("gainlora", "repair", folder.name, "--from-task", "2")
    assert f"1 good tasks; `gainlora learn runs/{folder.name}` learns the others again" in said
    for _ in range(2):  # the second time there is nothing left to learn
        served("gainlora", "learn", folder.name)
        assert {p: p.read_bytes() for p in kept} == kept
        assert recorded(served, folder.name)[:2] == ("FINISHED", 2)
