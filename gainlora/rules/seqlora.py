"""SeqLoRA: one branch, trained on all tasks in sequence. A lower bound: nothing protects old tasks."""

from gainlora.rules import BranchRule


class Rule(BranchRule):
    shared = True
