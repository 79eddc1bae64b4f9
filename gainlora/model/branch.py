"""Branch rules: how a new task's branch starts and what of it trains. Independent of the gate.

    seqlora   one branch for all tasks, A and B train: the lower bound, it forgets freely
    inclora   one branch per task, A_t and B_t train
    inflora   one branch per task, only B_t trains; A_t lies outside the old tasks' input subspaces,
              so that B_t A_t x = 0 for inputs x that old tasks used (Liang and Li, InfLoRA, CVPR 2024)

A rule is an entry of `RULES`; a run uses rule `X` as method `X` (all coefficients 1) or `gainlora-X` (gated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What distinguishes one rule from another."""

    shared: bool = False
    """One branch for all tasks, trained on; no gates then."""
    train_A: bool = True
    """Whether A_t trains beside B_t."""
    input_memory: bool = False
    """Keeps a basis of each layer's inputs, and designs A_t outside it."""


RULES = {
    "seqlora": Rule(shared=True),
    "inclora": Rule(),
    "inflora": Rule(train_A=False, input_memory=True),
}


def random_A(rank: int, inputs: int, generator: torch.Generator) -> Tensor:
    """LoRA's usual start of A (rank, d_in): uniform with nn.Linear's bound. B starts at 0."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
