"""Several processes that learn one run together, started by `accelerate launch`; without it, all functions are no-ops.

Each process holds the frozen base (or its shard, gainlora/model/base.py) and the whole adapter. They share the batches
of a step or pass (`split`) and combine the results (`all_reduce_sum`, `all_gather`): gradients, covariances, answers.
So every process takes the same step, and their adapters stay equal. Only the first one reads and writes a run's files
(`on_main`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gainlora.errors import GainLoRAError

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: longer than one of them decomposes or writes. The launcher ends processes
whose peer died."""


class PeerProcessDied(Exception):
    """A peer process ended; its own error explains why."""


def join(device: torch.device) -> None:
    """Join the process group of this `accelerate launch`; each process gets its own device.

    Raises:
        GainLoRAError: too few devices, or accelerate's configuration requests an unsupported feature.
    """
    from accelerate import PartialState

    if _set("ACCELERATE_USE_DEEPSPEED"):
        raise GainLoRAError(
            "launch.config: DeepSpeed is not used here; configs/fsdp.yaml shards the base as ZeRO-3 would."
        )
    if _set("ACCELERATE_USE_FSDP") and _set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise GainLoRAError(
            "launch.config: fsdp_cpu_ram_efficient_loading: true leaves processes without weights; set it to false."
        )
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda" and local >= torch.cuda.device_count():
        raise GainLoRAError(
            f"launch.num_processes: process {local + 1} of this machine finds {torch.cuda.device_count()} GPUs; start "
            "one for each."
        )
    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def leave() -> None:
    """Leave the process group, as NCCL requires."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


def sharded() -> bool:
    """Whether each process holds only a shard of the base (accelerate's FSDP)."""
    return count() > 1 and _set("ACCELERATE_USE_FSDP")


def split(items: Sequence[T]) -> list[tuple[T, bool]]:
    """This process's items, each with whether it counts.

    Every process gets the same number, since a sharded base needs all of them for each forward pass: a process without
    items left repeats the last one, which does not count.
    """
    rounds = -(-len(items) // count())
    mine = range(index(), rounds * count(), count())
    return [(items[min(i, len(items) - 1)], i < len(items)) for i in mine]


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all processes, in place and in one message.

    Args:
        tensors: of one dtype and device; at least one.
    """
    if count() == 1:
        return
    flat = torch.cat([t.detach().flatten() for t in tensors])
    with _together():
        dist.all_reduce(flat)
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Copy the first process's values to all, in place."""
    with torch.no_grad():
        for tensor in tensors if index() else ():
            tensor.zero_()
    all_reduce_sum(tensors)


def all_gather(values: list[T]) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return values
    found: list[list[T]] = [[] for _ in range(count())]
    with _together():
        dist.all_gather_object(found, values)
    return [value for part in found for value in part]


def on_main(make: Callable[[], T]) -> T:
    """Call a function on the first process and return its result on all of them."""
    return all_gather([make()] if index() == 0 else [])[0]


def _set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # this process's own
        raise
    except RuntimeError as error:  # of gloo and NCCL
        raise PeerProcessDied(str(error)) from error
