"""A training step with `model.compile`, beside the same without it; and the minutes that compiling takes."""

import time

from benchmarks.measure import Row, interleave, show_seconds, time_row
from benchmarks.models import SMALL, base, examples, learned
from benchmarks.training import MANY, model_kind, step


def row(name: str, rounds: int = 8, batch_size: int = 4, length: int = 128, **how: str) -> Row:
    """15 branches, in the dtype that a run would pick; `how` it compiles."""
    models = {"compiled": learned(base(name), MANY), "eager": learned(base(name), MANY)}
    batch = examples(base(name), batch_size, length)
    sides = {side: step(model, batch, model_kind(name)) for side, model in models.items()}
    models["compiled"].compile_base(**how)
    started = time.perf_counter()
    sides["compiled"]()
    first = show_seconds(time.perf_counter() - started)
    times = interleave(sides, rounds)
    found = time_row(f"training step, compiled / not, 15 branches, {name}", times, "compiled", "eager", "")
    return Row(found.name, found.ratio, found.target, f"{found.detail}; the first step {first}")


def run() -> list[Row]:
    """A row per model."""
    return [row(name) for name in SMALL]
