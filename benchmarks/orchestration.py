"""What Prefect, MLflow and DVC add to the learning itself, per task; and how long `gainlora --help` takes.

A tiny order is learned by `python -m flows.continual` in a project folder of its own, with DVC tracking its data,
against a running Prefect server. What its steps took is in each task's scores.json; all else is orchestration: starting
Python, Prefect, MLflow and torch (once a run), states, records and artifacts, versions.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from transformers.utils import logging

from benchmarks.measure import Row
from tests.integration.conftest import CONTINUAL, SERVE, Project
from tests.tiny import tiny_llama

GAINLORA = (sys.executable, "-m", "gainlora")


def per_task() -> Row:
    """Seconds of orchestration per task, of a second run: caches and databases are there."""
    with tempfile.TemporaryDirectory(prefix="gainlora-benchmark-") as scratch:
        model, folder = Path(scratch, "model"), Path(scratch, "project")
        folder.mkdir()
        logging.disable_progress_bar()
        tiny_llama(model)
        project = Project(folder, model)
        project("dvc", "init", "--no-scm", "--quiet")
        project("dvc", "add", "--quiet", "data/tiny")
        try:
            project(*SERVE, "start")
            project.set(seed=5)
            project(*CONTINUAL)
            project.set(seed=6)
            started = time.perf_counter()
            project(*CONTINUAL)
            whole = time.perf_counter() - started
            flow = project.last_flow_run()
        finally:
            project(*SERVE, "stop")
        (run,) = (folder / "runs").glob("tiny-*-6-*")
        scores = [json.loads(path.read_text()) for path in run.glob("task_*/scores.json")]
        hashes = json.loads((run / "data.json").read_text())
        assert "dvc" in json.dumps(hashes)
    learning = sum(sum(score["seconds"].values()) for score in scores)
    begun, ended = (datetime.fromisoformat(flow[key]) for key in ("start_time", "end_time"))
    around = whole - (ended - begun).total_seconds()
    detail = (
        f"{len(scores)} tasks in {whole:.1f} s: learning {learning:.1f} s, orchestration {whole - learning:.1f} s, "
        f"of it {around:.1f} s before and after the flow"
    )
    return Row(
        "orchestration per task with a running server, seconds",
        round((whole - learning) / len(scores), 2),
        "<= 5",
        detail,
    )


def start(rounds: int = 5) -> Row:
    """Seconds of `python -m gainlora --help`."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([*GAINLORA, "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    detail = f"{min(times):.2f} to {max(times):.2f} s in {rounds} rounds"
    return Row("python -m gainlora --help, seconds", round(statistics.median(times), 3), "<= 1", detail)


def run() -> list[Row]:
    """Both rows."""
    return [per_task(), start()]
