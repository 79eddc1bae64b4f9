"""The flow on a real Prefect server with a real worker, a real MLflow store and a tiny random model."""

import json
import signal
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest

from gainlora import rules
from tests.integration.conftest import RUN_FLOW, SERVE, Project

pytestmark = pytest.mark.slow

TASKS = ["task1", "task2", "task3"]


def test_dashed_name_runs_the_order_on_the_worker(served):
    output = served(
        *("prefect", "deployment", "run", "continual-order1", "--watch"),
        *("--param", "order=tiny", "--param", "method=seqlora", "--param", "seed=3", "--param", "train_limit=8"),
    )
    assert "continual/order1" in output and "finished successfully" in output

    run = served.last_flow_run()
    assert run["parameters"]["method"] == "seqlora" and run["parameters"]["train_limit"] == 8
    of_run = {"id": {"any_": [run["id"]]}}
    steps = [step["name"] for step in served.api("task_runs", flow_runs=of_run, sort="EXPECTED_START_TIME_ASC")]
    phases = ["prepare branch", "train", "update subspaces", "evaluate seen tasks", "finish", "record"]
    expected = [f"{phase} {t}/3 {name}" for t, name in enumerate(TASKS, 1) for phase in phases]
    assert [step for step in steps if "/3 " in step] == expected
    artifacts = served.api("artifacts", flow_runs=of_run)
    assert [artifact["data"] for artifact in artifacts if artifact["type"] == "progress"] == [100]
    tables = sorted(a["data"] for a in artifacts if str(a["key"]).startswith("accuracy-matrix"))
    assert [table.count("\n") for table in tables] == [2, 3, 4] and "| 3 task3 |" in tables[-1]

    (folder,) = (served.folder / "runs").glob("tiny-seqlora-*")
    result = json.loads((folder / "result.json").read_text())
    assert result["tasks"] == TASKS and [len(row) for row in result["R"]] == [3, 3, 3]
    assert served.mlflow_runs()[folder.name] == ["FINISHED"]
    assert not (served.folder / "metrics" / "tiny.json").exists()  # not what params.yaml describes


def test_the_flow_runs_with_every_method(served):
    """In one process, as importing Prefect, MLflow and torch takes longer than learning."""
    code = (
        "from flows.continual import continual; from gainlora import rules\n"
        "for method in rules.methods(): continual(order='tiny', method=method, train_limit=8, seed=7)"
    )
    served.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{served.port}/api"
    try:
        served(sys.executable, "-c", code)
    finally:
        del served.environment["PREFECT_API_URL"]
    runs = served.mlflow_runs()
    for method in rules.methods():
        (folder,) = (served.folder / "runs").glob(f"tiny-{method}-*-7-*")
        result = json.loads((folder / "result.json").read_text())
        assert None not in result["R"][-1] and runs[folder.name] == ["FINISHED"]


def test_names(served):
    for name in ("continual-embedded", "continual-order4", "continual/order2"):
        output = served("prefect", "deployment", "run", name, "--start-in", "1 day")
        assert f"Creating flow run for deployment '{name.replace('-', '/')}'" in output
    for name in ("continual-order9", "order1", "continual-"):
        assert f"Deployment '{name}' not found!" in served("prefect", "deployment", "run", name, code=1)


