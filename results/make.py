"""`python -m results.make`: make the result files of results/plan.yaml that are not there yet.

Each is one `gainlora run`, several side by side, with the machine's threads shared among them. Stopped and started
again it continues: finished runs are found, stopped ones resumed. Hours; Ctrl-C ends the runs with it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gainlora.errors import GainLoRAError
from gainlora.params import load_config

PLAN = Path("results", "plan.yaml")


@dataclass(frozen=True)
class Experiment:
    """One run of the plan."""

    order: str
    method: str
    seed: int
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, Any]:
        return {**self.options, "method": self.method, "seed": self.seed}

    @property
    def file(self) -> Path:
        """Its result file."""
        config = load_config(self.order, overrides=self.overrides)
        named = f"{self.method}+{self.label}" if self.label else self.method
        return Path("results", config.order.name, f"{named}-{Path(config.model.name).name}-{self.seed}.json")

    @property
    def command(self) -> list[str]:
        """The command that a user would type, after `gainlora`."""
        settings = [word for name, value in self.options.items() for word in ("--set", f"{name}={yaml_value(value)}")]
        return ["run", self.order, "--method", self.method, "--seed", str(self.seed), *settings]


def read_plan(path: Path = PLAN) -> list[Experiment]:
    """The plan, one experiment per order, method and seed."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        Experiment(entry["order"], method, seed, entry.get("label", ""), entry.get("options", {}))
        for entry in entries
        for method in entry["methods"]
        for seed in entry["seeds"]
    ]


def yaml_value(value: Any) -> str:
    """As --set reads it: false, null, 0.5."""
    return yaml.safe_dump(value).splitlines()[0]


def make(experiment: Experiment, threads: int, children: list[subprocess.Popen[Any]]) -> bool:
    """Run an experiment and write its result file; whether that went well."""
    from gainlora.learning.run_folder import run_folder
    from gainlora.tracking.folder import read_run
    from gainlora.tracking.results import export

    started = time.monotonic()
    # passive: a waiting thread leaves its core to the run beside it
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PREFECT_HOME"] = str(Path(".prefect", threading.current_thread().name).resolve())  # a database each
    child = subprocess.Popen(
        [sys.executable, "-m", "gainlora", *experiment.command],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    children.append(child)
    said, _ = child.communicate()
    name = " ".join(experiment.command[1:])
    if child.returncode:
        print(f"failed: {name}\n{said}", file=sys.stderr, flush=True)
        return False
    run = read_run(run_folder(load_config(experiment.order, overrides=experiment.overrides)))
    export(run, Path("results"), experiment.label)
    minutes = (time.monotonic() - started) / 60
    print(f"{name}: AP {run.result['AP']:.1f}, {minutes:.1f} min", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m results.make", description=__doc__.splitlines()[0])
    parser.add_argument("orders", nargs="*", help="only these orders of the plan; none: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--list", action="store_true", help="say what is there and what is not, and end")
    options = parser.parse_args()
    try:
        plan = [e for e in read_plan() if not options.orders or e.order in options.orders]
        missing = [e for e in plan if not e.file.exists()]
    except GainLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.list:
        for e in plan:
            print("to do " if e in missing else "there ", "gainlora", *e.command, "->", e.file)
        return 0
    print(f"{len(plan) - len(missing)} of {len(plan)} result files are there", flush=True)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    children: list[subprocess.Popen[Any]] = []
    with ThreadPoolExecutor(options.jobs, thread_name_prefix="job") as pool:
        try:
            done = list(pool.map(lambda e: make(e, threads, children), missing))
        except KeyboardInterrupt:  # the runs got it too, and end by themselves
            pool.shutdown(cancel_futures=True)
            return 130
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
