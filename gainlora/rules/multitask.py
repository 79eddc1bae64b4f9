"""One LoRA on the examples of all tasks at once: the usual upper bound, with the old data that the others lack."""

from gainlora.rules import BranchRule


class Rule(BranchRule):
    shared = True
    all_at_once = True