def test_bad_input_fails_the_run_with_its_one_message(served):
    served("prefect", "deployment", "run", "continual/order2", "--watch", code=1)  # no such order in this params.yaml
    state = served.last_flow_run()["state"]
    assert state["type"] == "FAILED"
    assert state["message"] == "params.yaml: no order 'order2'; known: tiny; a file of your own ends in .yaml."
    assert served.flow(method="seqlor", code=1).strip().startswith("error: method: 'seqlor' is unknown; choose from")


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
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.port}/api/flows/filter",
        data=b"{}",
        headers={name: value.replace("PORT", served.port) for name, value in headers.items()},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            found = reply.status
    except urllib.error.HTTPError as error:
        found = error.code
    assert found == code
    listening = psutil.Process(json.loads((served.folder / ".prefect/server.json").read_text())["server"][0])
    assert {c.laddr.ip for c in listening.net_connections() if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_serving_twice_changes_nothing(served):
    record = (served.folder / ".prefect" / "server.json").read_text()
    served(*SERVE, "start")
    assert (served.folder / ".prefect" / "server.json").read_text() == record


def test_an_interrupted_run_is_marked_and_goes_on(served):
    parameters = json.dumps({"order": "tiny", "seed": 8})
    process = served.start(sys.executable, "-c", RUN_FLOW, parameters)
    output = ""
    while "task 1/3" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=60)[0]
    (folder,) = (served.folder / "runs").glob("tiny-gainlora-inflora-*-8-*")
    assert process.returncode == 130, output
    assert served.mlflow_runs()[folder.name] == ["KILLED"]
    before = (folder / "task_01_task1" / "scores.json").stat().st_mtime_ns

    assert "finished before" in served.flow(seed=8)
    assert (folder / "task_01_task1" / "scores.json").stat().st_mtime_ns == before
    assert served.mlflow_runs()[folder.name] == ["FINISHED"]


def test_several_processes_end_with_the_flow_and_go_on_with_it(served):
    options = {"launch.num_processes": 2, "train.epochs": 20, "train.checkpoint_every": 10}
    parameters = {"seed": 11, "method": "multitask", "overrides": options}
    process = served.start(sys.executable, "-c", RUN_FLOW, json.dumps({"order": "tiny", **parameters}))
    while not (found := list((served.folder / "runs").glob("tiny-multitask-*-11-*/.task_01_*/checkpoint_*"))):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert sum("gainlora.learning.worker" in child.cmdline() for child in children) == 3  # the launcher's line, too
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 130, output
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left

    output = served.flow(**parameters)
    assert [line.split(" |")[0] for line in output.splitlines() if line.startswith("task ")] == ["task 1/1 all_tasks"]
    folder = found[0].parents[1]
    scores = json.loads((folder / "task_01_all_tasks" / "scores.json").read_text())
    assert scores["num_processes"] == 2 and served.mlflow_runs()[folder.name] == ["FINISHED"]
    refused = served.flow(seed=12, overrides={"launch.num_processes": 9}, code=1)
    assert refused.strip().startswith("error: launch.num_processes: 9 cannot share the 8 examples of train.batch_size")


def test_without_a_server_the_command_says_so(tmp_path, model):
    project = Project(tmp_path, model)
    output = project("prefect", "deployment", "run", "continual-order1", code=1)
    assert output.splitlines() == [
        f"No Prefect server answers at http://127.0.0.1:{project.port}/api; start one with: make serve"
    ]


def test_without_a_server_the_flow_brings_its_own_and_ends_it(tmp_path, model):
    project = Project(tmp_path, model)
    output = project.flow()  # returns only when nobody holds the pipe any more
    assert [line.split(" |")[0] for line in output.splitlines() if line.startswith("task ")] == [
        f"task {t}/3 {name}" for t, name in enumerate(TASKS, 1)
    ]
    result = json.loads((tmp_path / "metrics" / "tiny.json").read_text())
    assert result["method"] == "gainlora-inflora" and len(result["R"]) == 3
    published = {path.name for path in (tmp_path / "adapters" / "tiny").iterdir()}
    assert {
        "adapter_model.safetensors",
        "gate.safetensors",
        "adapter_config.json",
        "run.json",
        "README.md",
    } <= published
    assert set(project.mlflow_runs().popitem()[1]) == {"FINISHED"}


def test_the_flow_ends_when_its_supervisor_is_killed(served):
    process = served.start(sys.executable, "-c", RUN_FLOW, json.dumps({"order": "tiny", "seed": 9}))
    end = time.monotonic() + 60
    while not (children := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < end:
        time.sleep(0.1)
    assert children
    process.kill()
    process.communicate(timeout=60)
    _, left = psutil.wait_procs(children, timeout=60)
    assert not left
