"""The figures of one run: one function each, from plain numbers to a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gainlora.tracking.drawing import (
    COLOURS,
    INK,
    WIDTH,
    axes_style,
    distinct,
    legend,
    legend_below,
    line_style,
    listed,
    new_figure,
    over_tasks,
    panel_title,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Sequence[float | None]]


def accuracy_matrix(tasks: Sequence[str], steps: Sequence[str], R: Rows, decimals: int = 1) -> Figure:
    """Heat map of R: a row for each finished step holds the scores (0-100) of all tasks seen after it."""
    rows = [f"{t} {short(name)}" for t, name in enumerate(steps, start=1)]
    figure, axes = _heat_map(R, rows, _columns(tasks), top=100, decimals=decimals, unit="score")
    axes.set_ylabel("after learning task")
    axes.set_xlabel("score on task")
    return figure


def gate_coefficients(tasks: Sequence[str], means: Mapping[str, Sequence[float]]) -> Figure:
    """Heat map of integration coefficients a_i in [0, 1).

    Args:
        tasks: all branches, in order.
        means: seen task -> mean coefficient of branches 1..t over its test examples.
    """
    width = max((len(row) for row in means.values()), default=0)
    rows = [f"{tasks.index(name) + 1} {short(name)}" for name in means]
    values = [list(row) for row in means.values()]
    figure, axes = _heat_map(values, rows, _columns(tasks[:width]), top=1, decimals=2, unit="mean coefficient")
    axes.set_ylabel("test examples of task")
    axes.set_xlabel("branch learned on task")
    return figure


def coefficient_violins(tasks: Sequence[str], examples: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Distribution of the coefficients of single test examples: a violin per branch, a panel per task that is asked.

    Args:
        tasks: all branches, in order.
        examples: seen task -> (examples, t) coefficients.
    """
    import numpy as np

    count = len(examples)
    columns = 2 if count in (2, 4) else min(count, 3)
    lines = -(-count // columns)
    width = max(len(rows[0]) for rows in examples.values())
    figure = new_figure(columns * max(2.2, 0.9 + 0.28 * width), 0.6 + 1.9 * lines)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (task, rows) in zip(grid.flat, examples.items(), strict=False):
        columns_of = np.asarray(rows, dtype=float).T  # (t, examples)
        branches = range(1, len(columns_of) + 1)
        shapes = axes.violinplot(list(columns_of), branches, widths=0.85, showextrema=False)["bodies"]
        for branch, shape in zip(branches, shapes, strict=True):
            own = tasks[branch - 1] == task
            shape.set(facecolor=COLOURS[1] if own else COLOURS[0], edgecolor=INK, linewidth=0.6, alpha=0.75)
            shape.set_hatch("///" if own else None)
        low, first, median, third, high = np.percentile(columns_of, (5, 25, 50, 75, 95), axis=1)  # (t,) each
        axes.vlines(branches, low, high, color=INK, linewidth=0.7)
        axes.vlines(branches, first, third, color=INK, linewidth=2.4)
        axes.plot(branches, median, linestyle="", marker="_", markersize=11, markeredgewidth=1.6, color=INK)
        axes.set_xlim(0.4, width + 0.6)
        axes.set_xticks(range(1, width + 1, 1 if width <= 8 else 2))
        axes_style(axes, grid=True)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(f"{tasks.index(task) + 1} {short(task)}", fontsize=9, color=INK)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    figure.supylabel("coefficient", fontsize=9, color=INK)
    figure.supxlabel("branch", fontsize=9, color=INK)
    return figure


def accuracy_curves(tasks: Sequence[str], R: Rows) -> Figure:
    """Score of every task, from when it was learned to the end, and AP over the tasks seen."""
    figure = new_figure(WIDTH, max(3.2, 1.6 + 0.21 * len(tasks)))
    axes = figure.subplots()
    for i, task in enumerate(tasks):
        line = [(t + 1, row[i]) for t, row in enumerate(R) if i < len(row) and row[i] is not None]
        if line:
            axes.plot(*zip(*line, strict=True), label=f"{i + 1} {short(task)}", **line_style(i))
    steps, means = zip(*performance(R), strict=True)
    axes.plot(steps, means, color=INK, linewidth=2.6, label="AP (mean of seen)", zorder=1)
    over_tasks(axes, len(tasks))
    axes.set_ylabel("score", color=INK)
    legend(figure)
    return figure


def basis_growth(steps: Sequence[str], subspaces: Sequence[Mapping[str, Mapping[str, int]]]) -> Figure:
    """How full the memory is: of every basis a bar, its width the share of the input's d directions that it keeps, a
    piece for what each task added.

    Args:
        steps: names of the finished tasks.
        subspaces: their subspace.json; the last one has a basis.
    """
    from matplotlib import colormaps

    last = subspaces[-1]
    panels = [name for name in ("gate", "layers") if last[name]]
    heights = [0.5 + min(8.0, max(0.17, 0.3 - 0.01 * len(last[panel])) * len(last[panel])) for panel in panels]
    figure = new_figure(WIDTH, sum(heights) + 0.4 + 0.2 * -(-len(steps) // 3))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    colours = [colormaps["cividis"](0.12 + 0.88 * t / len(steps)) for t in range(len(steps))]
    pieces: list[Any] = []
    fullest = 0.0
    for axes, panel in zip(grid, panels, strict=True):
        names, widths = list(last[panel]), last[panel + "_width"]
        kept = [[100 * s[panel].get(name, 0) / widths[name] for name in names] for s in subspaces]  # (tasks, bases)
        before = [0.0] * len(names)
        pieces = []
        for colour, after in zip(colours, kept, strict=True):
            added = [b - a for a, b in zip(before, after, strict=True)]
            pieces.append(
                axes.barh(range(len(names)), added, left=before, color=colour, edgecolor=INK, linewidth=0.3, height=0.8)
            )
            before = after
        every = -(-len(names) // 32)
        labels = [f"layer {name}" for name in names] if panel == "gate" else distinct(names)
        axes_style(axes, grid=True)
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(0, len(names), every), [short(label, 34) for label in labels[::every]])
        axes.tick_params(axis="y", labelsize=6.5)
        axes.set_ylim(len(names) - 0.4, -0.6)
        for row in range(0, len(names), every):
            axes.annotate(
                f"{last[panel][names[row]]} of {widths[names[row]]}", (before[row], row), (4, 0), fontsize=6.5,
                textcoords="offset points", va="center", color=INK,
            )  # fmt: skip
        fullest = max(fullest, *before)
        sizes = sorted({widths[name] for name in names})
        panel_title(axes, f"inputs of the {'gate' if panel == 'gate' else 'adapted layers'}, d = {listed(sizes)}")
    grid[-1].set_xlim(0, min(100, 10 * (1 + 1.15 * fullest // 10)))
    grid[-1].set_xlabel("% of d that the basis keeps (at 100 it is full)", color=INK)
    for t, (piece, name) in enumerate(zip(pieces, steps, strict=True), start=1):
        piece.set_label(f"{t} {short(name)}")
    legend_below(figure, pieces, columns=3)
    return figure


def time_line(steps: Sequence[str], seconds: Sequence[Mapping[str, float]]) -> Figure:
    """What the time of learning went to: a row per task, a piece per phase, from left to right.

    Args:
        steps: names of the finished tasks.
        seconds: of each, phase -> seconds of work.
    """
    phases = list(dict.fromkeys(phase for row in seconds for phase in row))
    total = sum(sum(row.values()) for row in seconds)
    unit, name = (3600, "hours") if total > 2 * 3600 else (60, "minutes") if total > 120 else (1, "seconds")
    figure = new_figure(WIDTH, 1.2 + 0.26 * len(steps))
    axes = figure.subplots()
    at, made = 0.0, {}
    for row, spent in enumerate(seconds):
        for phase, length in spent.items():
            look = phases.index(phase)
            made[phase] = axes.barh(
                row, length / unit, left=at / unit, color=COLOURS[(1, 0, 4, 2, 3)[look % 5]], edgecolor=INK,
                linewidth=0.4, height=0.7, hatch=("", "", "///", "...", "xx")[look % 5], label=phase,
            )  # fmt: skip
            at += length
    axes_style(axes, grid=True)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(steps)), [f"{t} {short(step)}" for t, step in enumerate(steps, start=1)])
    axes.set_ylim(len(steps) - 0.4, -0.6)
    axes.set_xlim(0, at / unit)
    axes.set_xlabel(f"{name} of work", color=INK)
    legend_below(figure, [made[phase] for phase in phases], columns=5)
    return figure


def performance(R: Rows) -> list[tuple[int, float]]:
    """Tasks learned and AP, the mean of that row of R, for every row that holds scores."""
    rows = [(t, [score for score in row if score is not None]) for t, row in enumerate(R, start=1)]
    return [(t, sum(row) / len(row)) for t, row in rows if row]


def _heat_map(
    values: Rows, rows: Sequence[str], columns: Sequence[str], top: float, decimals: int, unit: str
) -> tuple[Figure, Axes]:
    import numpy as np

    width = max(len(columns), 1)
    grid = np.full((len(rows), width), np.nan)
    for t, row in enumerate(values):
        grid[t, : len(row)] = [np.nan if value is None else value for value in row]
    cell = 0.62 if width <= 8 else 0.46
    figure = new_figure(max(4.2, 3.0 + cell * width), 1.3 + 0.42 * len(rows))
    axes = figure.subplots()
    mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap="cividis", vmin=0, vmax=top, edgecolors="none")
    axes.invert_yaxis()
    size = 8.5 if width <= 8 else 6.5
    for (t, i), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "#ffffff" if value < 0.55 * top else "#000001"
            axes.text(i + 0.5, t + 0.5, f"{value:.{decimals}f}", ha="center", va="center", color=colour, fontsize=size)
    tilt: dict[str, Any] = {} if columns[:1] == ["1"] else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks([i + 0.5 for i in range(len(columns))], list(columns), **tilt)
    axes.set_yticks([t + 0.5 for t in range(len(rows))], list(rows))
    axes_style(axes, grid=False)
    axes.tick_params(length=0)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label(unit, color=INK)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    return figure, axes


def _columns(tasks: Sequence[str]) -> list[str]:
    """Column labels: names while there is room, else the numbers that the rows explain."""
    if len(tasks) > 8:
        return [str(i + 1) for i in range(len(tasks))]
    return [f"{i + 1} {short(name, 18)}" for i, name in enumerate(tasks)]
