"""Ctrl-C, SIGTERM and kill -9, sent to the real command: what it leaves, and that the same command goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.dying import in_a_process
from tests.integration.conftest import Project
from tests.tiny import tiny_llama, tiny_params
from tests.unit.test_checkpoint import assert_equal_runs, copy_of, run

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
OPTIONS = {"train__epochs": 20, "train__checkpoint_every": 1, "data__max_prompt_tokens": 10}
"""24 examples in batches of 8, 20 times: training takes seconds, and every step is a checkpoint."""


SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")
LOGGED = {".safetensors", ".json", ".jsonl", ".png"}
"""What an MLflow artifact may be: weights, numbers, pictures; nothing that is run or unpickled."""
REGISTERED = {"MLmodel", ".md", ".py", ".txt", ".yaml"}
"""And of a registered version: its code, card and environment."""


class Watched(Project):
    """A project whose processes are found again by a mark in their environment."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        tiny_params(folder, model, count=2, **OPTIONS)
        self.mark = uuid.uuid4().hex
        self.environment |= {"PYTEST_MARK": self.mark, "PREFECT_HOME": str(folder / ".prefect")}

        self.secrets = {name: f"s3cret-{uuid.uuid4().hex}" for name in SECRETS}
        self.environment |= self.secrets

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("PYTEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # gone meanwhile, or of somebody else
                continue
        return found

    def check_server(self) -> None:
        """The temporary server answers nobody but its run."""
        (command,) = [p.cmdline() for p in self.processes() if "prefect.server.api.server:create_app" in p.cmdline()]
        self.port = command[command.index("--port") + 1]
        assert command[command.index("--host") + 1] == "127.0.0.1"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            self.api("flow_runs")

    def gone(self) -> bool:
        """Whether all of them are, or soon will be."""
        return not psutil.wait_procs(self.processes(), timeout=30)[1] and not self.processes()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Watched]:
    tiny_llama(tmp_path / "base")
    made = Watched(tmp_path, tmp_path / "base")
    try:
        yield made
    finally:
        for process in made.processes():
            process.kill()


def until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.slow
def test_stopped_in_training_it_is_kept_closed_and_goes_on_to_the_same_end(project: Watched, tmp_path: Path) -> None:
    def stopped(task: str, steps: int, number: signal.Signals) -> tuple[int, str]:
        """Start the run, send the signal once it has trained so far; exit code and output."""
        process = project.start("gainlora", "run", "tiny")
        reached = f"runs/tiny-*/.task_{task}_*/checkpoint_*"
        until(lambda: any(int(p.name[-5:]) >= steps for p in tmp_path.glob(reached)), process)
        project.check_server()
        process.send_signal(number)
        output, _ = process.communicate(timeout=240)
        assert project.gone() and "Traceback" not in output, output
        said.append(output)
        return process.returncode, output

    said: list[str] = []
    for steps, (number, code) in zip((5, 25), SIGNALS, strict=True):
        ended, output = stopped("01", steps, number)
        assert ended == code and "the same command goes on from there" in output
        assert any(int(p.name[-5:]) >= steps for p in tmp_path.glob("runs/tiny-*/.task_01_*/checkpoint_*"))
        ((name, states),) = project.mlflow_runs().items()
        assert name.startswith("tiny-") and states == ["KILLED"]
    assert stopped("02", 5, signal.SIGKILL)[0] == -signal.SIGKILL
    said.append(project("gainlora", "run", "tiny"))
    assert "1 finished before" in said[-1] and "training examples cut to length" in said[-1]
    assert {tuple(states) for states in project.mlflow_runs().values()} == {("FINISHED",)}
    files = [p for p in tmp_path.glob("mlruns/artifacts/**/*") if p.is_file()]
    assert {p.suffix or p.name for p in files} == LOGGED | REGISTERED
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [n for n, value in project.secrets.items() for w in written if value.encode() in w] and len(written) > 99
    assert not [name for name, value in project.secrets.items() if value in "".join(said)]
    whole = copy_of(tmp_path, tmp_path.with_name("whole"))
    assert in_a_process(run, whole, "gainlora-inflora") == 0
    assert_equal_runs(tmp_path, whole)


@pytest.mark.parametrize("number, code", SIGNALS)
@pytest.mark.parametrize("seconds", [0, 0.5, 2])  # after the flow's process has begun: it is importing
def test_stopped_at_its_start_it_ends_without_a_trace(
    project: Watched, number: signal.Signals, code: int, seconds: float
) -> None:
    process = project.start("gainlora", "run", "tiny")
    until(lambda: len(project.processes()) > 1, process)
    time.sleep(seconds)
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in output, output
    assert project.gone()


@pytest.mark.parametrize("number, code", SIGNALS)
def test_stopped_in_fetch_it_takes_pip_along(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an index that never answers
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/"}
        command = [sys.executable, "-m", "gainlora", "fetch", "embedded"]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        until(lambda: psutil.Process(process.pid).children(recursive=True), process)
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.3)
        process.send_signal(number)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in output, output
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".cache", "fetch.lock", "models"]
