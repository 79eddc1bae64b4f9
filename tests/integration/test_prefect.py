"""Flows on a real Prefect server with its runner, a real MLflow store and a tiny random model."""

import json
import os
import shutil
import signal
import time

import psutil
import pytest

from tests.integration.conftest import CONTINUAL, SERVE, Project
from tests.servers import JSON, post

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect")]

TASKS = ["task1", "task2", "task3"]
RUN = ("prefect", "deployment", "run")


def param(**values):
    return [word for name, value in values.items() for word in ("--param", f"{name}={value}")]


def test_a_dashed_name_runs_an_order(served):
    given = param(order="tiny", method="seqlora", seed=3, train_limit=8)
    output = served(*RUN, "continual-order1", "--watch", *given)
    assert "continual/order1" in output and "finished successfully" in output

    run = served.last_flow_run()
    assert run["name"] == "tiny seqlora 3" and run["state"]["message"].startswith("AP ")
    of_run = {"id": {"any_": [run["id"]]}}
    steps = [step["name"] for step in served.api("task_runs", flow_runs=of_run, sort="EXPECTED_START_TIME_ASC")]
    phases = ("train", "update subspaces", "evaluate", "record")
    expected = [f"{phase} {t}/3 {name}" for t, name in enumerate(TASKS, 1) for phase in phases]
    assert steps == ["version data", *expected, "conclude"]
    artifacts = served.api("artifacts", flow_runs=of_run)
    assert [artifact["data"] for artifact in artifacts if artifact["type"] == "progress"] == [100]
    tables = sorted(a["data"] for a in artifacts if str(a["key"]).startswith("accuracy-matrix"))
    assert [table.count("\n") for table in tables] == [2, 3, 4] and "| task3 |" in tables[-1]

    (folder,) = (served.folder / "runs").glob("tiny-seqlora-*")
    result = json.loads((folder / "result.json").read_text())
    assert result["tasks"] == TASKS and [len(row) for row in result["R"]] == [3, 3, 3]
    assert served.mlflow_runs()[folder.name] == ["FINISHED"]
    assert not (served.folder / "metrics" / "tiny.json").exists()  # not what params.yaml describes


def test_bad_input_fails_a_run_at_once_with_its_one_message(served):
    message = "params.yaml: no order 'order2'; known: tiny, two; a file of your own ends in .yaml."
    (served.folder / "data" / "tiny").rename(served.folder / "data" / "away")
    try:
        said = served(*RUN, "continual-order1", *param(order="tiny"))
    finally:
        (served.folder / "data" / "away").rename(served.folder / "data" / "tiny")
    assert "error: orders.tiny.data: data/tiny: no such folder" in said and "Traceback" not in said
    state = served.last_flow_run()["state"]
    assert state["type"] == "FAILED" and state["message"].startswith("orders.tiny.data: data/tiny: no such folder")
    assert f"error: {message}" in served(*RUN, "continual/order2", "--watch", code=1)  # this params.yaml has none
    output = served(*CONTINUAL[:-1], "order2", code=1)
    assert f"error: {message}" in output and "Traceback" not in output
    assert "Deployment 'order1' not found!" in served(*RUN, "order1", code=1)

    (deployment,) = served.api("deployments", deployments={"name": {"any_": ["order2"]}})  # as the UI starts one
    queued = served.post(f"deployments/{deployment['id']}/create_flow_run")
    end = time.monotonic() + 300
    while (run := served.last_flow_run())["id"] != queued["id"]:
        assert time.monotonic() < end
        time.sleep(0.5)
    assert (run["state"]["type"], run["state"]["message"]) == ("FAILED", message)
    assert "Traceback" not in (served.folder / ".prefect" / "runner.log").read_text()


