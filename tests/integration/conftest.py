"""A project folder of its own; one with a real Prefect server for all tests of a process that ask for it."""

import json
import shutil
import sqlite3
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.servers import Commands, free_port, post
from tests.tiny import tiny_llama, tiny_params

ROOT = Path(__file__).parents[2]
SERVE = (sys.executable, "-m", "flows.server")
ANY = {"promote__max_forgetting": None, "promote__min_gain": None, "promote__max_general_loss": None}
"""Options with which every run is promoted that is no worse than the champion."""
CONTINUAL = (sys.executable, "-m", "flows.continual", "tiny")


class Project(Commands):
    """A folder with the project's flows and an order `tiny` of three tasks. Options: dotted names with __ for dots."""

    def __init__(self, folder, model, **options):
        self.port = free_port()
        super().__init__(folder, PREFECT_PORT=self.port)
        for name in ("prefect.toml", "prefect.yaml"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        tiny_params(folder, model, **options)

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
        status, content = post(f"http://127.0.0.1:{self.port}/api/{path}", body)
        assert status < 300, content
        return json.loads(content)

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
    project = Project(tmp_path_factory.mktemp("served"), model, **ANY)
    orders = yaml.safe_load((project.folder / "params.yaml").read_text())["orders"]
    project.set(orders={"two": {**orders["tiny"], "tasks": ["task1", "task2"]}})
    try:
        assert "Prefect is ready" in project(*SERVE, "start", "2")
        yield project
    finally:
        started = [psutil.Process(pid) for pid in project.processes().values()]
        project(*SERVE, "stop")
        assert not [process for process in started if process.is_running()]
