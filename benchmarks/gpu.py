"""Full-size models on a GPU, random weights: a training step with 1, 5 and 15 branches against peft's LoRA.

Beside the ratios: tokens per second, and the share of the bfloat16 ceiling, which is measured as a large matrix
product. Operations are counted (torch's FlopCounterMode), not estimated. The subspace update at this size is in the
group `subspaces`.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, interleave, memory_row, peak_bytes, synchronize, time_row
from benchmarks.models import base, examples, learned
from benchmarks.training import WithPeft, step
from gainlora.model.base import pick_device

BRANCHES = (1, 5, 15)
SHAPES = {"t5-large": (8, 512), "llama-2-7b": (4, 1024)}
"""Examples of a batch and tokens of a prompt: the lengths of the paper's runs."""
ANSWER = 50


def ceiling(size: int = 8192, rounds: int = 20) -> float:
    """Operations per second of a product of two (size, size) bfloat16 matrices."""
    a = torch.randn(size, size, device=pick_device(), dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def rows(name: str, batch_size: int, length: int, peak: float, rounds: int = 10, answer: int = ANSWER) -> list[Row]:
    """Time and memory of a step with every number of branches, against peft.

    Args:
        peak: the ceiling, operations per second.
    """
    sides: dict[str, Callable[[Any], nn.Module]] = {"peft": WithPeft}
    for branches in BRANCHES:
        sides[str(branches)] = functools.partial(learned, branches=branches)
    steps, peaks, operations = {}, {}, {}
    for side, build in sides.items():
        model = base(name, torch.bfloat16)
        batch = examples(model, batch_size, length, answer)

        def two_steps(model: Any = model, build: Any = build, side: str = side, batch: Any = batch) -> None:
            steps[side] = step(build(model), batch, model.config.is_encoder_decoder)
            steps[side]()
            steps[side]()

        peaks[side] = peak_bytes(two_steps)
        with FlopCounterMode(display=False) as counter:
            steps[side]()
        operations[side] = counter.get_total_flops()
    times = interleave(steps, rounds)
    found = []
    for side in map(str, BRANCHES):
        what = f"{name}, {batch_size} x {length} tokens, {side} branches / peft LoRA"
        row = time_row(f"{what}, time", times, side, "peft", "")
        speeds = (
            f"{other}: {batch_size * length / statistics.median(times[other]):.0f} tokens/s, "
            f"{100 * operations[other] / statistics.median(times[other]) / peak:.0f} % of the ceiling"
            for other in (side, "peft")
        )
        found.append(Row(**{**vars(row), "detail": f"{row.detail}; {'; '.join(speeds)}"}))
        found.append(memory_row(f"{what}, memory", peaks, side, "peft", ""))
    return found


def run() -> list[Row]:
    """The ceiling, and the rows of both models."""
    peak = ceiling()
    found = [Row("bfloat16 product of 8192 x 8192 matrices, TFLOP/s", round(peak / 1e12, 1), "", "the ceiling")]
    for name, (batch_size, length) in SHAPES.items():
        found += rows(name, batch_size, length, peak)
    return found
