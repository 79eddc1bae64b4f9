"""An MLflow server that goes away or answers late: learning goes on, and everything is recorded once. `make ui`'s."""

import contextlib
import http.client
import os
import signal
import sqlite3
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from tests.integration.conftest import ANY, ROOT, Project
from tests.servers import JSON, answering, free_port, post

pytestmark = [pytest.mark.slow, pytest.mark.long]


class Server:
    """A real MLflow server with a database and a port of its own."""

    def __init__(self, folder, environment):
        self.folder, self.port = folder, free_port()
        self.environment = {**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def start(self, *command):
        place = ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "artifacts"]
        self.process = subprocess.Popen(
            command or ["mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", self.port, *place],
            env=self.environment, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        answering(f"http://127.0.0.1:{self.port}/health", self.process)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def query(self, text):
        (file,) = [*self.folder.glob("mlflow.db"), *self.folder.glob("mlruns/mlflow.db")]
        with sqlite3.connect(file) as database:
            return sorted(database.execute(text))

    def runs(self):
        """[(key, status)] of those that are not deleted."""
        found = "select value, status from runs join tags using (run_uuid) where key = 'gainlora.key'"
        return self.query(f"{found} and lifecycle_stage = 'active'")


@pytest.fixture
def project(tmp_path, model):
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project", model, **ANY)


@pytest.fixture
def server(project):
    made = Server(project.folder.parent, project.environment)
    made.start()
    yield made
    made.kill()


def names(folder):
    return [*(f"{folder.name}/task_0{t}_task{t}" for t in (1, 2, 3)), folder.name]


def test_it_may_go_away_and_come_back(project, server):
    """The same command delivers what it missed, once."""
    project.set(tracking={"uri": f"http://127.0.0.1:{server.port}"}, train={"epochs": 20})
    process = project.start("gainlora", "run", "tiny")
    output = ""
    while "task 1/3" not in output:
        output += process.stdout.readline()
    server.kill()
    output += process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    assert "MLflow did not take it" in output and "the same command delivers it later" in output
    (folder,) = (project.folder / "runs").glob("tiny-*")
    assert (folder / "result.json").exists() and (f"{folder.name}/task_03_task3", "FINISHED") not in server.runs()
    assert "no MLflow server answers" in project("gainlora", "run", "tiny", code=1)

    server.start()
    assert "did not take" not in project("gainlora", "run", "tiny")
    assert server.runs() == sorted((name, "FINISHED") for name in names(folder))


class Late(BaseHTTPRequestHandler):
    """Passes requests on at once, but what changes the store is answered when the client's patience has ended, the
    first time; the client asks again."""

    patience = 1.0
    asked: ClassVar[set] = set()

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        reply = upstream.getresponse()
        content = reply.read()
        if self.command in ("POST", "PATCH") and "/search" not in self.path and (self.path, body) not in self.asked:
            self.asked.add((self.path, body))
            time.sleep(1.5 * self.patience)
        with contextlib.suppress(OSError):  # nobody waits any more
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def late(project, server):
    """Address of a server that answers late, for an impatient client."""
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Late)
    proxy.upstream = int(server.port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    project.environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(int(Late.patience))
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()
    proxy.server_close()


def test_what_it_did_but_answered_too_late_is_not_there_twice(project, server, late):
    project.set(tracking={"uri": late})
    output = project("gainlora", "run", "tiny")
    assert "did not take" not in output and "promoted: " in output
    (folder,) = (project.folder / "runs").glob("tiny-*")
    assert server.runs() == sorted((name, "FINISHED") for name in names(folder))
    assert len(server.query("select run_uuid from runs")) > 4  # there were more; else the server was not late
    active = "tags join runs using (run_uuid) where lifecycle_stage = 'active' and key = 'gainlora.key'"
    ((parent,),) = server.query(f"select run_uuid from {active} and value = '{folder.name}'")
    assert server.query(f"select count(*) from metrics where run_uuid = '{parent}' and key = 'AP'") == [(3,)]
    assert server.query(f"select count(*) from inputs where destination_id = '{parent}'") == [(3,)]
    assert len(server.query("select name from logged_models where lifecycle_stage = 'active'")) == 3
    assert len(server.query("select version from model_versions where current_stage != 'Deleted_Internal'")) == 1


SENDERS = {
    ("Host", "127.0.0.1:PORT"): 200,
    ("Host", "localhost:PORT"): 200,
    ("Origin", "http://127.0.0.1:PORT"): 200,
    ("Host", "evil.example"): 403,
    ("Host", "127.0.0.1.evil.example:PORT"): 403,
    ("Origin", "https://evil.example"): 403,
    ("Origin", "null"): 403,
}
"""Header of a request -> what the server answers."""


def test_make_ui_answers_this_machine_only(project):
    """The command of the Makefile itself. A refused change is not made."""
    (project.folder / "mlruns").mkdir()
    server = Server(project.folder, project.environment)
    recipe = ["make", "-n", "-C", ROOT, "ui", f"UI_PORT={server.port}"]
    lines = subprocess.run(recipe, capture_output=True, text=True, check=True).stdout.replace("\\\n", "").splitlines()
    (line,) = [line for line in lines if "mlflow ui" in line]
    server.start("bash", "-c", line)
    try:
        codes = {}
        for name, value in SENDERS:
            headers = {**JSON, name: value.replace("PORT", server.port)}
            address = f"http://127.0.0.1:{server.port}/api/2.0/mlflow/experiments/create"
            codes[name, value], _ = post(address, {"name": value}, headers)
        assert codes == SENDERS
        made = {name for (name,) in server.query("select name from experiments")}
        assert made == {"Default", *(value for (_, value), code in SENDERS.items() if code == 200)}
    finally:
        server.kill()
