"""The parts of a report that compare methods: the main table, curves, ablations, and options of the gate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from gainlora.tracking import charts
from gainlora.tracking.document import Block, Heading, Note, Picture, Table
from gainlora.tracking.folder import GATED
from gainlora.tracking.groups import (
    CONSTRAINTS,
    GATE_OPTIONS,
    Group,
    families,
    same_budget,
    settings,
    spread,
    value_text,
)
from gainlora.tracking.published import published_beside, published_cells

EXPLAINED = (
    "AP, average performance: the mean score (0 to 100) over all tasks after the last one; higher is better. "
    "FT, forgetting: how far the earlier tasks fell from their best score, on average; lower is better. "
    "Several seeds: mean ± sample standard deviation; unfinished runs do not count."
)


def methods(groups: Sequence[Group], decimals: int) -> list[Block]:
    """The main table: methods as rows, AP and FT of each order as columns, one table per model."""
    blocks: list[Block] = [Heading("Methods")]
    for model in dict.fromkeys(group.model for group in groups):
        here = [group for group in groups if group.model == model]
        blocks += [Heading(model, 3), _main_table(here, decimals)]
        blocks += [Note(text) for text in (*gated_against_equal(here, decimals), *unequal(here))]
    return [*blocks, Note(EXPLAINED)]


def curves(groups: Sequence[Group]) -> list[Block]:
    """Average performance over the sequence, one figure per order and model."""
    blocks: list[Block] = []
    for here in settings(groups):
        lines = {group.label: [run.R for run in group.finished or group.runs if run.steps] for group in here}
        lines = {label: matrices for label, matrices in lines.items() if matrices}
        if lines:
            order, model = here[0].order, here[0].model
            caption = (
                f"{order}, {model}: average performance over the tasks seen so far. The higher a line stays, the less "
                "is lost. Solid: gated. Bands span the seeds; a level without markers learns all tasks at once."
            )
            blocks.append(Picture(charts.performance_curves(lines), caption, f"figures/{order}-{model}-curves"))
    return [Heading("Over the sequence"), *blocks] if blocks else []


def gated_against_equal(groups: Sequence[Group], decimals: int) -> list[str]:
    """A sentence for every gated method beside the same rule with equal coefficients, if the budget was the same."""
    sentences = []
    for gated in groups:
        if not (gated.gated and all(gated.options[name] for name in CONSTRAINTS)):
            continue
        for equal in groups:
            if GATED + equal.method == gated.method and same_budget(gated, equal):
                sentences += _verdict(gated, equal, decimals)
    return sentences


def unequal(groups: Sequence[Group]) -> list[str]:
    """For each order, the options in which the methods differ though their names do not say so."""
    sentences = []
    for here in settings(groups):
        parts = []
        for name in sorted({name for group in here for name in group.options} - {"method", "code"}):
            of = [g for g in here if g.gated or not name.startswith("gate.")]
            held: dict[str, list[str]] = {}
            for group in of:
                if name not in group.differing:
                    held.setdefault(value_text(group.options.get(name)), []).append(group.label)
            if len(held) > 1:
                parts.append(f"{name}: " + "; ".join(f"{value} for {', '.join(who)}" for value, who in held.items()))
        if parts:
            sentences.append(f"Not the same for all methods on {here[0].order}: {'. '.join(parts)}.")
    return sentences


def gate_options(groups: Sequence[Group], decimals: int) -> list[Block]:
    """AP and FT against the gate's width, depth, score and first direction, where runs differ in one of them alone."""
    blocks: list[Block] = []
    for option in GATE_OPTIONS:
        for here in settings([group for family in families(groups, [option]) for group in family]):
            blocks += _option_effect(option, here, decimals)
    return [Heading("Gate options"), *blocks] if blocks else []


