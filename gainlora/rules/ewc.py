"""EWC: one branch; a quadratic penalty protects parameters that matter to old tasks.

    penalty = 1/2 sum_j F_j (theta_j - theta*_j)^2        F = sum over old tasks of the diagonal Fisher information

theta* are the parameters after the last task and F is summed over tasks. F_j is the mean over the task's training
examples (subspace.max_examples of them) of the squared gradient of their log-likelihood (the empirical Fisher).

Kirkpatrick et al., Overcoming Catastrophic Forgetting in Neural Networks (PNAS 2017); one penalty at the last
optimum for all old tasks: Huszar's note on it (PNAS 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gainlora.rules import Branch, BranchRule, Start

if TYPE_CHECKING:
    from torch import Tensor

    from gainlora.model.layers import GatedLoRALinear
    from gainlora.model.modeling import GainLoRAModel


class Rule(BranchRule):
    shared = True
    penalty_weight = 1e4  # ours; usual values lie between 1e2 and 1e5

    def start(self, new: Start) -> Branch:
        if new.last is not None:
            new.layer.memory["anchor_A"], new.layer.memory["anchor_B"] = new.last
        return super().start(new)

    def penalty(self, layer: GatedLoRALinear) -> Callable[[], Tensor] | None:
        if "anchor_A" not in layer.memory:
            return None
        kept = layer.memory
        held = [(now, kept[f"anchor_{name}"], kept[f"fisher_{name}"]) for now, name in _parameters(layer)]

        def penalty() -> Tensor:
            first, second = [(fisher * (now - anchor).square()).sum() for now, anchor, fisher in held]
            return 0.5 * (first + second)

        return penalty

    def finish(self, model: GainLoRAModel, gradients: Callable[[], Iterator[None]]) -> None:
        squares = [
            (layer, name, parameter, parameter.detach() * 0)
            for layer in model.layers.values()
            for parameter, name in _parameters(layer)
        ]
        count = 0
        for _ in gradients():
            count += 1
            for _, _, parameter, total in squares:
                assert parameter.grad is not None
                total += parameter.grad.square()
        for layer, name, _, total in squares:
            layer.memory[f"fisher_{name}"] = layer.memory.get(f"fisher_{name}", 0) + total / count
            layer.memory.pop(f"anchor_{name}", None)


def _parameters(layer: GatedLoRALinear) -> list[tuple[Tensor, str]]:
    A, B = layer.learning
    return [(A, "A"), (B, "B")]