@pytest.mark.parametrize(
    "headers, code",
    [
        ({}, 200),
        ({"Host": "localhost:PORT"}, 200),
        ({"Origin": "http://localhost:PORT"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:PORT"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_the_server_answers_this_machine_only(served, headers, code):
    given = {name: value.replace("PORT", served.port) for name, value in headers.items()}
    assert post(f"http://127.0.0.1:{served.port}/api/flows/filter", {}, {**JSON, **given})[0] == code
    listening = psutil.Process(served.processes()["server"])
    assert {c.laddr.ip for c in listening.net_connections() if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_serving_twice_keeps_what_runs(served):
    record = (served.folder / ".prefect" / "server.json").read_text()
    served(*SERVE, "start")
    assert "the runner in this folder runs 2 at once" in served(*SERVE, "start", "3", code=1)
    assert (served.folder / ".prefect" / "server.json").read_text() == record


def test_another_folders_server_is_not_used(served, tmp_path, model):
    """It answers at this folder's port; its flows would read the other folder's params.yaml."""
    other = Project(tmp_path, model)
    other.environment["PREFECT_PORT"] = served.port
    said = other(*RUN, "continual-order1", code=1)
    assert said.startswith("error: PREFECT_API_URL: no Prefect server answers for this folder; start one: make serve.")
    assert "another Prefect server answers; end it, or take another port" in other(*SERVE, "start", code=1)
    shutil.copytree(served.folder / ".prefect", tmp_path / ".prefect", dirs_exist_ok=True)  # as a copied folder has it
    assert other(*SERVE, "stop") == "" and all(map(psutil.pid_exists, served.processes().values()))
    url = other.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{served.port}/api"
    assert f"{url}: belongs to {served.folder}: its deployments run there" in other(*RUN, "continual-any", code=1)
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_is_recorded_and_the_same_command_resumes(served):
    served.set(train={"epochs": 8})
    code, output = served.interrupt(*CONTINUAL, at="runs/tiny-gainlora-inflora-*-1-*/task_01_*")
    (folder,) = (served.folder / "runs").glob("tiny-gainlora-inflora-*-1-*")
    assert code == 130 and "the same command resumes" in output, output
    assert served.mlflow_runs()[folder.name] == ["KILLED"]
    before = (folder / "task_01_task1" / "scores.json").stat().st_mtime_ns

    assert "temporary server" not in served(*CONTINUAL)
    assert (folder / "task_01_task1" / "scores.json").stat().st_mtime_ns == before
    assert served.mlflow_runs()[folder.name] == ["FINISHED"]
    assert served.read("metrics/tiny.json") == served.read(f"runs/{folder.name}/result.json")
    assert served.last_flow_run()["state"]["type"] == "COMPLETED"


# -- long ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_several_processes_end_with_the_flow_and_resume_with_it(served):
    options = {"launch.num_processes": 2, "train.epochs": 20, "train.checkpoint_every": 10}
    given = param(order="tiny", seed=11, method="multitask", overrides=json.dumps(options))
    process = served.start(*RUN, "continual-any", "--watch", *given)
    found = served.wait_for("runs/tiny-multitask-*-11-*/.task_01_*/checkpoint_*", process)
    learning = [p for p in psutil.process_iter(["cmdline"]) if str(found.parents[1]) in (p.info["cmdline"] or ())]
    assert len(learning) == 2
    served("prefect", "flow-run", "cancel", served.api("flow_runs", sort="START_TIME_DESC")[0]["id"])
    process.communicate(timeout=90)
    assert not psutil.wait_procs(learning, timeout=30)[1]
    served(*RUN, "continual-any", "--watch", *given)
    scores = served.read("runs/tiny-multitask-*-11-*/task_01_all_tasks/scores.json")
    assert scores["num_processes"] == 2 and served.mlflow_runs()[found.parents[1].name] == ["FINISHED"]


@pytest.mark.long
def test_a_run_outlives_its_server_and_needs_no_proxy(served):
    """The server is killed in the middle of a run, and started again when all is learned. No local server is asked
    for through the proxy, at which nothing answers."""
    dead = "http://127.0.0.1:9"
    served.environment |= {"HTTP_PROXY": dead, "http_proxy": dead, "ALL_PROXY": dead, "all_proxy": dead}
    try:
        served(*SERVE, "stop")
        served(*SERVE, "start", "2")
        overrides = json.dumps({"train.epochs": 40})
        served(*RUN, "continual-any", *param(order="tiny", seed=61, overrides=overrides))
        before = served.processes()
        served.wait_for("runs/tiny-*-61-*/task_01_*")
        os.kill(before["server"], signal.SIGKILL)
        served.wait_for("runs/tiny-*-61-*/result.json")
        served(*SERVE, "start")
        after = served.processes()
        assert after.pop("server") != before.pop("server") and after == before  # the runner was not touched
        end = time.monotonic() + 240
        while (run := served.last_flow_run())["name"] != "tiny 61":
            assert time.monotonic() < end
            time.sleep(1)
    finally:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            served.environment.pop(name, None)
    assert run["state_type"] == "COMPLETED" and run["state"]["message"].startswith("AP ")
    (folder,) = served.folder.glob("runs/tiny-*-61-*")
    assert served.mlflow_runs()[folder.name] == ["FINISHED"]


@pytest.mark.long
def test_a_run_learns_once_at_a_time(served):
    """The runner takes two: the same run is refused meanwhile, another one is not."""
    given = param(order="tiny", overrides=json.dumps({"train.epochs": 3000}))
    for seed in (71, 72):
        served(*RUN, "continual-any", *given, *param(seed=seed))
    for seed in (71, 72):
        served.wait_for(f"runs/tiny-*-{seed}-*/.task_01_*")
    said = served("gainlora", "run", "tiny", "--seed", "71", "--set", "train.epochs=3000", code=1)
    assert "this run is in progress already (process " in said
    for run in served.api("flow_runs", flow_runs={"state": {"type": {"any_": ["RUNNING"]}}}):
        served("prefect", "flow-run", "cancel", run["id"])
    end = time.monotonic() + 300
    while served.api("flow_runs", flow_runs={"state": {"type": {"any_": ["RUNNING", "CANCELLING"]}}}):
        assert time.monotonic() < end
        time.sleep(1)
    folders = [folder.name for seed in (71, 72) for folder in served.folder.glob(f"runs/tiny-*-{seed}-*")]
    assert len(folders) == 2
    while not all(served.mlflow_runs()[name] == ["KILLED"] for name in folders):  # Prefect's state may come first
        assert time.monotonic() < end, served.mlflow_runs()
        time.sleep(1)
