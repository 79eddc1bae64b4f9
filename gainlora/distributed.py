"""Several processes that learn one run together, started by `accelerate launch`; alone, a process does nothing here.

Each process holds the frozen base (or its shard, gainlora/model/base.py) and the whole adapter. They share a step's or
a pass's batches (`share`) and add up what came of them (`add`, `gather`): gradients, sums for covariances, answers.
So every process takes the same step, and their adapters stay equal. The first one alone writes files and decides what
is on disk (`first`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gainlora.errors import GainLoRAError

T = TypeVar("T")


class Lost(Exception):
    """Another process has ended, and with it the work of all. What is wrong is for that process to say."""


def join(device: torch.device) -> None:
    """Meet the other processes of this `accelerate launch`; each gets a device of its own.

    Raises:
        GainLoRAError: there are too few devices, or accelerate's configuration asks for what is not done here.
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
    PartialState(cpu=device.type == "cpu")


def leave() -> None:
    """Say that this process is done, as NCCL wants it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


def sharded() -> bool:
    """Whether each process keeps a shard of the base only: accelerate's FSDP."""
    return count() > 1 and _set("ACCELERATE_USE_FSDP")


def share(items: Sequence[T]) -> list[tuple[T, bool]]:
    """This process's items, each with whether it counts.

    Every process gets as many, for they make each forward pass together where the base is sharded: with none left,
    the last item is done once more and does not count.
    """
    rounds = -(-len(items) // count())
    mine = range(index(), rounds * count(), count())
    return [(items[min(i, len(items) - 1)], i < len(items)) for i in mine]


def add(tensors: Sequence[Tensor], numbers: Sequence[float] = ()) -> list[float]:
    """Add up the processes' tensors, in place, and numbers, returned: in one message, and for all the same.

    Args:
        tensors: of one dtype and device; at least one.
    """
    if count() == 1:
        return list(numbers)
    last = torch.tensor(numbers, dtype=tensors[0].dtype, device=tensors[0].device)
    flat = torch.cat([*(t.detach().flatten() for t in tensors), last])
    with _together():
        dist.all_reduce(flat)
    *parts, last = flat.split([*(t.numel() for t in tensors), len(numbers)])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
    return last.tolist()


def copy_first(tensors: Sequence[Tensor]) -> None:
    """Give all processes the first one's values, in place."""
    with torch.no_grad():
        for tensor in tensors if index() else ():
            tensor.zero_()
    add(tensors)


def gather(values: list[T]) -> list[T]:
    """The values of all processes, one process after another."""
    if count() == 1:
        return values
    found: list[list[T]] = [[] for _ in range(count())]
    with _together():
        dist.all_gather_object(found, values)
    return [value for part in found for value in part]


def first(make: Callable[[], T]) -> T:
    """What the first process makes, on all of them."""
    return gather([make()] if index() == 0 else [])[0]


def _set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # this process's own
        raise
    except RuntimeError as error:  # gloo's and NCCL's alike
        raise Lost(str(error)) from error
