"""One LoRA on the examples of all tasks at once: the usual upper bound, which uses old data."""

from gainlora.rules import BranchRule


class Rule(BranchRule):
    shared = True
    all_at_once = True
