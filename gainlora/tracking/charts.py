"""Figures that compare runs: one function each, from plain numbers to a matplotlib Figure.

Colours mean the same in all of them: a branch rule has a colour and a marker, gated methods have solid lines, all
others broken ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gainlora.tracking.drawing import (
    COLOURS,
    INK,
    MARKERS,
    WIDTH,
    axes_style,
    legend_below,
    new_figure,
    over_tasks,
    panel_title,
    short,
)
from gainlora.tracking.figures import Rows, performance
from gainlora.tracking.folder import GATED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[int, float]
"""Tasks learned -> value."""


def performance_curves(curves: Mapping[str, Sequence[Rows]]) -> Figure:
    """AP after each task, one line per method: mean over its runs, with their range as a band.

    Args:
        curves: label -> the R of each run (seed). A method that learns all tasks at once has one AP, drawn as a level.
    """
    styles = method_styles(list(curves))
    figure = new_figure(WIDTH, 3.4 + 0.1 * len(curves))
    axes = figure.subplots()
    for label, runs in curves.items():
        lines = [performance(R) for R in runs]
        at_once = lines[0][0][0] > 1
        points = [(1, lines[0][0][1]), *lines[0]] if at_once else lines[0]
        steps = [t for t, _ in points[: min(map(len, lines)) + at_once]]
        values = [[AP for _, AP in column] for column in zip(*lines, strict=False)]  # up to the shortest run
        values = values * len(steps) if at_once else values
        name = f"{short(label, 52)} ({len(runs)} seeds)" if len(runs) > 1 else short(label, 52)
        style = styles[label] | ({"marker": ""} if at_once else {})
        axes.plot(steps, [sum(column) / len(column) for column in values], label=name, **style)
        if len(runs) > 1:
            low, high = [min(column) for column in values], [max(column) for column in values]
            faint = 0.18 if len(curves) <= 4 else 0.07
            axes.fill_between(steps, low, high, color=style["color"], alpha=faint, linewidth=0)
    over_tasks(axes, max(len(R) for runs in curves.values() for R in runs))
    axes.set_ylabel("AP over the tasks seen", color=INK)
    legend_below(figure, axes.get_legend_handles_labels()[0], columns=2)
    return figure


def branch_bars(panels: Mapping[str, Sequence[Sequence[float | None]]]) -> Figure:
    """Bars of every branch's mean coefficient on its own, earlier and later tasks.

    Args:
        panels: label -> (branches, 3); None where there is no such task.
    """
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = new_figure(WIDTH, 0.7 + 1.9 * lines)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, (label, rows) in zip(grid.flat, panels.items(), strict=False):
        for index, (kind, colour) in enumerate((("own task", 1), ("earlier tasks", 0), ("later tasks", 5))):
            bars = [(b, row[index]) for b, row in enumerate(rows, start=1) if row[index] is not None]
            axes.bar(
                [b + 0.27 * (index - 1) for b, _ in bars], [value for _, value in bars], width=0.25,
                color=COLOURS[colour], edgecolor=INK, linewidth=0.4, label=kind, hatch=("", "//", "..")[index],
            )  # fmt: skip
        axes_style(axes, grid=True)
        axes.grid(visible=False, axis="x")
        axes.set_xticks(range(1, len(rows) + 1))
        axes.set_ylim(0, 1.02)
        panel_title(axes, short(label, 48))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("mean coefficient", fontsize=9)
    legend_below(figure, grid[0, 0].get_legend_handles_labels()[0], columns=3)
    return figure


def option_effect(
    option: str, values: Sequence[str], lines: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
) -> Figure:
    """AP and FT against an option's value, one line per method, bars for the standard deviation.

    Args:
        option: its name.
        values: all values, in order.
        lines: label -> value -> the APs and the FTs of its runs.
    """
    from statistics import fmean, stdev

    styles = method_styles(list(lines))
    figure = new_figure(WIDTH, 3.0)
    for index, (axes, key) in enumerate(zip(figure.subplots(1, 2), ("AP", "FT"), strict=True)):
        for label, by_value in lines.items():
            known = [(values.index(value), runs[index]) for value, runs in by_value.items() if runs[index]]
            known.sort()
            axes.errorbar(
                [at for at, _ in known], [fmean(runs) for _, runs in known],
                yerr=[stdev(runs) if len(runs) > 1 else 0 for _, runs in known], capsize=3, label=short(label, 52),
                **styles[label],
            )  # fmt: skip
        axes_style(axes, grid=True)
        axes.set_xticks(range(len(values)), list(values))
        axes.set_xlim(-0.3, len(values) - 0.7)
        axes.set_xlabel(option)
        axes.set_ylabel(key)
        if index == 0:
            legend_below(figure, axes.get_legend_handles_labels()[0], columns=2)
    return figure


def cost_curves(panels: Mapping[str, Mapping[str, Line]]) -> Figure:
    """Costs against the number of tasks learned: a panel each, one line per method.

    Args:
        panels: what it costs -> label -> values.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    styles = method_styles(labels)
    figure = new_figure(WIDTH, 4.4 + 0.1 * len(labels))
    count = max(t for lines in panels.values() for line in lines.values() for t in line)
    made: dict[str, Any] = {}
    for axes, (title, lines) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for label, line in lines.items():
            (made[label],) = axes.plot(list(line), list(line.values()), label=short(label, 52), **styles[label])
        over_tasks(axes, count)
        axes.set_ylim(bottom=0)
        _thousands(axes)
        panel_title(axes, title)
    legend_below(figure, [made[label] for label in labels if label in made], columns=2)
    return figure


def parameter_bars(models: Sequence[str], counts: Mapping[str, Sequence[int]]) -> Figure:
    """Trainable parameters, a group of bars per model, on a logarithmic axis.

    Args:
        models: their names.
        counts: label -> parameters on each model.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = new_figure(WIDTH, 3.2 + 0.16 * len(counts))
    axes = figure.subplots()
    width = 0.8 / len(counts)
    for index, (label, row) in enumerate(counts.items()):
        shift = width * (index - (len(counts) - 1) / 2)
        axes.bar(
            [at + shift for at in range(len(models))], row, width=0.9 * width, color=COLOURS[index % len(COLOURS)],
            edgecolor=INK, linewidth=0.4, hatch=("", "//", "..", "xx")[index % 4], label=short(label, 90),
        )  # fmt: skip
    axes.set_yscale("log")
    axes_style(axes, grid=True)
    axes.grid(visible=False, axis="x")
    axes.tick_params(which="minor", colors=INK)
    axes.set_xticks(range(len(models)), list(models))
    axes.set_ylabel("trainable parameters")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    legend_below(figure, axes.get_legend_handles_labels()[0], columns=1)
    return figure


def method_styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line styles by label: colour and marker of the rule, solid where gated, broken where not."""
    rules = list(dict.fromkeys(label.removeprefix(GATED) for label in labels))
    styles = {}
    for label in labels:
        index = rules.index(label.removeprefix(GATED))
        again = index >= len(COLOURS)  # a colour's second use has another dash, and another marker
        gated, equal = ("-.", ":") if again else ("-", "--")
        styles[label] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": gated if label.startswith(GATED) else equal,
            "markersize": 4.5,
            "linewidth": 1.6,
        }
    return styles


def _thousands(axes: Axes) -> None:
    """Values from a thousand on as 10k, 10M."""
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    large = axes.get_ylim()[1] >= 1000
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if large else ScalarFormatter())
