"""`make soak`: a stream killed by SIGKILL at random moments, again and again. Is anything ever lost?

    python -m tests.soak [KILLS [SEED]]

Runs the real command on a tiny model, with MLflow, in a folder of its own; after each kill the same command follows. A
finished stream is compared, bit for bit, with one that was never stopped, and MLflow must hold every record once.
Figures go to tests/soak.json.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.tiny import tiny_llama, tiny_params

FIGURES = Path(__file__).with_name("soak.json")
OPTIONS = {"train__checkpoint_every": 2, "train__epochs": 12, "train__lr_scheduler": "cosine"}
PHASES = ("start", "prepare", "train", "update", "evaluate", "record")
COMMAND = ("gainlora", "run", "tiny")
LEARNED = ("adapter_model.safetensors", "gate.safetensors", "subspace.safetensors")


def main(kills: int = 100, seed: int = 0) -> int:
    """Kill so many times; 0 when nothing was lost."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        os.chdir(name)
        os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        tiny_llama(Path("base"))
        tiny_params(Path(), Path(name, "base"), **OPTIONS)
        figures = soak(random.Random(seed), kills)
    FIGURES.write_text(json.dumps({**figures, "seed": seed}, indent=2) + "\n")
    print(FIGURES.read_text())
    return int(figures["lost"] > 0)


def soak(chooser: random.Random, kills: int) -> dict[str, object]:
    """Kill streams until there were so many kills; what came of it."""
    started = time.monotonic()
    subprocess.run(COMMAND, check=True, stdout=subprocess.DEVNULL)  # the first makes MLflow's store
    whole = contents()
    shutil.rmtree("runs")
    subprocess.run(COMMAND, check=True, stdout=subprocess.DEVNULL)
    assert contents() == whole, "two runs without a stop differ"
    at: Counter[str] = Counter()
    lost: list[str] = []
    tried = streams = 0
    while tried < kills:
        streams += 1
        shutil.rmtree("runs")
        forget()
        before = tried
        while tried < kills:
            where, code = killed(chooser)
            if where is None:
                break
            tried += 1
            at[where] += 1
        else:
            code = subprocess.run(COMMAND, stdout=subprocess.DEVNULL).returncode
        problem = f"exit code {code}" if code else "other bits" if contents() != whole else doubles()
        if problem:
            lost.append(f"stream {streams}, kills {before + 1} to {tried}: {problem}")
        print(f"{tried} kills, {streams} streams, {len(lost)} lost", flush=True)
    hours = round((time.monotonic() - started) / 3600, 2)
    # a stream that came out otherwise is one loss, whichever of its kills it was
    return {
        **{"tried": tried, "survived": tried - len(lost), "lost": len(lost), "losses": lost},
        **{"streams": streams, "killed_at": dict(sorted(at.items())), "hours": hours},
    }


def killed(chooser: random.Random) -> tuple[str | None, int]:
    """Start the command and kill it at some moment of a phase that chance picks: what it was doing; None and the exit
    code if it ended first."""
    phase, often = chooser.choice(PHASES), 10 ** chooser.uniform(-2, -0.3)  # phases last milliseconds, or seconds
    process = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL)
    while (code := process.poll()) is None:
        where = doing(process.pid)
        if where == phase and chooser.random() < often:
            process.kill()
            code = process.wait()
            return (where, 0) if code == -signal.SIGKILL else (None, code)  # it ended by itself just now
        time.sleep(0.005)
    return None, code


def doing(pid: int) -> str:
    """The phase that a process is in, by what is in the run's folder."""
    folder = next(iter(Path("runs").glob("tiny-*")), None)
    try:
        if folder is None or f"process {pid} " not in (folder / ".lock").read_text():
            return "start"
        partial = next(iter(folder.glob(".task_*")), None)
        if partial is None:
            return "record" if list(folder.glob("task_*")) else "prepare"
        if list(partial.glob("checkpoint_*")) and not (partial / "train.jsonl").exists():
            return "train"
        done = json.loads((partial / "timings.json").read_text())
    except (OSError, ValueError):  # not there yet
        return "prepare"
    return "evaluate" if "update" in done else "update" if "train" in done else "train"


def contents() -> dict[str, object]:
    """The learned tensors and R of the finished run."""
    (folder,) = Path("runs").glob("tiny-*")
    result = json.loads((folder / "result.json").read_text())
    files = {str(p.relative_to(folder)): p.read_bytes() for name in LEARNED for p in folder.glob(f"task_*/{name}")}
    return {"R": result["R"], **files}


def forget() -> None:
    """Empty MLflow's store: the next stream records anew."""
    with sqlite3.connect("mlruns/mlflow.db") as store:
        tables = ("metrics", "latest_metrics", "params", "tags", "inputs", "input_tags", "runs")
        for table in tables:
            store.execute(f"delete from {table}")


def doubles() -> str:
    """What MLflow holds twice, or not to its end; "" if nothing."""
    with sqlite3.connect("mlruns/mlflow.db") as store:
        runs = store.execute("select name, status from runs where lifecycle_stage = 'active'").fetchall()
        points = "select count(*) from metrics group by run_uuid, key, step having count(*) > 1"
        twice = store.execute(points).fetchall()
    if len(runs) != 4 or {status for _, status in runs} != {"FINISHED"}:
        return f"MLflow's runs: {runs}"
    return f"{len(twice)} points twice in MLflow" if twice else ""


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
