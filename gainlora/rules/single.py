"""One LoRA per task, selected by task id at inference: no interference, so no forgetting.

A bound, not a continual learner: it needs the task id.
"""

from gainlora.rules import BranchRule


class Rule(BranchRule):
    task_known = True
