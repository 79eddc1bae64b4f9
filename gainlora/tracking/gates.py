"""What the gates of finished runs answer: each branch on its own task, on earlier and on later ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from gainlora.tracking import charts
from gainlora.tracking.document import Block, Heading, Note, Picture, Table
from gainlora.tracking.folder import Run
from gainlora.tracking.groups import Group, number, settings

Roles = list[tuple[float | None, float | None, float | None]]
"""Per branch: mean coefficient on its own task, on tasks learned before it, on tasks learned after it."""


def branch_roles(run: Run) -> Roles:
    """The roles of a finished run's branches; every task counts alike, None where there is no such task."""
    means = run.steps[-1].coefficients
    answers = [means[task]["mean"] for task in run.tasks]  # (T, T): task, branch
    roles: Roles = []
    for branch in range(len(answers)):
        column = [answer[branch] for answer in answers]
        roles.append((column[branch], _mean(column[:branch]), _mean(column[branch + 1 :])))
    return roles


def gate_outputs(groups: Sequence[Group]) -> list[Block]:
    """A figure and a table per order and model, of all groups with gates."""
    blocks: list[Block] = []
    for here in settings([group for group in groups if group.gated and group.finished]):
        order, model = here[0].order, here[0].model
        panels = {group.label: _over_seeds([branch_roles(run) for run in group.finished]) for group in here}
        caption = (
            f"{order}, {model}: mean coefficient of each branch (1, 2, ...) after all tasks. High on its own task: the "
            "branch is used where it was learned. Low on earlier tasks: it leaves them as they were, which is what "
            "the constraints on the gate are for. Nothing holds it off later tasks."
        )
        blocks.append(Picture(charts.branch_bars(panels), caption, f"figures/{order}-{model}-gates"))
        blocks.append(_table(panels))
    if not blocks:
        return []
    note = "A column per branch. Coefficients lie in [0, 1); means over test examples, tasks and seeds."
    return [Heading("Gates on old and new tasks"), *blocks, Note(note)]


def _table(panels: dict[str, Roles]) -> Table:
    rows = []
    for label, roles in panels.items():
        for kind, name in enumerate(("own task", "earlier tasks", "later tasks")):
            values = [role[kind] for role in roles]
            rows.append([label, name, *(number(value, 2) for value in (*values, _mean(values)))])
    branches = max(map(len, panels.values()))
    return Table(["method", "coefficient on", *(str(b) for b in range(1, branches + 1)), "mean"], rows, numbers=2)


def _over_seeds(runs: Sequence[Roles]) -> Roles:
    return [
        (_mean(a for a, _, _ in seeds), _mean(b for _, b, _ in seeds), _mean(c for _, _, c in seeds))
        for seeds in zip(*runs, strict=True)
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
