"""`make soak`: a stream killed by SIGKILL at random moments, again and again. Is anything ever lost?

    python -m tests.soak [KILLS [SEED]]

Runs the real command on a tiny model, with MLflow; after each kill the same command follows. A finished stream is
compared, bit for bit, with one that was never stopped, and MLflow must hold every record once. Figures go to
tests/soak.json.
"""

import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.runs import assert_equal_runs, copy_of, project

FIGURES = Path(__file__).with_name("soak.json")
OPTIONS = {"train__checkpoint_every": 2, "train__epochs": 12, "train__lr_scheduler": "cosine"}


def main(kills: int = 100, seed: int = 0) -> int:
    """Kill so many times; 0 when nothing was lost."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    chooser = random.Random(seed)
    tried, streams, losses = 0, 0, []
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        tiny = project(Path(name, "tiny"), **OPTIONS)
        whole = copy_of(tiny, Path(name, "whole"))
        started = time.monotonic()
        assert start(whole).wait() == 0
        length = time.monotonic() - started
        while tried < kills:
            streams += 1
            stream, before = copy_of(tiny, Path(name, f"stream{streams}")), tried
            while (code := ended(stream, length * chooser.uniform(0.1, 1.1) if tried < kills else None)) is None:
                tried += 1
            if problem := f"exit code {code}" if code else other_bits(stream, whole) or doubles(stream):
                losses.append(f"stream {streams}, kills {before + 1} to {tried}: {problem}")
            print(f"{tried} kills, {streams} streams, {len(losses)} lost", flush=True)
    hours = round((time.monotonic() - started) / 3600, 2)
    figures = {"tried": tried, "streams": streams, "lost": len(losses), "losses": losses, "hours": hours, "seed": seed}
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    return int(bool(losses))


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(("gainlora", "run", "tiny"), cwd=folder, stdout=subprocess.DEVNULL)


def ended(folder: Path, seconds: float | None) -> int | None:
    """The command's exit code; None if it was killed after so many seconds."""
    process = start(folder)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def other_bits(stream: Path, whole: Path) -> str:
    try:
        assert_equal_runs(stream, whole)
    except AssertionError:
        return "other bits"
    return ""


def doubles(folder: Path) -> str:
    """What MLflow holds twice, or not to its end; "" if nothing."""
    with sqlite3.connect(folder / "mlruns" / "mlflow.db") as store:
        runs = store.execute("select name, status from runs where lifecycle_stage = 'active'").fetchall()
        points = "select count(*) from metrics group by run_uuid, key, step having count(*) > 1"
        twice = store.execute(points).fetchall()
    if len(runs) != 4 or {status for _, status in runs} != {"FINISHED"}:
        return f"MLflow's runs: {runs}"
    return f"{len(twice)} points twice in MLflow" if twice else ""


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
