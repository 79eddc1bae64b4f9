"""IncLoRA: a new branch per task beside the frozen old ones."""

from gainlora.rules import BranchRule


class Rule(BranchRule):
    pass
