"""The paper's own figures, and where they may stand beside measured ones."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from gainlora.tracking.document import Block, Heading, Note, Table
from gainlora.tracking.folder import Run
from gainlora.tracking.groups import CONSTRAINTS, Group

TASKS = 15
"""In each of the paper's orders."""
SOURCE = (
    "Liang, Chen, Li: Gated Integration of Low-Rank Adaptation for Continual Learning of Large Language Models "
    "(GainLoRA), NeurIPS 2025; transcribed from public notes on the paper."
)


@dataclass(frozen=True)
class Published:
    """AP and FT of one method, in percent."""

    model: str
    method: str
    """With " no-init" and " no-update" for the ablations."""
    order: str
    AP: float
    FT: float


def published_figures() -> list[Published]:
    """All that published.csv holds."""
    lines = files("gainlora.tracking").joinpath("published.csv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return [Published(r["model"], r["method"], r["order"], float(r["AP"]), float(r["FT"])) for r in rows]


def published_beside(group: Group) -> Published | None:
    """The paper's figures for what the group measured, if the setup is the same.

    The same model and order, all of its tasks and all of their examples, no option that tells it from other runs of
    the method but the published ablations; finished.
    """
    if not any(_same_setup(run) for run in group.finished) or set(group.differing) - {*CONSTRAINTS}:
        return None
    gate = group.options
    ablated = [
        word
        for word, on in (("no-init", "constrain_init"), ("no-update", "constrain_update"))
        if not gate[f"gate.{on}"]
    ]
    wanted = (group.model, " ".join([group.method, *(ablated if group.gated else [])]), group.order)
    return next((p for p in published_figures() if (p.model, p.method, p.order) == wanted), None)


def other_setup(groups: Sequence[Group]) -> list[Block]:
    """Tables of all published figures that stand beside no measured ones, one per model."""
    shown = [published_beside(group) for group in groups]
    left = [p for p in published_figures() if p not in shown]
    blocks: list[Block] = [Heading("Published, other setup")]
    blocks.append(
        Note(
            "For orientation only: no run above repeats these methods on the same model and order with all tasks and "
            f"examples, so none of these figures may be set against a measured one. AP and FT in percent. {SOURCE}"
        )
    )
    for model in dict.fromkeys(p.model for p in left):
        here = {(p.method, p.order): p for p in left if p.model == model}
        orders = sorted({order for _, order in here})
        rows = []
        for method in dict.fromkeys(method for method, _ in here):
            found = [here.get((method, order)) for order in orders]
            rows.append([method, *(text for p in found for text in published_cells(p))])
        head = ["published method", *(f"{order} {key}" for order in orders for key in ("AP", "FT"))]
        blocks += [Heading(f"{model}, published", 3), Table(head, rows, numbers=1)]
    return blocks


def published_cells(published: Published | None) -> list[str]:
    """AP and FT with the digits they were published with; "-" where there is nothing."""
    return ["-", "-"] if published is None else [f"{published.AP:.2f}", f"{published.FT:.2f}"]


def _same_setup(run: Run) -> bool:
    data = run.config["config"]["data"]
    whole = data["train_limit"] is None and data["test_limit"] is None
    return whole and not run.config["skipped"] and len(run.tasks) == TASKS
