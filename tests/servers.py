"""Commands in a project's folder, and servers that they start."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
JSON = {"Content-Type": "application/json"}


def clean_environment(**more: str) -> dict[str, str]:
    """This process's, with its Python's commands, and without what other tests' servers and runs are told by it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DVC_"))}
    return {**kept, "PATH": f"{BIN}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "true", **more}


class Commands:
    """A folder in which commands run."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.environment = folder, clean_environment(**environment)

    def start(self, *command: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __call__(self, *command: Any, code: int = 0) -> str:
        """Run a command in the folder; its output, when its exit code is `code`."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=480)
        assert process.returncode == code, output
        return output

    def interrupt(self, *command: Any, at: str, number: int = signal.SIGINT) -> tuple[int, str]:
        """Start a command and send it a signal once files match the pattern `at`; exit code and output."""
        process = self.start(*command)
        self.wait_for(at, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def wait_for(self, pattern: str, process: subprocess.Popen[str] | None = None) -> Path:
        """Until files match; the first of them."""
        end = time.monotonic() + 240
        while not (found := sorted(self.folder.glob(pattern))):
            assert time.monotonic() < end, pattern
            assert process is None or process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        return found[0]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def answering(url: str, process: subprocess.Popen[Any] | None = None, log: Path | None = None) -> None:
    """Wait until a server that was started answers at this address."""
    end = time.monotonic() + 120
    while time.monotonic() < end and (process is None or process.poll() is None):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing answers at {url}\n{log.read_text() if log else ''}")


@contextlib.contextmanager
def serving(model: Any, log: Path, **environment: str) -> Iterator[str]:
    """`mlflow models serve`; the address."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", port],
            env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True, cwd=log.parent,
        )  # fmt: skip
        try:
            answering(f"{address}/ping", server, log)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def post(url: str, body: Any, headers: Mapping[str, str] = JSON) -> tuple[int, str]:
    """Status and content of a POST of bytes, or of a value as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content, dict(headers)), timeout=300) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
