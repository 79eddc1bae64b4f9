"""N-LoRA: sparse branches, which rarely change the same weight.

    penalty = sum over layers of sum |s B_t A_t|        s = alpha / rank

The paper's penalty on the weight change of a branch; the scaling s is ours, so that the change is the effective one.
Yang et al., Is Parameter Collision Hindering Continual Learning in LLMs? (COLING 2025).
"""

from gainlora.rules import BranchRule, Layer, Penalty


class Rule(BranchRule):
    penalty_weight = 5e-5  # ours, for a sum over all entries of all layers

    def penalty(self, layer: Layer) -> Penalty:
        A, B = layer.learning
        return lambda: layer.scaling * (B @ A).abs().sum()
