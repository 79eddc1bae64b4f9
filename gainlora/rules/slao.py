"""SLAO: one merged LoRA for any number of tasks.

    start   A_t = Q^T, where A_{t-1}^T = Q R with diag(R) > 0: orthonormal rows that span what the last fine-tuned A
            did with the same orientation; B_t = B_{t-1} as fine-tuned
    merge   A = A_t,  B = B + (B_t - B) / sqrt(t)  after task t; the model answers with A and B

Qiao and Mahdavi, Merge before Forget: A Single LoRA Continual Learning via Continual Merging (arXiv 2512.23017).
"""

import math

from gainlora.errors import GainLoRAError
from gainlora.rules import Branch, BranchRule, Gradients, Model, Start


class Rule(BranchRule):
    shared = True

    def start(self, new: Start) -> Branch:
        import torch

        if new.rank > new.layer.in_features:
            raise GainLoRAError(
                f"lora.rank: {new.rank}: exceeds a layer's {new.layer.in_features} inputs, so that slao's rows cannot "
                f"be orthonormal; give {new.layer.in_features} or less."
            )
        if new.last is None:
            return super().start(new)
        A, new.layer.memory["merged_B"] = new.last
        Q, R = torch.linalg.qr(A.T)
        Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)  # LAPACK does not fix the signs, and B is reused
        return Q.T.contiguous(), new.layer.memory["tuned_B"]

    def finish(self, model: Model, gradients: Gradients) -> None:
        t = len(model.config.tasks) + 1
        for layer in model.layers.values():
            _, B = layer.learning
            tuned = B.detach().clone()
            merged = layer.memory.pop("merged_B", tuned)
            layer.memory["tuned_B"] = tuned
            B.data.copy_(merged + (tuned - merged) / math.sqrt(t))
