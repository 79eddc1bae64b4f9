"""O-LoRA: a penalty makes a new branch's input directions orthogonal to those of old branches.

    penalty = sum over layers and old branches i of sum |A_t A_i^T|

The authors' code can also penalize the norm of the new branch (its lambda_2); that is not in the paper and not here.
Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning (EMNLP Findings 2023); not peft's OLoRA.
"""

from gainlora.rules import BranchRule, Layer, Penalty


class Rule(BranchRule):
    penalty_weight = 0.5  # the paper's lambda_1

    def penalty(self, layer: Layer) -> Penalty:
        if not len(layer.A):
            return None
        A, _ = layer.learning
        return lambda: (A @ layer.A.T).abs().sum()  # all old branches at once: (r, (t-1) r)
