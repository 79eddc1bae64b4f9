"""The project's Prefect server and workers: found, started (`make serve`), ended (`make stop`).

    python -m flows.server start [JOBS] | stop

Two workers: one runs orders, JOBS of them side by side; the other runs sweeps, which only wait for the first.
State lives in .prefect/ of the current folder: the database, a log of each process, and server.json
({"url", "jobs", "server" and each worker: [pid, start time]}). A process is ended only when its id
and its start time are those recorded, so a reused process id is never touched.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gainlora.errors import GainLoRAError, told

HOME = Path(".prefect")
RECORD = HOME / "server.json"
POOL, SWEEPS = "gainlora", "gainlora-sweeps"
"""Work pools, and the names of their workers here."""
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
        # A cancelled run whose process is gone is called cancelled; one that lives is killed after 30 s.
        "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "40",
    }
    if url:
        values["PREFECT_API_URL"] = url
    return values


def check_place(deployment: Any, url: str) -> None:
    """Refuse a deployment that works in another folder than this: a server's address says nothing of whose it is.

    Args:
        deployment: as Prefect's API gives it; one without a place on this machine passes.

    Raises:
        GainLoRAError: it would read another params.yaml and write other runs.
    """
    for step in deployment.pull_steps or []:
        place = (step.get("prefect.deployments.steps.set_working_directory") or {}).get("directory")
        if place and Path(place).resolve() != Path.cwd():
            own = "work in that folder, or start a server for this one: PREFECT_PORT=4300 make serve"
            raise GainLoRAError(f"{url.rstrip('/')}: belongs to {place}: its deployments run there; {own}.")


def start(jobs: int | None = None) -> None:
    """Server, work pools, deployments and workers, all ready.

    What already runs is kept, so starting twice only renews the deployments.

    Args:
        jobs: orders that may run side by side, sharing the cores; None: as many as the running worker does, or 1.

    Raises:
        GainLoRAError: the port is taken, a worker with another limit is there, or a process did not start.
    """
    HOME.mkdir(exist_ok=True)
    record, url = _record(), default_url()
    if _process(record.get(POOL)) and jobs not in (None, record["jobs"]):
        there = f"the worker that is there runs {record['jobs']} at once"
        raise GainLoRAError(f"jobs: {jobs}: {there}; `make stop` ends it, or go on with it by not naming jobs.")
    if not (record.get("url") == url and _process(record.get("server")) and answers(url)):
        if answers(url):
            remedy = "end it, or take another port: PREFECT_PORT=4300 make serve"
            raise GainLoRAError(f"{url}: another Prefect server answers; {remedy}.")
        if record.get("url") != url:
            stop()
            record = {}
        # Else only the server is gone: workers wait for it, and what they run goes on.
        app = ["--factory", "flows.guard:create_app", "--log-level", "warning"]
        command = [sys.executable, "-m", "uvicorn", *app, "--host", "127.0.0.1", "--port", _port()]
        server = _spawn(command, environment(url), "server")
        record = _write({**record, "url": url, "server": server})
        _wait(lambda: answers(url), server, "server")
    for command in (
        ["work-pool", "create", POOL, "--type", "process", "--overwrite"],
        ["work-pool", "create", SWEEPS, "--type", "process", "--overwrite"],
        ["deploy", "--all"],
    ):
        done = subprocess.run(_prefect(command), env=environment(url), capture_output=True, text=True)
        if done.returncode:
            raise GainLoRAError(f"prefect {' '.join(command)} failed: {done.stdout}{done.stderr}")
    if not _process(record.get(POOL)):
        worker = _start_worker(POOL, jobs or 1, url)
        record = _write({**record, POOL: worker, "jobs": jobs or 1})
    if not _process(record.get(SWEEPS)):
        record = _write({**record, SWEEPS: _start_worker(SWEEPS, 1, url)})
    for pool in (POOL, SWEEPS):
        _wait(functools.partial(_worker_online, url, pool), record[pool], pool)


def stop() -> None:
    """End exactly what `start` started: each worker's runs, which keep what is learned, it, and last the server."""
    record = _record()
    for name in (SWEEPS, POOL, "server"):
        if root := _process(record.get(name)):
            _end(root.children(recursive=True))  # first: a worker that ends kills them
            _end([*root.children(recursive=True), root])
            print(f"{name} ended (process {root.pid})")
    RECORD.unlink(missing_ok=True)


def _end(family: list[Any]) -> None:
    """Ask processes to end, and insist after 20 s."""
    import psutil

    for process in family:
        _signal(process, psutil.Process.terminate)
    _, left = psutil.wait_procs(family, timeout=20)
    for process in left:
        _signal(process, psutil.Process.kill)


def _start_worker(pool: str, limit: int, url: str) -> list[float]:
    """A worker of a pool; its runs share this machine's cores. [pid, start time]."""
    values = environment(url)
    if limit > 1:
        values.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // limit)))
    command = _prefect(["worker", "start", "--pool", pool, "--limit", str(limit), "--name", pool])
    return _spawn(command, values, pool)


def _port() -> str:
    return os.environ.get("PREFECT_PORT") or "4200"


def _prefect(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "prefect", "--no-prompt", *arguments]


def _spawn(command: list[str], values: dict[str, str], name: str) -> list[float]:
    """Start a Prefect process of its own session; [pid, start time]."""
    import psutil

    with (HOME / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=values,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return [process.pid, psutil.Process(process.pid).create_time()]


def _wait(ready: Callable[[], bool], process: list[float], name: str) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and _process(process):
        if ready():
            return
        time.sleep(0.3)
    log = HOME / f"{name}.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise GainLoRAError(f"{name}: did not become ready; the end of {log}: {tail}")


def _worker_online(url: str, pool: str) -> bool:
    request = urllib.request.Request(
        f"{url}/work_pools/{pool}/workers/filter", data=b"{}", headers={"Content-Type": "application/json"}
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


def main(arguments: list[str]) -> int:
    """The command line; the exit code."""
    try:
        match arguments:
            case ["start", *jobs] if len(jobs) < 2 and all(word.isdecimal() and int(word) for word in jobs):
                start(*map(int, jobs))
                url = str(_record()["url"]).removesuffix("/api")
                print(f"Prefect is ready: {url}  (logs: {HOME}/*.log)")
                print("Start a run:  prefect deployment run continual-embedded      End it all:  make stop")
            case ["stop"]:
                stop()
            case _:
                print("usage: python -m flows.server start [JOBS] | stop", file=sys.stderr)
                return 2
    except GainLoRAError as error:
        print(told(str(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
