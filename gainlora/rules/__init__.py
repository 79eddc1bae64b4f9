"""Branch rules: how a new branch starts, which parts train, and which penalty applies. Independent of the gate.

A rule is one file here, named after the rule, with a class `Rule`; a run uses rule X as method `X` (all coefficients
1), `gainlora-X` (gated) or `routed-X` (`gainlora.model.router`). Importing a rule does not load torch: many commands
need only names and flags.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from gainlora.model.layers import GatedLoRALinear
    from gainlora.model.modeling import GainLoRAModel

GATED, ROUTED = "gainlora-", "routed-"
"""Prefixes of methods whose coefficients depend on the prompt; the rest of the name is the branch rule."""
ALL_TASKS = "all_tasks"
"""Name of the single step of a method that learns all tasks at once."""
# in quotes: importing a rule does not load torch
Layer: TypeAlias = "GatedLoRALinear"
Model: TypeAlias = "GainLoRAModel"
Branch: TypeAlias = "tuple[Tensor, Tensor]"
"""A (r, d_in) and B (d_out, r)."""
Penalty: TypeAlias = "Callable[[], Tensor] | None"
"""A function of no arguments for a layer's penalty (a scalar) at a step; None: no penalty."""
Gradients: TypeAlias = "Callable[[], Iterator[None]]"
"""Iterates over a task's training examples (subspace.max_examples of them); at each, `grad` of the trainable parameters
is that of the example's log-likelihood."""


@dataclass(frozen=True)
class Start:
    """Inputs for starting the branch of one layer."""

    layer: Layer
    rank: int
    generator: Generator
    """Seeded by the run and the task; on the CPU."""
    last: Branch | None
    """Shared branch: its state after the last task; None before the first."""
    free_directions: Callable[[int], Tensor] | None
    """Rules with an input memory: the new task's n strongest input directions outside it, as InfLoRA's A (n, d_in)."""


class BranchRule:
    """Base class of rules: LoRA's usual start, A and B train, no penalty."""

    shared = False
    """One branch for all tasks, trained further."""
    train_A = True
    """Whether A_t trains, like B_t."""
    input_memory = False
    """Stores a basis of each layer's inputs."""
    task_known = False
    """Each task uses only its own branch: needs the task id at inference (a bound)."""
    all_at_once = False
    """Learns all tasks together in one step (a bound)."""
    penalty_weight = 0.0
    """Default of train.penalty_weight: factor of the penalty in the loss."""

    @property
    def gateable(self) -> bool:
        """Whether gates or a router can weigh the branches: one per task, and no other selection among them."""
        return not (self.shared or self.task_known or self.all_at_once)

    def start(self, new: Start) -> Branch:
        """The new branch of one layer before training; a shared one continues from its last state."""
        return new.last or (random_A(new), zero_B(new))

    def penalty(self, layer: Layer) -> Penalty:
        """Called once per layer when training starts. Returns a function of no arguments for the layer's penalty (a
        scalar) at a step; None: no penalty. It may depend only on constants of the training (frozen branches,
        `layer.memory`) and on the current `layer.learning`, so that training can resume from a checkpoint."""
        return None

    def finish(self, model: Model, gradients: Gradients) -> None:
        """Called after training, before the branch is frozen. A rule stores state for later tasks in
        `layer.memory`, which is saved with the task.

        Args:
            gradients: iterates over the task's training examples (subspace.max_examples of them); at each, `grad` of
                the trainable parameters is that of the example's log-likelihood.
        """


@cache
def get(name: str) -> BranchRule:
    """The rule of a method: `inflora` for "inflora", "gainlora-inflora" and "routed-inflora".

    Raises:
        KeyError: unknown.
    """
    name = bare(name)
    if name not in names():
        raise KeyError(name)
    rule: BranchRule = importlib.import_module(f"{__name__}.{name}").Rule()
    return rule


def bare(method: str) -> str:
    """The name of a method's rule."""
    return next((method.removeprefix(p) for p in (GATED, ROUTED) if method.startswith(p)), method)


@cache
def names() -> tuple[str, ...]:
    """All rules."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


@cache
def methods() -> tuple[str, ...]:
    """All methods: every rule, and each prefix plus every rule whose branches can be weighed."""
    weighed = [name for name in names() if get(name).gateable]
    return (*names(), *(prefix + name for prefix in (GATED, ROUTED) for name in weighed))


def random_A(new: Start) -> Tensor:
    """LoRA's usual start of A (r, d_in): uniform with nn.Linear's bound."""
    import torch

    bound = 1 / math.sqrt(new.layer.in_features)
    A = torch.empty(new.rank, new.layer.in_features)
    return A.uniform_(-bound, bound, generator=new.generator)


def zero_B(new: Start) -> Tensor:
    """LoRA's usual start of B (d_out, r): 0, so that a new branch has no effect."""
    import torch

    return torch.zeros(new.layer.out_features, new.rank)
