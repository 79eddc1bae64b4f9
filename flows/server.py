"""The Prefect server of this folder and the process that runs its deployments: `make serve`, `make stop`.

    python -m flows.server start [JOBS] | stop

`start` runs Prefect's own server (uvicorn) and `prefect.serve`, which runs JOBS flow runs side by side. State lives in
.prefect/: Prefect's database, one log a process, and server.json ({"url", "folder", "jobs", and for "server" and
"runner" [pid, start time]}). A process is signalled only when its id and its start time are those recorded, so a
reused process id is never touched.

The server answers this machine only. Prefect itself accepts any Host header and any site's scripts, so that a page open
in a browser here could start flows (DNS rebinding, requests across sites); `create_app` refuses both.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from gainlora import io
from gainlora.errors import GainLoRAError, format_error
from gainlora.prefect_server import RECORD, answers, read_record
from gainlora.proxies import LOCAL, direct

HOME = RECORD.parent
START_SECONDS = 120.0  # on two busy cores the server has been seen to take 40 s


def environment(url: str | None = None) -> dict[str, str]:
    """This process's environment for a Prefect process: state in .prefect, no telemetry, no proxy for local addresses.

    The plugin (gainlora/prefect_plugin.py) is off: it serves the `prefect` command that a user types.
    """
    values = dict(os.environ)
    values.setdefault("PREFECT_HOME", str(HOME.resolve()))
    values |= {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_PLUGINS_ENABLED": "false",
        # a cancelled run whose process is gone counts as cancelled; one that still lives is killed after 30 s
        "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "40",
        **direct(),
    }
    return values | ({"PREFECT_API_URL": url} if url else {})


@FileLock(HOME / "start.lock")
def start(jobs: int | None = None) -> str:
    """Start the server and the runner of its deployments, and wait until both are ready; the server's address.

    Running processes are kept.

    Args:
        jobs: flow runs side by side, which share the cores; None: as many as the present runner, or 1.

    Raises:
        GainLoRAError: the port is taken, a runner with another limit is there, or a process did not start.
    """
    record, url = read_record(), f"http://127.0.0.1:{_port()}/api"
    if _process(record.get("runner")) and jobs not in (None, record["jobs"]):
        raise GainLoRAError(
            f"jobs: {jobs}: the runner in this folder runs {record['jobs']} at once; `make stop` ends it, or continue "
            "with it by not naming jobs."
        )
    if not (record.get("url") == url and _process(record.get("server")) and answers(url)):
        if answers(url):
            remedy = "end it, or take another port: PREFECT_PORT=4300 make serve"
            raise GainLoRAError(f"{url}: another Prefect server answers; {remedy}.")
        if record.get("url") != url:
            stop()
            record = {}
        # else only the server is gone: the runner waits for it, and what it runs continues
        app = ["--factory", "flows.server:create_app", "--log-level", "warning"]
        command = [sys.executable, "-m", "uvicorn", *app, "--host", "127.0.0.1", "--port", _port()]
        server = _spawn(command, environment(url), "server")
        record = _write({**record, "url": url, "folder": str(Path.cwd()), "server": server})
        _wait(lambda: answers(url), server, "server")
    if not _process(record.get("runner")):
        jobs, values = jobs or 1, environment(url)
        if jobs > 1:
            values.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
        ready = HOME / "runner.ready"
        ready.unlink(missing_ok=True)
        runner = _spawn([sys.executable, "-m", "flows.deployments", str(jobs), str(ready)], values, "runner")
        record = _write({**record, "runner": runner, "jobs": jobs})
        _wait(ready.exists, runner, "runner")
    return url


def stop() -> None:
    """End the processes of `start`: flow runs first, which keep finished work, then the runner, then the server."""
    import psutil

    record = read_record()
    for name in ("runner", "server"):
        if root := _process(record.get(name)):
            for family in (root.children(recursive=True), [*root.children(recursive=True), root]):
                for process in family:
                    _signal(process, psutil.Process.terminate)
                for process in psutil.wait_procs(family, timeout=20)[1]:
                    _signal(process, psutil.Process.kill)
            print(f"{name} ended (process {root.pid})")
    RECORD.unlink(missing_ok=True)


def create_app() -> Any:
    """Prefect's ASGI app behind a check of Host and Origin: only this machine, by name, and no page of another site."""
    from prefect.server.api.server import create_app as prefect_app
    from starlette.responses import PlainTextResponse

    app = prefect_app(final=True)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or _is_local(dict(scope["headers"])):
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse("This server answers its own machine only.", 403)(scope, receive, send)

    return guarded


def _is_local(headers: dict[bytes, bytes]) -> bool:
    try:
        host = urlsplit("//" + headers.get(b"host", b"").decode("latin-1"))
        origin = urlsplit(headers[b"origin"].decode("latin-1")) if b"origin" in headers else host
        return host.hostname in LOCAL and origin.hostname in LOCAL and origin.port == host.port
    except ValueError:  # no address at all
        return False


def _port() -> str:
    return os.environ.get("PREFECT_PORT") or "4200"


def _spawn(command: list[str], values: dict[str, str], name: str) -> list[float]:
    """Start a process in a session of its own; [pid, start time]."""
    import psutil

    with (HOME / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=values, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
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


def _write(record: dict[str, Any]) -> dict[str, Any]:
    io.write_json(RECORD, record)
    return record


def main(arguments: list[str]) -> int:
    """The command line; the exit code."""
    try:
        match arguments:
            case ["start", *jobs] if len(jobs) < 2 and all(word.isdecimal() and int(word) for word in jobs):
                url = start(*map(int, jobs))
                print(f"Prefect is ready: {url.removesuffix('/api')}  (logs: {HOME}/*.log)")
                print("Start a run:  prefect deployment run continual-embedded      End it all:  make stop")
            case ["stop"]:
                stop()
            case _:
                print("usage: python -m flows.server start [JOBS] | stop", file=sys.stderr)
                return 2
    except GainLoRAError as error:
        print(format_error(str(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
