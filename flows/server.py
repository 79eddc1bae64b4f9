"""The project's Prefect server and worker: found, started (`make serve`), ended (`make stop`).

    python -m flows.server start | stop

State lives in .prefect/ of the current folder: the database, server.log, worker.log and server.json
({"url", "server": [pid, start time], "worker": [pid, start time]}). A process is ended only when its id
and its start time are those recorded, so a reused process id is never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HOME = Path(".prefect")
RECORD = HOME / "server.json"
POOL = "gainlora"
START_SECONDS = 120.0  # on two busy cores the server has been seen to take 40 s


def default_url() -> str:
    """API address of `make serve`: port PREFECT_PORT, by default 4200, on this machine only."""
    return f"http://127.0.0.1:{_port()}/api"


def answers(url: str, seconds: float = 2.0) -> bool:
    """Whether a Prefect API answers at `url`."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=seconds) as reply:
            return bool(json.load(reply) is True)
    except (OSError, ValueError):
        return False


def find_server() -> str | None:
    """API address to use: PREFECT_API_URL as it is, else the running server of `make serve`, else None."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    recorded = _record().get("url")
    return next((url for url in (recorded, default_url()) if url and answers(url)), None)


def environment(url: str | None) -> dict[str, str]:
    """This process's environment for a Prefect child: state in .prefect, nothing reported home.

    The plugin (gainlora/prefect_plugin.py) is off in children: it is for the `prefect` a user types.
    """
    values = dict(os.environ)
    values.setdefault("PREFECT_HOME", str(HOME.resolve()))
    # Where the cores are shared, OpenMP's busy waiting costs far more than it saves: a step of 18 s took minutes.
    values.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    values |= {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_PLUGINS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(START_SECONDS)),
    }
    if url:
        values["PREFECT_API_URL"] = url
    return values


def start() -> int:
    """Server, work pool, deployments and one worker; returns 0 when all are ready, 1 with a message if not.

    What already runs is kept, so starting twice only renews the deployments.
    """
    HOME.mkdir(exist_ok=True)
    record, url = _record(), default_url()
    if not (record.get("url") == url and _process(record.get("server")) and answers(url)):
        if answers(url):
            print(f"{url}: another Prefect server answers; end it, or take another port: PREFECT_PORT=4300 make serve")
            return 1
        stop()
        server = _spawn(["server", "start", "--host", "127.0.0.1", "--port", _port()], url, "server")
        record = _write({"url": url, "server": server})
        if not _wait(lambda: answers(url), server, f"server at {url}"):
            return 1
    for command in (
        ["work-pool", "create", POOL, "--type", "process", "--overwrite"],
        ["deploy", "--all"],
    ):
        done = subprocess.run(_prefect(command), env=environment(url), capture_output=True, text=True)
        if done.returncode:
            print(f"prefect {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
            return 1
    if not _process(record.get("worker")):
        worker = _spawn(["worker", "start", "--pool", POOL, "--limit", "1", "--name", POOL], url, "worker")
        record = _write({**record, "worker": worker})
    if not _wait(lambda: _worker_online(url), record["worker"], "worker"):
        return 1
    print(f"Prefect is ready: {url.removesuffix('/api')}  (logs: {HOME}/server.log, {HOME}/worker.log)")
    print("Start a run:  prefect deployment run continual-embedded      End it all:  make stop")
    return 0


def stop() -> int:
    """End exactly what `start` started, with its children: the worker first, then the server."""
    import psutil

    record = _record()
    for name in ("worker", "server"):
        root = _process(record.get(name))
        if root is None:
            continue
        family = [*root.children(recursive=True), root]
        for process in family:
            _signal(process, psutil.Process.terminate)
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left:
            _signal(process, psutil.Process.kill)
        print(f"{name} ended (process {root.pid})")
    RECORD.unlink(missing_ok=True)
    return 0


def _port() -> str:
    return os.environ.get("PREFECT_PORT") or "4200"


def _prefect(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "prefect", "--no-prompt", *arguments]


def _spawn(arguments: list[str], url: str, name: str) -> list[float]:
    """Start a Prefect process of its own session; [pid, start time]."""
    import psutil

    with (HOME / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            _prefect(arguments),
            env=environment(url),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return [process.pid, psutil.Process(process.pid).create_time()]


def _wait(ready: Any, process: list[float], what: str) -> bool:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and _process(process):
        if ready():
            return True
        time.sleep(0.3)
    log = HOME / f"{what.split()[0]}.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    print(f"The {what} did not become ready; the end of {log}:\n{tail}")
    return False


def _worker_online(url: str) -> bool:
    request = urllib.request.Request(
        f"{url}/work_pools/{POOL}/workers/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return any(worker["status"] == "ONLINE" for worker in json.load(reply))
    except (OSError, ValueError):
        return False


def _process(entry: list[float] | None) -> Any:
    """The recorded process while it lives, else None."""
    import psutil

    if not entry:
        return None
    try:
        process = psutil.Process(int(entry[0]))
        same = abs(process.create_time() - entry[1]) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _signal(process: Any, send: Any) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        send(process)


def _record() -> dict[str, Any]:
    try:
        return dict(json.loads(RECORD.read_text()))
    except (OSError, ValueError):
        return {}


def _write(record: dict[str, Any]) -> dict[str, Any]:
    RECORD.write_text(json.dumps(record))
    return record


if __name__ == "__main__":
    actions = {"start": start, "stop": stop}
    if sys.argv[1:] not in (["start"], ["stop"]):
        sys.exit("usage: python -m flows.server start|stop")
    sys.exit(actions[sys.argv[1]]())
