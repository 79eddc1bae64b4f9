"""A project folder of its own; one with a real Prefect server for all tests of a process that ask for it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

from tests.tiny import tiny_llama, tiny_params

ROOT = Path(__file__).parents[2]
SERVE = (sys.executable, "-m", "flows.server")
CONTINUAL = (sys.executable, "-m", "flows.continual", "tiny")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def answering(address, path, process, log=None):
    """The address, once a server that was started answers there."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address + path, timeout=5).close()
            return address
        assert process.poll() is None, log and log.read_text()
        time.sleep(0.2)
    raise AssertionError(f"nothing answers at {address}")


class Project:
    """A folder with the project's flows and an order `tiny` of three tasks. Options: dotted names with __ for dots."""

    def __init__(self, folder, model, **options):
        self.folder, self.port = folder, free_port()
        for name in ("prefect.toml", "prefect.yaml"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        tiny_params(folder, model, **options)
        ours = ("PREFECT_", "MLFLOW_", "DVC_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
            "PREFECT_PORT": self.port,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "true",
        }

    def start(self, *command):
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __call__(self, *command, code=0):
        """Run a command in the folder; its output, when its exit code is `code`."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=480)
        assert process.returncode == code, output
        return output

    def interrupt(self, *command, at, number=signal.SIGINT):
        """Start a command and send it a signal once files match the pattern `at`; exit code and output."""
        process = self.start(*command)
        self.wait_for(at, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def wait_for(self, pattern, process=None):
        """Until files match; the first of them."""
        end = time.monotonic() + 240
        while not (found := sorted(self.folder.glob(pattern))):
            assert time.monotonic() < end, pattern
            assert process is None or process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        return found[0]

    def set(self, **sections):
        """Lay sections over those of params.yaml."""
        path = self.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        for name, value in sections.items():
            params[name] = {**(params.get(name) or {}), **value} if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def read(self, pattern):
        """The JSON of the one file that matches."""
        (path,) = self.folder.glob(pattern)
        return json.loads(path.read_text())

    def api(self, path, **body):
        return self.post(f"{path}/filter", **body)

    def post(self, path, **body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def processes(self):
        """{name: process id} of the server and the runner."""
        record = json.loads((self.folder / ".prefect" / "server.json").read_text())
        return {name: int(record[name][0]) for name in ("server", "runner")}

    def last_flow_run(self):
        ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
        return self.api("flow_runs", flow_runs=ended, sort="END_TIME_DESC", limit=1)[0]

    def query(self, text, *values):
        with sqlite3.connect(self.folder / "mlruns" / "mlflow.db") as store:
            return store.execute(text, values).fetchall()

    def mlflow_runs(self):
        """{key (run id, with /step for a task): [status, ...]} of the store."""
        rows = self.query(
            "select value, status from runs join tags using (run_uuid) where key = 'gainlora.key' order by start_time"
        )
        return {name: [status for other, status in rows if other == name] for name, _ in rows}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory, model):
    """A project after `make serve JOBS=2`; its order `two` lacks the third task of `tiny`."""
    project = Project(
        tmp_path_factory.mktemp("served"),
        model,
        promote__max_forgetting=None,
        promote__min_gain=None,
        promote__max_general_loss=None,
    )
    orders = yaml.safe_load((project.folder / "params.yaml").read_text())["orders"]
    project.set(orders={"two": {**orders["tiny"], "tasks": ["task1", "task2"]}})
    try:
        assert "Prefect is ready" in project(*SERVE, "start", "2")
        yield project
    finally:
        started = [psutil.Process(pid) for pid in project.processes().values()]
        project(*SERVE, "stop")
        assert not [process for process in started if process.is_running()]
