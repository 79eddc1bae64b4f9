"""Branch rules: how a new task's branch starts, what of it trains, what penalizes it. Independent of the gate.

A rule is one file here, named as the rule, with a class `Rule`; a run uses rule X as method `X` (all coefficients
1) or `gainlora-X` (gated). Importing a rule loads no torch: names and flags are needed where nothing is learned.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from gainlora.model.gainlora_model import GainLoRAModel
    from gainlora.model.layers import GatedLoRALinear

Branch = tuple["Tensor", "Tensor"]
"""A (r, d_in) and B (d_out, r)."""


@dataclass(frozen=True)
class Start:
    """What a rule may use to start the branch of one layer."""

    layer: GatedLoRALinear
    rank: int
    generator: Generator
    """Seeded by the run and the task; on the CPU."""
    last: Branch | None
    """Shared branch: what it was after the last task; None before the first."""
    free_directions: Callable[[int], Tensor] | None
    """Rules with an input memory: the new task's n strongest input directions outside it, as InfLoRA's A (n, d_in)."""


class BranchRule:
    """The base of all rules: LoRA's usual start, A and B train, no penalty."""

    shared = False
    """One branch for all tasks, trained on."""
    train_A = True
    """Whether A_t trains beside B_t."""
    input_memory = False
    """Keeps a basis of each layer's inputs."""
    task_known = False
    """Each task is answered by its own branch alone: needs the task's identity at inference (a bound)."""
    all_at_once = False
    """Learns all tasks together in one step (a bound)."""
    penalty_weight = 0.0
    """Default of train.penalty_weight: what the penalty is multiplied with in the loss."""

    @property
    def gateable(self) -> bool:
        """Whether gates can weigh the branches: there is one per task, and nothing else that chooses among them."""
        return not (self.shared or self.task_known or self.all_at_once)

    def start(self, new: Start) -> Branch:
        """The new branch of one layer before training; a shared one goes on from where it was."""
        return new.last or (random_A(new), zero_B(new))

    def penalty(self, layer: GatedLoRALinear) -> Callable[[], Tensor] | None:
        """Called once a layer when training starts. Returns what gives the layer's penalty (a scalar) at every step,
        from `layer.learning`; None: none. It depends on what training leaves alone (frozen branches, `layer.memory`)
        and on the learned branch as it is at the step, so that training can go on from a checkpoint."""
        return None

    def finish(self, model: GainLoRAModel, gradients: Callable[[], Iterator[None]]) -> None:
        """After training, before the branch is frozen. What a rule keeps of a layer goes to `layer.memory`, which is
        saved with the task.

        Args:
            gradients: runs through the task's training examples (subspace.max_examples of them) one by one; at each,
                the trainable parameters' `grad` is that of the example's log-likelihood.
        """


@cache
def get(name: str) -> BranchRule:
    """The rule of a method: `inflora` of "inflora" as of "gainlora-inflora".

    Raises:
        KeyError: there is none.
    """
    name = name.removeprefix("gainlora-")
    if name not in names():
        raise KeyError(name)
    rule: BranchRule = importlib.import_module(f"{__name__}.{name}").Rule()
    return rule


@cache
def names() -> tuple[str, ...]:
    """All rules."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


@cache
def methods() -> tuple[str, ...]:
    """All methods: every rule, and `gainlora-` and every rule that gates can weigh."""
    return (*names(), *(f"gainlora-{name}" for name in names() if get(name).gateable))


def random_A(new: Start) -> Tensor:
    """LoRA's usual start of A (r, d_in): uniform with nn.Linear's bound."""
    import torch

    bound = 1 / math.sqrt(new.layer.base.in_features)
    A = torch.empty(new.rank, new.layer.base.in_features)
    return A.uniform_(-bound, bound, generator=new.generator)


def zero_B(new: Start) -> Tensor:
    """LoRA's usual start of B (d_out, r): 0, so that the branch begins by changing nothing."""
    import torch

    return torch.zeros(new.layer.base.out_features, new.rank)