def ablation(groups: Sequence[Group], decimals: int) -> list[Block]:
    """Gates without the constraint on their start, on their training, or both."""
    found = [family for family in families(groups, CONSTRAINTS) if family[0].gated]
    if not found:
        return []
    published = any(published_beside(group) for family in found for group in family)
    rows = []
    for family in found:
        for group in sorted(family, key=lambda g: [not g.options[name] for name in CONSTRAINTS]):
            kept = ["yes" if group.options[name] else "no" for name in CONSTRAINTS]
            cells = [spread(group.measured(key), decimals) for key in ("AP", "FT")]
            beside = published_cells(published_beside(group)) if published else []
            name = group.label_without(*CONSTRAINTS)
            rows.append([name, group.order, group.model, *kept, group.state(), *cells, *beside])
    head = ["method", "order", "model", "start constrained", "training constrained", "seeds", "AP", "FT"]
    head += ["published AP", "published FT"] if published else []
    note = "Runs that differ in nothing but the constraints that keep a new branch off on old tasks."
    return [Heading("Constraints of the gate"), Note(note), Table(head, rows, numbers=5)]


def _main_table(groups: Sequence[Group], decimals: int) -> Table:
    orders = list(dict.fromkeys(group.order for group in groups))
    cells = {(group.label, group.order): group for group in groups}
    published = {group.order for group in groups if published_beside(group)}
    rows = []
    for label in dict.fromkeys(group.label for group in groups):
        row = [label]
        for order in orders:
            group = cells.get((label, order))
            row += [spread(group.measured(key), decimals) if group else "-" for key in ("AP", "FT")]
            row.append(group.state() if group else "-")
            if order in published:
                row += published_cells(published_beside(group) if group else None)
        rows.append(row)
    head = ["method"]
    for order in orders:
        names = ["AP", "FT", "seeds", *(["published AP", "published FT"] if order in published else [])]
        head += [f"{order} {name}" for name in names]
    return Table(head, rows, numbers=1)


def _verdict(gated: Group, equal: Group, decimals: int) -> list[str]:
    """The sentence, on the seeds that both groups have finished; none without one."""
    ours, theirs = ({run.config["seed"]: run.result for run in group.finished} for group in (gated, equal))
    seeds = ours.keys() & theirs.keys()
    if not seeds:
        return []
    reached = [[results[seed]["AP"] for seed in seeds] for results in (ours, theirs)]
    lost = [[results[seed]["FT"] for seed in seeds] for results in (theirs, ours)]
    gain = round(fmean(reached[0]) - fmean(reached[1]), decimals) + 0.0  # not -0.0
    verb = "beats" if gain > 0 else "loses to" if gain < 0 else "equals"
    name = "" if gated.label == gated.method else f" ({gated.label})"
    forgotten = " -> ".join(spread(FT, decimals).split(" ± ")[0] for FT in lost)
    counted = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    counted += "" if seeds == ours.keys() | theirs.keys() else " that both have"
    return [
        f"Same budget: gated{name} {verb} equal for rule {equal.method} on {gated.order}: AP {gain:+.{decimals}f} "
        f"({' against '.join(spread(AP, decimals) for AP in reached)}), FT {forgotten} ({counted})."
    ]


def _option_effect(option: str, groups: Sequence[Group], decimals: int) -> list[Block]:
    order, model = groups[0].order, groups[0].model
    values = sorted({value_text(group.options.get(option)) for group in groups}, key=_natural)
    lines: dict[str, dict[str, list[list[float]]]] = {}
    rows = []
    for group in sorted(groups, key=lambda g: (g.label_without(option), _natural(value_text(g.options.get(option))))):
        name, value = group.label_without(option), value_text(group.options.get(option))
        lines.setdefault(name, {})[value] = [group.measured("AP"), group.measured("FT")]
        rows.append([name, value, group.state(), *(spread(group.measured(key), decimals) for key in ("AP", "FT"))])
    title = f"{option} on {order}, {model}"
    caption = f"{title}: AP and FT of runs that differ in nothing else. Bars: standard deviation over the seeds."
    drawn = charts.option_effect(option, values, lines)
    name = f"figures/{order}-{model}-{option.replace('.', '-')}"
    table = Table(["method", option, "seeds", "AP", "FT"], rows, numbers=2)
    return [Heading(title, 3), table, Picture(drawn, caption, name)]


def _natural(text: str) -> tuple[bool, Any]:
    """Numbers by size, before words."""
    try:
        return (False, float(json.loads(text)))
    except (ValueError, TypeError):
        return (True, text)
