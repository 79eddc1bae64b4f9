"""Full-size models on a GPU, random weights: what branches add to the frozen base, in time and memory.

One model is in memory at a time, so sides are measured one after another; a row is printed as soon as it is known, and
nothing begins after `SECONDS`. Per model: a training step (frozen base: forward and backward alone) with peft's LoRA
and 1, 5 and 15 branches; generation; a covariance pass; the decomposition of one covariance.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import ANSWER, CASES, grad_from_embeddings
from benchmarks.measure import Row, peak_bytes, show_seconds, synchronize
from benchmarks.models import base, examples, learned, prompts
from benchmarks.training import MANY, Plain, WithPeft, step
from gainlora.model.base import pick_device
from gainlora.model.covariance import layer_covariances
from gainlora.model.subspace import empty_basis, expand_basis
from gainlora.training.train import target_loss

SECONDS = 7 * 60
NEW_TOKENS = 32
BRANCHES = (1, 5, MANY)


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Median of several calls, after one to warm up."""
    found = []
    for _ in range(rounds + 1):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def frozen_step(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and backward through the base alone."""
    plain = Plain(grad_from_embeddings(model)).train()
    return lambda: target_loss(plain, batch, model.config.is_encoder_decoder).backward()


def learn_step(
    steps: list[Callable[[], None]], build: Callable[[Any], Any], model: Any, batch: dict[str, Tensor]
) -> None:
    """An optimizer step; the first call builds the adapter, whose memory counts, too."""
    if not steps:
        steps.append(step(build(model), batch, model.config.is_encoder_decoder))
    steps[0]()


def generation(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """`NEW_TOKENS` new tokens of every prompt."""
    return torch.inference_mode()(partial(model.generate, **inputs, max_new_tokens=NEW_TOKENS))


def rows(
    name: str, dtype: torch.dtype, batch_size: int, length: int, rounds: int = 8, answer: int = ANSWER
) -> Iterator[Row]:
    """The rows of one model."""
    what = f"{name}, {str(dtype).removeprefix('torch.')}, {batch_size} x {length} tokens"
    known: dict[str, tuple[float, int]] = {}

    def row(measured: str, against: str, took: float, peak: int) -> Row:
        """The ratio to the side `against`, measured before; 1 if there is none."""
        known[measured] = took, peak
        first, least = known.get(against, (took, peak))
        memory = f"{peak / 2**30:.2f} GiB beside the base" + (f", {peak / least:.2f} times" if least else "")
        detail = f"{show_seconds(took)} / {show_seconds(first)}; {memory}"
        return Row(f"{what}, {measured} / {against}", round(took / first, 3), "", detail)

    def measured(work: Callable[[], Any]) -> tuple[float, int]:
        peak = peak_bytes(work)  # the first call, which makes what later ones keep
        return seconds(work, rounds), peak

    def fresh() -> Any:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return base(name, dtype)

    model = fresh()
    batch = {key: value.cpu() for key, value in examples(model, batch_size, length, answer).items()}
    yield row("frozen base", "frozen base", *measured(frozen_step(model, batch)))
    sides: dict[str, Callable[[Any], Any]] = {"peft LoRA": WithPeft}
    sides |= {f"{count} branches": partial(learned, branches=count) for count in BRANCHES}
    for side, build in sides.items():
        del model
        model = fresh()
        steps: list[Callable[[], None]] = []
        yield row(side, "frozen base", *measured(partial(learn_step, steps, build, model, batch)))
        steps.clear()
    del model
    model = fresh()
    inputs = prompts(model, batch_size, length)
    yield row("generation, base", "generation, base", *measured(generation(model, inputs)))
    full = learned(model, MANY, learning=False)
    yield row(f"generation, {MANY} branches", "generation, base", *measured(generation(full, inputs)))
    placed = {key: value.to(full.device) for key, value in batch.items()}
    forward = partial(full, **placed, use_cache=False, **({} if full.encoder_decoder else {"logits_to_keep": 1}))
    yield row("forward only", "forward only", *measured(torch.no_grad()(forward)))
    yield row("covariance pass", "forward only", *measured(partial(layer_covariances, full, [batch])))
    width = full.layers[full.groups[0]].in_features
    del model, full, forward
    gc.collect()
    x = torch.randn(4 * width, width, device=pick_device()) * torch.arange(1, width + 1, device=pick_device()) ** -0.7
    covariance = x.T @ x / len(x)
    basis = empty_basis(width, device=covariance.device)[0]
    took, peak = measured(lambda: expand_basis(basis, covariance, 0.995, "covariance", "benchmark"))
    yield row(f"decomposition of one covariance, d = {width}", "itself", took, peak)


def run() -> Iterator[Row]:
    """The rows of all models, until the time is over."""
    ends = time.monotonic() + SECONDS
    for name, dtype, batch_size, length in CASES:
        for row in rows(name, dtype, batch_size, length):
            yield row
            if time.monotonic() > ends:
                return
