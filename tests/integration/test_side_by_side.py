"""Runs beside each other in one folder, and a Prefect server that goes away: nothing is mixed, nothing lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from gainlora.learning.stream import Stream
from gainlora.params import load_config
from tests.integration.conftest import ROOT, RUN_FLOW, SERVE, Project
from tests.tiny import tiny_tasks

pytestmark = pytest.mark.slow

STAGES = {
    "fetch": {"cmd": "mkdir -p data/fetched", "outs": ["data/fetched"]},
    "embedded": {
        "cmd": "gainlora run embedded",
        "deps": ["data/tiny"],
        "params": ["seed", "train", "orders.embedded"],
        "outs": ["adapters/embedded", {"metrics/embedded.json": {"cache": False}}],
    },
}


@pytest.fixture
def project(tmp_path, model):
    """A DVC project whose order `embedded` is tiny."""
    made = Project(tmp_path, model)
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    params["orders"] = {"embedded": params["orders"]["tiny"]}
    params["train"]["epochs"] = 20
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    for name in (".dvcignore", ".dvc/config", ".gitignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    made.environment["DVC_NO_ANALYTICS"] = "true"
    return made


def set_seed(project, seed):
    path = project.folder / "params.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "seed": seed}))


def read_until(process, text):
    output = ""
    while text not in output:
        line = process.stdout.readline()
        assert line, output
        output += line


def files(folder):
    """Learned tensors of a run folder, by their places."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.glob("task_*/*.safetensors"))}


def test_runs_and_dvc_repro_beside_each_other(project, tmp_path_factory, monkeypatch):
    """Three at once in one folder, each with a temporary server of its own: the same run is refused, another is not."""
    process = project.start(sys.executable, "-c", RUN_FLOW, json.dumps({"order": "embedded"}))
    read_until(process, "task 1/3")
    (flow,) = [p for p in psutil.Process(process.pid).children() if "flows.process" in p.cmdline()]
    flow.suspend()  # in the middle of training: with the run in its hands, but none of the locks that others wait for
    try:
        holder = f"in progress already (process {flow.pid} on {socket.gethostname()} since 20"
        output = project("dvc", "repro", code=255)
        assert holder in output and "failed to reproduce 'embedded'" in output

        set_seed(project, 2)
        project("dvc", "repro")
    finally:
        flow.resume()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output

    seeds = {json.loads(file.read_text())["seed"]: file.parent for file in project.folder.glob("runs/*/result.json")}
    assert set(seeds) == {1, 2}
    for file in ("metrics/embedded.json", "adapters/embedded/run.json"):  # params.yaml's configuration, no other
        assert json.loads((project.folder / file).read_text())["seed"] == 2
    assert "up to date" in project("dvc", "status")

    set_seed(project, 1)
    assert "finished before" in project(sys.executable, "-c", RUN_FLOW, json.dumps({"order": "embedded"}))
    assert json.loads((project.folder / "metrics" / "embedded.json").read_text())["seed"] == 1
    assert "up to date" in project("dvc", "status")  # recorded from outside `dvc repro`, too

    alone = tmp_path_factory.mktemp("alone")
    tiny_tasks(alone / "data" / "tiny")
    monkeypatch.chdir(project.folder)
    stream = Stream.create(load_config("embedded"), alone)
    for t in range(1, 4):
        stream.finish(t)
    assert files(stream.folder) == files(seeds[1]) and files(seeds[1]) != files(seeds[2])


def test_a_run_outlives_the_prefect_server(served):
    """The server is killed in the middle of a deployment run, and started again when all is learned."""
    overrides = json.dumps({"train.epochs": 40})
    parameters = ("--param", "order=tiny", "--param", "seed=61", "--param", f"overrides={overrides}")
    served("prefect", "deployment", "run", "continual-any", *parameters)
    before = served.processes()

    def wait_for(pattern):
        end = time.monotonic() + 240
        while not list(served.folder.glob(f"runs/tiny-*-61-*/{pattern}")):
            assert time.monotonic() < end
            time.sleep(0.1)

    wait_for("task_01_*")
    os.kill(before["server"], signal.SIGKILL)
    wait_for("result.json")
    served(*SERVE, "start")
    after = served.processes()
    assert after.pop("server") != before.pop("server") and after == before  # workers were not touched
    end = time.monotonic() + 240
    while True:
        (run,) = [run for run in served.api("flow_runs", sort="START_TIME_DESC") if run["name"] == "tiny 61"]
        if run["state_type"] not in ("RUNNING", "PENDING"):
            break
        assert time.monotonic() < end
        time.sleep(1)
    assert run["state_type"] == "COMPLETED" and run["state"]["message"].startswith("AP ")
    (folder,) = Path(served.folder, "runs").glob("tiny-*-61-*")
    assert served.mlflow_runs()[folder.name] == ["FINISHED"]


def test_two_workers_on_one_pool(served):
    """The second takes a run while the first stands still; then the first gets the same run, and another."""
    api = f"PREFECT_API_URL=http://127.0.0.1:{served.port}/api"
    first = psutil.Process(served.processes()["gainlora"])
    first.suspend()
    command = ("prefect", "worker", "start", "--pool", "gainlora", "--name", "second", "--limit", "1")
    second = served.start("env", api, *command)
    flow = None

    def submit(seed):
        overrides = json.dumps({"train.epochs": 40})
        given = ("--param", "order=tiny", "--param", f"seed={seed}", "--param", f"overrides={overrides}")
        served("prefect", "deployment", "run", "continual-any", *given)

    def states(seed):
        named = {"name": {"any_": [f"tiny {seed}"]}}
        runs = served.api("flow_runs", flow_runs=named, sort="EXPECTED_START_TIME_ASC")
        return [(run["state_type"], run["state"]["message"]) for run in runs]

    def wait_until(what):
        end = time.monotonic() + 240
        while not (found := what()):
            assert time.monotonic() < end and second.poll() is None
            time.sleep(0.1)
        return found

    def ended(seed, count):
        found = [state for state in states(seed) if state[0] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")]
        return found if len(found) == count else None

    try:
        submit(71)
        wait_until(lambda: list(served.folder.glob("runs/tiny-*-71-*/.task_02_*")))  # learning: it holds no other lock
        (flow,) = [p for p in psutil.Process(second.pid).children(recursive=True) if "prefect.engine" in p.cmdline()]
        flow.suspend()
        first.resume()
        submit(71)
        submit(72)
        (refused,) = wait_until(lambda: ended(71, 1))
        assert refused[0] == "FAILED" and f"in progress already (process {flow.pid} on " in refused[1]
        assert [state for state, _ in wait_until(lambda: ended(72, 1))] == ["COMPLETED"]
        flow.resume()
        assert sorted(state for state, _ in wait_until(lambda: ended(71, 2))) == ["COMPLETED", "FAILED"]
    finally:
        first.resume()
        for process in [flow, psutil.Process(second.pid)]:
            if process is not None and process.is_running():
                process.resume()
                process.terminate()
        second.communicate(timeout=60)
    folders = [folder for seed in (71, 72) for folder in served.folder.glob(f"runs/tiny-*-{seed}-*")]
    assert len(folders) == 2 and all((folder / "result.json").exists() for folder in folders)
    recorded = served.mlflow_runs()
    assert [recorded[folder.name] for folder in folders] == [["FINISHED"]] * 2
