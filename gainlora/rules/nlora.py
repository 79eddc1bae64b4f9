"""N-LoRA: sparse branches, which rarely change the same weight.

    penalty = sum over layers of sum |s B_t A_t|        s = alpha / rank

The paper's penalty on the weight change of a branch; the scaling s is ours, so that the change is the effective one.
Yang et al., Is Parameter Collision Hindering Continual Learning in LLMs? (COLING 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gainlora.rules import BranchRule

if TYPE_CHECKING:
    from torch import Tensor

    from gainlora.model.layers import GatedLoRALinear


class Rule(BranchRule):
    penalty_weight = 5e-5  # ours, for a sum over all entries of all layers

    def penalty(self, layer: GatedLoRALinear) -> Callable[[], Tensor]:
        A, B = layer.learning
        return lambda: layer.scaling * (B @ A).abs().sum()
