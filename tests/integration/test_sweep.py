"""Sweeps on a real Prefect server and two slots of a real worker: side by side, killed, resumed, one run failing."""

import json
import os
import signal
import sys
import time

import psutil
import pytest
import yaml

from tests.integration.conftest import Project

pytestmark = pytest.mark.slow

SWEEP = (sys.executable, "-m", "gainlora", "sweep")
PLAN = [
    {"order": "tiny", "methods": ["seqlora", "inclora", "olora"], "seeds": [51]},
    {"order": "gone.yaml", "methods": ["seqlora"], "seeds": [51], "label": "bad"},
]
WITH_PLAN = ("--plan", "plan.yaml", "--results", "out")


def of_sweeps(project):
    """The runs that sweeps submitted, oldest first."""
    of_folder = {"tags": {"all_": [f"sweep in {project.folder}"]}}
    return project.api("flow_runs", flow_runs=of_folder, sort="EXPECTED_START_TIME_ASC")


def wait_for(what, process):
    end = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.2)
    return found


def most_at_once(runs):
    moments = [(run["start_time"], 1) for run in runs] + [(run["end_time"], -1) for run in runs]
    level = peak = 0
    for _, step in sorted(moments):
        level += step
        peak = max(peak, level)
    return peak


def test_a_killed_sweep_goes_on_and_a_failing_run_stops_no_other(served):
    order = {"data": "data/gone", "template": "long_sequence", "metric": "exact_match", "tasks": ["task1"]}
    (served.folder / "gone.yaml").write_text(yaml.safe_dump(order))
    (served.folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    (served.folder / "data" / "gone" / "task1").mkdir(parents=True)

    # by the command line, which refuses missing data at once; the chosen part of the plan is killed without warning
    assert served(*SWEEP, *WITH_PLAN, code=1).startswith("error: orders.gone: incomplete in data/gone")
    process = served.start(*SWEEP, *WITH_PLAN, "tiny")
    wait_for(lambda: [run for run in of_sweeps(served) if run["state_type"] == "RUNNING"], process)
    refused = served(*SWEEP, "tiny", "--seeds", "52", code=1)
    assert "runs: a sweep is in progress already (process " in refused
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    killed = {run["id"] for run in of_sweeps(served)}
    assert len(killed) == 3

    # by name, on the server: what is left is ended, all are run (the killed one's result files are elsewhere)
    started = ("prefect", "deployment", "run", "sweep", "--watch")
    served(*started, "--param", "plan=plan.yaml", "--param", "results=done", code=1)
    runs = of_sweeps(served)
    assert {run["state_type"] for run in runs if run["id"] in killed} <= {"CANCELLED", "COMPLETED"}
    ours = {run["name"]: run for run in runs if run["id"] not in killed}
    assert {name: run["state_type"] for name, run in ours.items()} == {
        **{f"tiny {method} 51": "COMPLETED" for method in PLAN[0]["methods"]},
        "gone seqlora+bad 51": "FAILED",
    }
    assert most_at_once(ours.values()) == 2  # make serve JOBS=2
    state = served.last_flow_run()["state"]
    message = "1 of 4 runs failed. gone seqlora+bad 51: orders.gone: incomplete in data/gone"
    assert state["type"] == "FAILED" and state["message"].startswith(message)
    table = served.api("artifacts", artifacts={"key": {"any_": ["sweep"]}}, sort="CREATED_DESC", limit=1)[0]["data"]
    assert table.startswith("4 runs: ") and "3 completed" in table and "1 failed" in table
    assert "| tiny olora 51 | Completed | AP " in table and "| gone seqlora+bad 51 | Failed | orders.gone" in table

    files = sorted((served.folder / "done" / "tiny").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["inclora", "olora", "seqlora"]
    assert len(json.loads(files[0].read_text())["R"]) == 3 and (served.folder / "done" / "index.html").exists()
    for file in files:
        assert served.mlflow_runs()[json.loads(file.read_text())["run_id"]] == ["FINISHED"]

    # all there: nothing is submitted
    again = (*SWEEP, "--plan", "plan.yaml", "--results", "done")
    output = served(*again, "tiny")
    assert output.splitlines() == ["3 runs, 0 to do", "report: done/index.html"]
    assert len(of_sweeps(served)) == len(runs)
    listed = served(*again, "--list").splitlines()
    assert len(listed) == 4 and sum("# there: done/tiny/" in line for line in listed) == 3
    assert listed[0].startswith("gainlora run tiny --method seqlora --seed 51")


def test_a_sweep_without_a_server_brings_its_own_and_ends_it(tmp_path, model):
    project = Project(tmp_path, model)
    process = project.start(*SWEEP, "tiny", "--methods", "seqlora,inclora,olora", "--jobs", "2")
    wait_for(lambda: list(tmp_path.glob("runs/tiny-*/.lock")), process)
    family = [psutil.Process(pid) for pid in project.processes().values()]
    family += [child for parent in family for child in parent.children(recursive=True)]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "server ended" in output, output
    assert not psutil.wait_procs(family, timeout=30)[1]


def test_jobs_are_those_of_the_worker_that_is_there(served):
    assert "jobs: 3: the worker that is there runs 2 at once" in served(*SWEEP, "tiny", "--jobs", "3", code=1)
    threads = [psutil.Process(pid).environ()["OMP_NUM_THREADS"] for pid in served.processes().values()]
    assert threads == [os.environ["OMP_NUM_THREADS"]] * 3  # what the user set stays


def test_another_folders_server_is_not_this_ones(served, tmp_path, model):
    """Both would use the same port; the runs would be of the other folder's params.yaml."""
    other = Project(tmp_path, model)
    other.environment["PREFECT_PORT"] = served.port
    for command in ((*SWEEP, "tiny", "--seeds", "53"), ("prefect", "deployment", "run", "continual-any")):
        said = other(*command, code=1)
        assert f"/api: belongs to {served.folder}: its deployments run there; work in that folder" in said
    assert not list(served.folder.glob("runs/*-53-*"))
