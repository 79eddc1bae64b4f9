"""The figures of one run: one function each, from plain numbers to a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gainlora.tracking.drawing import (
    COLOURS,
    INK,
    WIDTH,
    axes_style,
    ink_legend,
    legend,
    line_style,
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


def coefficient_spread(tasks: Sequence[str], examples: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Spread of the coefficients of single test examples: median, middle half, and 5 % to 95 %.

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
        low, first, median, third, high = np.percentile(rows, (5, 25, 50, 75, 95), axis=0)  # (t,) each
        branches = range(1, len(median) + 1)
        own = [COLOURS[1] if tasks[branch - 1] == task else COLOURS[0] for branch in branches]
        axes.vlines(branches, low, high, color=INK, linewidth=0.8)
        axes.vlines(branches, first, third, color=own, linewidth=7)
        axes.plot(branches, median, linestyle="", marker="_", markersize=9, color=INK)
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


def basis_growth(subspaces: Sequence[Mapping[str, Mapping[str, int]]]) -> Figure:
    """Share of its input directions that each basis keeps, after each task.

    Args:
        subspaces: one subspace.json per finished task; at least one has a basis.
    """
    last = subspaces[-1]
    panels = [name for name in ("gate", "layers") if last[name]]
    figure = new_figure(WIDTH, 0.5 + 2.5 * len(panels))
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        steps = [t for t, s in enumerate(subspaces, start=1) if s[panel]]
        shares = {
            key: [100 * subspaces[t - 1][panel][key] / last[panel + "_width"][key] for t in steps]
            for key in last[panel]
        }
        if panel == "gate":  # few: a line each
            for index, (key, line) in enumerate(shares.items()):
                sizes = f"{last['gate'][key]} of {last['gate_width'][key]}"
                axes.plot(steps, line, label=f"input of layer {key}: {sizes}", **line_style(index))
        else:  # dozens: their mean and range
            points = list(zip(*shares.values(), strict=True))
            axes.plot(steps, [sum(p) / len(p) for p in points], label=f"mean of {len(shares)} bases", **line_style(0))
            low, high = [min(p) for p in points], [max(p) for p in points]
            axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label="smallest to largest")
        panel_title(axes, "gate" if panel == "gate" else "adapted layers")
        over_tasks(axes, len(subspaces))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("% of width", color=INK)
        ink_legend(axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8))
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
