"""Ctrl-C, SIGTERM and kill -9, sent to the real command: what it leaves, and that the same command resumes."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from tests.dying import in_a_process
from tests.integration.conftest import ANY, Project
from tests.runs import assert_equal_runs, copy_of, run

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
OPTIONS = {"train__epochs": 20, "train__checkpoint_every": 1, "data__max_prompt_tokens": 10, "count": 2}
OPTIONS |= ANY
"""24 examples in batches of 8, 20 times: training takes seconds, and every step is a checkpoint."""
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")
LOGGED = {".safetensors", ".json", ".jsonl", ".png"}
"""What an MLflow artifact may be: weights, numbers, pictures; nothing that is run or unpickled."""
REGISTERED = {"MLmodel", ".md", ".py", ".txt", ".yaml"}
"""And of a registered version: its code, card and environment."""
RUN = ("gainlora", "run", "tiny")


@pytest.mark.slow
@pytest.mark.long
def test_stopped_in_training_it_resumes_to_the_same_end(tmp_path, model):
    project = Project(tmp_path, model, **OPTIONS)
    secrets = {name: f"s3cret-{uuid.uuid4().hex}" for name in SECRETS}
    project.environment |= secrets
    said = []
    for steps, (number, code) in zip(("?", "[2-5]"), SIGNALS, strict=True):  # the first ones; 20 to 59 of 60
        ended, output = project.interrupt(*RUN, at=f"runs/tiny-*/.task_01_*/checkpoint_000{steps}?", number=number)
        assert ended == code and "the same command continues" in output and "Traceback" not in output, output
        assert {state for (state,) in project.query("select status from runs")} == {"KILLED"}
        said.append(output)
    killed = project.interrupt(*RUN, at="runs/tiny-*/.task_02_*/checkpoint_*", number=signal.SIGKILL)
    said += [killed[1], project(*RUN)]
    assert "1 finished before" in said[-1] and "cut to length: train" in said[-1]
    assert {tuple(states) for states in project.mlflow_runs().values()} == {("FINISHED",)}
    files = [p for p in tmp_path.glob("mlruns/artifacts/**/*") if p.is_file()]
    assert {p.suffix or p.name for p in files} == LOGGED | REGISTERED
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [n for n, value in secrets.items() for w in written if value.encode() in w] and len(written) > 50
    assert not [name for name, value in secrets.items() if value in "".join(said)]
    whole = copy_of(tmp_path, tmp_path.with_name("whole"))
    assert in_a_process(run, whole, "gainlora-inflora") == 0
    assert_equal_runs(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("number, code", SIGNALS)
@pytest.mark.parametrize("seconds", [3, 6])  # it is importing, or opening the run
def test_stopped_at_its_start_it_ends_without_a_trace(tmp_path, model, number, code, seconds):
    process = Project(tmp_path, model).start(*RUN)
    time.sleep(seconds)
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in output, output


def children_of(process):
    end = time.monotonic() + 120
    while not (found := psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("number, code", SIGNALS)
def test_stopped_in_fetch_it_takes_pip_along(tmp_path, number, code):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an index that never answers
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/"}
        command = [sys.executable, "-m", "gainlora", "fetch", "embedded"]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        children = children_of(process)
        time.sleep(0.3)
        process.send_signal(number)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in output, output
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".cache", "fetch.lock", "models"]
