"""A project folder of its own, with a real Prefect server and real workers where a test asks for them."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.tiny import tiny_llama, tiny_params

ROOT = Path(__file__).parents[2]
RUN_FLOW = "import json, sys; from flows.supervise import run_flow; sys.exit(run_flow(json.loads(sys.argv[1])))"
SERVE = (sys.executable, "-m", "flows.server")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Project:
    """A folder with the project's flows and an order `tiny`."""

    def __init__(self, folder, model):
        self.folder, self.port = folder, free_port()
        for name in ("prefect.toml", "prefect.yaml"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        tiny_params(folder, model)
        ours = ("PREFECT_", "MLFLOW_", "DVC_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
            "PREFECT_PORT": self.port,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self, *command):
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __call__(self, *command, code=0):
        """Run a command in the folder; its output, when its exit code is `code`."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == code, output
        return output

    def flow(self, code=0, **parameters):
        return self(sys.executable, "-c", RUN_FLOW, json.dumps({"order": "tiny", **parameters}), code=code)

    def api(self, path, **body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}/filter",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def processes(self):
        """{name: process id} of server and workers."""
        record = json.loads((self.folder / ".prefect" / "server.json").read_text())
        return {name: int(entry[0]) for name, entry in record.items() if isinstance(entry, list)}

    def last_flow_run(self):
        ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED"]}}}
        return self.api("flow_runs", flow_runs=ended, sort="END_TIME_DESC", limit=1)[0]

    def mlflow_runs(self):
        """{run name: [status, ...]} of the store."""
        with sqlite3.connect(self.folder / "mlruns" / "mlflow.db") as store:
            rows = store.execute("select name, status from runs order by start_time").fetchall()
        return {name: [status for other, status in rows if other == name] for name, _ in rows}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory, model):
    """A project after `make serve JOBS=2`."""
    project = Project(tmp_path_factory.mktemp("served"), model)
    try:
        assert "Prefect is ready" in project(*SERVE, "start", "2")
        yield project
    finally:
        record = project.processes()
        project(*SERVE, "stop")
        assert len(record) == 3 and not any(psutil.pid_exists(process) for process in record.values())
