"""One LoRA per task, and the task is told at inference: no interference at all, so nothing is forgotten.

A bound, no continual learner: it needs what the others do without.
"""

from gainlora.rules import BranchRule


class Rule(BranchRule):
    task_known = True
