"""InfLoRA: A_t is fixed outside the old tasks' input subspaces, so that B_t A_t x = 0 for their inputs x.

Liang and Li, InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning (CVPR 2024).
"""

from gainlora.rules import Branch, BranchRule, Start, zero_B


class Rule(BranchRule):
    train_A = False
    input_memory = True

    def start(self, new: Start) -> Branch:
        assert new.free_directions is not None
        return new.free_directions(new.rank), zero_B(new)
