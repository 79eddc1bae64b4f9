"""SeqLoRA: one branch, trained on task after task. The lower bound: nothing protects old tasks."""

from gainlora.rules import BranchRule


class Rule(BranchRule):
    shared = True
