"""What methods cost: a ledger from the runs, and trainable parameters from the models' shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from gainlora.tracking import charts
from gainlora.tracking.document import Block, Heading, Note, Picture, Table
from gainlora.tracking.folder import Run, Step
from gainlora.tracking.groups import Group, settings

RANK = 4
"""Of the paper's SuperNI experiments, on every model."""


@dataclass(frozen=True)
class Cost:
    """One step's costs; over the seeds of a group, their means."""

    trainable: float
    """Parameters that train."""
    stored: float | None
    """Parameters kept after it: branches, gates, bases and what rules keep; None where nobody recorded them."""
    train: float
    """Seconds of training."""
    around: float
    """Seconds of the passes before and after training."""
    evaluate: float
    """Seconds per test example."""


def step_cost(run: Run, step: Step) -> Cost:
    """The costs of one step, as recorded."""
    seconds = step.scores["seconds"]
    examples = sum(run.data[task]["test"] for task in step.scores["scores"])
    return Cost(
        trainable=step.scores["trainable_parameters"],
        stored=sum(step.stored.values()) if step.stored else None,
        train=seconds["train"],
        around=seconds["prepare"] + seconds["update"],
        evaluate=seconds["evaluate"] / examples,
    )


def group_costs(group: Group) -> dict[int, Cost]:
    """Tasks learned -> mean costs of that step over the group's runs."""
    found: dict[int, list[Cost]] = {}
    for run in group.runs:
        for step in run.steps:
            found.setdefault(run.learned(step), []).append(step_cost(run, step))
    return {t: _mean(costs) for t, costs in sorted(found.items())}


def ledger(groups: Sequence[Group]) -> list[Block]:
    """Costs against the number of tasks learned: a figure and a table per order and model."""
    blocks: list[Block] = []
    for here in settings([group for group in groups if any(run.steps for run in group.runs)]):
        costs = {group.label: group_costs(group) for group in here}
        order, model = here[0].order, here[0].model
        panels = {
            "trainable parameters": _lines(costs, "trainable"),
            "stored parameters": _lines(costs, "stored"),
            "learning a task (s)": {m: {t: c.train + c.around for t, c in line.items()} for m, line in costs.items()},
            "answering a test example (s)": _lines(costs, "evaluate"),
        }
        devices = sorted({f"{run.config['device']}, {run.config['dtype']}" for group in here for run in group.runs})
        caption = f"{order}, {model}: costs of each task, and of all that is kept. Measured on: {'; '.join(devices)}."
        drawn = charts.cost_curves(panels)
        blocks += [_ledger_table(order, costs), Picture(drawn, caption, f"figures/{order}-{model}-costs")]
    if not blocks:
        return []
    note = (
        "Stored: all branches, gates and bases, and what a rule keeps. Passes: the covariance passes before and after "
        "training. The base model counts nowhere. Seconds are as measured, on a machine that may have had other work."
    )
    return [Heading("Costs"), *blocks, Note(note)]


def parameters(groups: Sequence[Group]) -> list[Block]:
    """Trainable parameters per task, for the methods of the runs on every model whose shapes are known."""
    from gainlora import rules
    from gainlora.model.shapes import MODELS, trainable_parameters  # only here: it imports torch

    known: dict[tuple[int, ...], list[str]] = {}
    for method in dict.fromkeys(group.method for group in groups if group.method in rules.methods()):
        known.setdefault(tuple(trainable_parameters(model, method, RANK) for model in MODELS), []).append(method)
    if not known:
        return []
    labelled = {", ".join(names): counts for counts, names in known.items()}
    rows = [[label, *(f"{count:,}" for count in counts)] for label, counts in labelled.items()]
    caption = (
        "Parameters that train while a task is learned: its branch and, with gates, its gate. Counted on the models' "
        f"shapes, with the paper's settings for SuperNI: rank {RANK}, gates 100 (T5) or 50 (Llama) wide."
    )
    drawn = charts.parameter_bars(list(MODELS), labelled)
    table = Table(["method", *MODELS], rows, numbers=1)
    return [Heading("Trainable parameters"), table, Picture(drawn, caption, "figures/trainable_parameters")]


def _ledger_table(order: str, costs: Mapping[str, Mapping[int, Cost]]) -> Table:
    rows = []
    for label, line in costs.items():
        first, last = (line[t] for t in (min(line), max(line)))
        kept = [f"{cost.stored:,.0f}" if cost.stored is not None else "-" for cost in (first, last)]
        seconds = [fmean(cost.train for cost in line.values()), fmean(cost.around for cost in line.values())]
        asked = [f"{cost.evaluate:.3f}" for cost in (first, last)]
        shown = [f"{last.trainable:,.0f}", *kept, *(f"{s:.1f}" for s in seconds), *asked]
        rows.append([label, f"{min(line)}, {max(line)}", *shown])
    head = [
        f"{order}, method", "after tasks", "trainable parameters", "stored, first", "stored, last",
        "train (s per task)", "passes (s per task)", "answer (s), first", "answer (s), last",
    ]  # fmt: skip
    return Table(head, rows, numbers=1)


def _lines(costs: Mapping[str, Mapping[int, Cost]], name: str) -> dict[str, dict[int, float]]:
    lines = {label: {t: getattr(cost, name) for t, cost in line.items()} for label, line in costs.items()}
    return {label: line for label, line in lines.items() if None not in line.values()}


def _mean(costs: Sequence[Cost]) -> Cost:
    stored = [cost.stored for cost in costs if cost.stored is not None]
    return Cost(
        trainable=fmean(cost.trainable for cost in costs),
        stored=fmean(stored) if stored else None,
        train=fmean(cost.train for cost in costs),
        around=fmean(cost.around for cost in costs),
        evaluate=fmean(cost.evaluate for cost in costs),
    )
