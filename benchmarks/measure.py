"""How the benchmarks measure: both sides in turns, in one process; and what a row of the table is."""

import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from gainlora.model.base import pick_device, pick_dtype

Sides = dict[str, Callable[[], Any]]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One line of the table: `ratio` of two sides, or seconds, and what it should be."""

    name: str
    ratio: float
    target: str
    """`<= x` or `>= x`; empty where nothing is asked."""
    detail: str
    """What was measured: both sides' figures, the spread."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Of `machine()`: rows of several machines stand in one file."""

    @property
    def holds(self) -> bool | None:
        """Whether the target is met."""
        if not self.target:
            return None
        sign, bound = self.target.split()[:2]
        return self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)

    def to_dict(self) -> dict[str, Any]:
        """As results.json has it."""
        return {**asdict(self), "holds": self.holds}


def interleave(sides: Sides, rounds: int) -> Times:
    """Seconds of every call. Each round calls every side once, and begins one side further on; one round to warm up.

    A disturbance of the machine that lasts longer than a call meets all sides.
    """
    times: Times = {name: [] for name in sides}
    names = list(sides)
    gc.collect()
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            started = time.perf_counter()
            sides[name]()
            synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: all_of_them[1:] for name, all_of_them in times.items()}


def time_row(name: str, times: Times, side: str, against: str, target: str) -> Row:
    """The median of the ratios of two sides' calls within each round; the spread is their quartiles."""
    pairs = [a / b for a, b in zip(times[side], times[against], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    typical = " / ".join(show_seconds(statistics.median(times[key])) for key in (side, against))
    return Row(name, round(middle, 3), target, f"{typical}; {low:.2f} to {high:.2f} in {len(pairs)} rounds")


def memory_row(name: str, peaks: dict[str, int], side: str, against: str, target: str) -> Row:
    """The ratio of two sides' peaks of memory (`peak_bytes`)."""
    detail = f"{peaks[side] / 2**20:.1f} MiB / {peaks[against] / 2**20:.1f} MiB"
    return Row(name, round(peaks[side] / peaks[against], 3), target, detail)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that torch held during `work` beyond what it held before.

    CUDA: torch.cuda.max_memory_allocated. CPU: every allocation and release of torch's allocator, the temporary
    ones inside an operator too, as torch.profiler records them. Either way the result does not depend on when the
    system takes memory back.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        work()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show_seconds(seconds: float) -> str:
    """With a unit that fits."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def machine() -> dict[str, Any]:
    """What the figures depend on; the dtype is that which a run would pick for the base here."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = models[0] if models else cpu
    named = {
        "cpu": cpu,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30),
        "torch": torch.__version__,
        "dtype": str(pick_dtype("auto", pick_device())).removeprefix("torch."),
    }
    if torch.cuda.is_available():
        named["gpu"] = torch.cuda.get_device_name()
    return named
