"""Sweeps: orders x methods x seeds, given directly or by a plan, run side by side as `gainlora run` processes.

A plan is a YAML list; each entry describes methods x seeds runs of one order:

    - order: embedded                      # a name in params.yaml, or an order's own YAML file
      methods: [seqlora, gainlora-inflora]
      seeds: [42, 43]
      label: no-init                       # optional: names a variant in files and tables
      options: {gate.initial_key: random}  # optional: laid over params.yaml

Each run is a process of its own. A repeated sweep skips runs with a result file and resumes the others from their
folders. Runs take turns on GPUs (`gainlora run --queue`).
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import Field

from gainlora.config import RunConfig, load_config, read_params
from gainlora.errors import GainLoRAError, add_context, did_you_mean, short_repr
from gainlora.interrupts import end_with
from gainlora.io import read_yaml
from gainlora.parsing import parse
from gainlora.runs.result_files import is_there, result_path
from gainlora.runs.start import check_inputs
from gainlora.sections import Names, Numbers, Section, Text


class Entry(Section):
    """An entry of a plan."""

    order: Text
    methods: Names
    seeds: Numbers
    label: str = ""
    options: dict[str, Any] = Field(default_factory=dict)


LOGS = Path(".cache/sweep")
"""Output of the runs."""
GRACE = 60
"""Seconds that an interrupted run has to end by itself."""


@dataclass(frozen=True)
class Experiment:
    """One run of a sweep."""

    order: str
    config: RunConfig
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """embedded/gainlora-inflora+no-init-smollm2-135m-42"""
        return str(self.file(Path()).with_suffix(""))

    @property
    def command(self) -> list[str]:
        """The command for this run alone, after `gainlora`."""
        settings = [word for name, value in self.options.items() for word in ("--set", f"{name}={_typed(value)}")]
        return ["run", self.order, "--method", self.config.method, "--seed", str(self.config.seed), *settings]

    def file(self, results: Path) -> Path:
        """Where its result file belongs."""
        c = self.config
        return result_path(results, c.order.name, c.method, self.label, c.model.name, c.seed)

    def there(self, results: Path | None) -> bool:
        """Whether its result file exists.

        Raises:
            GainLoRAError: the file holds a run with other options.
        """
        return results is not None and is_there(self.file(results), self.config.learning())


def experiments(
    orders: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
    plan: Path | None = None,
) -> list[Experiment]:
    """The runs of a sweep, each checked against params.yaml, which is read once.

    Args:
        orders, methods, seeds: every combination; methods and seeds default to params.yaml's.
            With a plan: only these of it.
        overrides: options laid over params.yaml, of every run; not with a plan, whose entries hold their own.
        plan: a YAML file.

    Raises:
        GainLoRAError: nothing to run, a run given twice, or one that its configuration forbids.
    """
    params = read_params() if plan is None or Path("params.yaml").exists() else {}
    if plan is not None:
        if overrides:
            raise GainLoRAError(f"--set: {', '.join(overrides)}: not with a plan; write them in {plan}'s options.")
        found = read_plan(plan)
        for place, (option, values) in enumerate({"orders": orders, "methods": methods, "seeds": seeds}.items()):
            known = {str(entry[place]) for entry in found}
            for value in values or ():
                if str(value) not in known:
                    raise GainLoRAError(f"{option}: {value} is not in {plan}{did_you_mean(str(value), sorted(known))}.")
            found = [entry for entry in found if not values or entry[place] in values]
    else:
        either: tuple[Sequence[Any], Sequence[Any]] = (methods or [None], seeds or [None])  # None: params.yaml's
        found = [(o, m, s, "", dict(overrides or {})) for o in orders or () for m in either[0] for s in either[1]]
    if not found:
        raise GainLoRAError("orders: nothing to run; name orders of params.yaml, or a plan.")
    made: dict[str, Experiment] = {}
    for order, method, seed, label, options in found:
        given = {name: value for name, value in {"method": method, "seed": seed}.items() if value is not None}
        e = Experiment(order, load_config(order, {**options, **given}, params), label, options)
        if e.name in made:
            raise GainLoRAError(f"{e.name}: given twice; give it once, or a label in a plan.")
        made[e.name] = e
    return list(made.values())


def read_plan(path: Path) -> list[tuple[str, str, int, str, dict[str, Any]]]:
    """A plan's runs: order, method, seed, label, options.

    Raises:
        GainLoRAError: no such file, or not a plan.
    """
    entries = read_yaml(path, "name a YAML file, as results/plan.yaml is one", "correct it")
    if not isinstance(entries, list):
        raise GainLoRAError(f"{path}: holds {short_repr(entries)}, not a list; write `- order:`, methods and seeds.")
    found = []
    for number, values in enumerate(entries, start=1):
        with add_context(f"{path}: entry {number}"):
            entry = parse(Entry, values)
        found += [(entry.order, m, seed, entry.label, entry.options) for m in entry.methods for seed in entry.seeds]
    return found


def listed(chosen: Sequence[Experiment], results: Path | None) -> Iterator[str]:
    """The command of each run; with `results`, also whether its file exists."""
    for e in chosen:
        where = f"  # {'there' if e.there(results) else 'to do'}: {e.file(results)}" if results else ""
        yield f"gainlora {shlex.join(e.command)}{where}"


def missing(chosen: Sequence[Experiment], results: Path | None) -> list[Experiment]:
    """Runs without a result file."""
    return [e for e in chosen if not e.there(results)]


def check(chosen: Sequence[Experiment], results: Path | None) -> None:
    """Check the inputs of the runs without a result file."""
    for config in {(e.order, str(e.options)): e.config for e in missing(chosen, results)}.values():
        check_inputs(config)


def run_all(chosen: Sequence[Experiment], results: Path | None, jobs: int) -> int:
    """Run what is missing, `jobs` side by side, with a line for each run that ends. A run that fails does not stop the
    others; an exception (Ctrl-C) ends all of them first.

    Returns:
        0; 1 when runs failed.
    """
    todo = missing(chosen, results)
    print(f"{len(chosen)} runs, {len(todo)} to do", flush=True)
    failed, started = [], time.monotonic()
    with closing(_ended(todo, results, jobs)) as ended:  # an exception ends the runs at once
        for count, (e, code, log) in enumerate(ended, start=1):
            took = f"{(time.monotonic() - started) / 60:.1f} min since the start"
            print(f"{count}/{len(todo)} {e.name} | {_outcome(log, code)} | {took}", flush=True)
            if code:
                failed.append(f"{e.name}: {log}")
    if failed:
        print(f"{len(failed)} of {len(todo)} runs failed; what they printed:", *failed, sep="\n  ", file=sys.stderr)
        return 1
    print(f"{len(todo)} runs done, {len(chosen) - len(todo)} were there")
    return 0


def _ended(todo: Sequence[Experiment], results: Path | None, jobs: int) -> Generator[tuple[Experiment, int, Path]]:
    """Yield runs as they end: the run, its exit code, and the file of its output."""
    LOGS.mkdir(parents=True, exist_ok=True)
    queue = list(todo)
    running: dict[int, tuple[Experiment, subprocess.Popen[bytes], Path]] = {}  # by slot
    gpus = visible_gpus()
    try:
        while queue or running:
            for slot in range(jobs):
                if slot not in running and queue:
                    e = queue.pop(0)
                    log = LOGS / f"{re.sub('[^A-Za-z0-9_.+=-]+', '-', e.name)}.log"
                    with log.open("wb") as file:
                        running[slot] = (e, _start(e, results, file, environment(e, slot, jobs, gpus)), log)
            for slot, (e, process, log) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[slot]
                    yield e, code, log
            time.sleep(0.2)
    finally:
        for _, process, _ in running.values():
            process.terminate()  # not SIGINT, which a sweep in the background of a script hands on as ignored
        deadline = time.monotonic() + GRACE
        for _, process, _ in running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(e: Experiment, results: Path | None, log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    files = ["--results", str(results), *(["--label", e.label] if e.label else [])] if results else []
    return subprocess.Popen(
        [sys.executable, "-m", "gainlora", *e.command, *files, "--queue"],
        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
        start_new_session=True,  # a terminal's Ctrl-C reaches the sweep alone
        preexec_fn=partial(end_with, os.getpid()),  # a run that outlives a killed sweep would hold its lock
    )  # fmt: skip


def environment(e: Experiment, slot: int, jobs: int, gpus: Sequence[str]) -> dict[str, str]:
    """One GPU per slot, in turn, unless the run uses all; on CPUs, an equal share of the cores."""
    values = dict(os.environ)
    if gpus and e.config.launch.num_processes == 1 and not e.config.model.device_map:
        values["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    elif not gpus and jobs > 1:
        values.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    return values


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, for CUDA_VISIBLE_DEVICES."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _outcome(log: Path, code: int) -> str:
    """AP, FT and BWT of a run, or its error."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    wanted = [line for line in lines if line.startswith("error: " if code else "AP ")]
    return (wanted or lines or ["no output"])[-1]


def _typed(value: Any) -> str:
    """As --set reads it: false, null, 0.5, [a, b]."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
