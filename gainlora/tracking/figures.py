"""The figures of a run: one function each, from plain numbers to a matplotlib Figure.

No pyplot, so no global state and no display. Colours hold for colour-blind readers (cividis for
values, Okabe and Ito's set with markers and dashes for lines) and on light as on dark paper: text and
axes are drawn in `INK`, which the report replaces by the page's own text colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1b1b"
"""Colour of text and axes."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", "--", ":")

Rows = Sequence[Sequence[float | None]]


def accuracy_matrix(tasks: Sequence[str], R: Rows, decimals: int = 1) -> Figure:
    """Heat map of R, (T, T): row t holds the scores (0-100) of all tasks seen after learning task t."""
    rows = [f"{t} {short(name)}" for t, name in enumerate(tasks, start=1)]
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
    """Box plots of the coefficients of single test examples.

    Args:
        tasks: all branches, in order.
        examples: seen task -> (examples, t) coefficients.
    """
    count = len(examples)
    columns = 2 if count in (2, 4) else min(count, 3)
    lines = -(-count // columns)
    width = max(len(rows[0]) for rows in examples.values())
    figure = _figure(columns * max(2.2, 0.9 + 0.28 * width), 0.6 + 1.9 * lines)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, (task, rows) in zip(grid.flat, examples.items(), strict=False):
        boxes = axes.boxplot(list(zip(*rows, strict=True)), patch_artist=True, widths=0.6, flierprops={"markersize": 2})
        for branch, box in enumerate(boxes["boxes"], start=1):
            own = tasks[branch - 1] == task
            box.set(facecolor=COLOURS[1] if own else COLOURS[0], alpha=0.75)
            box.set_edgecolor(INK)
        for line in (*boxes["whiskers"], *boxes["caps"], *boxes["medians"]):
            line.set_color(INK)
        for dots in boxes["fliers"]:
            dots.set_markeredgecolor(INK)
        _style(axes, grid=True)
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
    figure = _figure(7.4, max(3.2, 1.6 + 0.21 * len(tasks)))
    axes = figure.subplots()
    for i, task in enumerate(tasks):
        line = [(t + 1, row[i]) for t, row in enumerate(R) if i < len(row) and row[i] is not None]
        if line:
            axes.plot(*zip(*line, strict=True), label=f"{i + 1} {short(task)}", **_line(i))
    means = performance(R)
    axes.plot(range(1, len(means) + 1), means, color=INK, linewidth=2.6, label="AP (mean of seen)", zorder=1)
    _over_tasks(axes, len(tasks))
    axes.set_ylabel("score", color=INK)
    _legend(figure)
    return figure


def performance_curves(curves: Mapping[str, Sequence[Rows]]) -> Figure:
    """AP after each task, one line per method: mean over its runs, with their range as a band.

    Args:
        curves: label -> the R of each run (seed).
    """
    figure = _figure(7.4, 3.4)
    axes = figure.subplots()
    for index, (label, runs) in enumerate(curves.items()):
        lines = [performance(R) for R in runs]
        points = list(zip(*lines, strict=False))  # up to the shortest run
        steps = range(1, len(points) + 1)
        name = f"{short(label, 40)} ({len(runs)} seeds)" if len(runs) > 1 else short(label, 40)
        axes.plot(steps, [sum(p) / len(p) for p in points], label=name, **_line(index))
        if len(runs) > 1:
            low, high = [min(p) for p in points], [max(p) for p in points]
            axes.fill_between(steps, low, high, color=COLOURS[index % len(COLOURS)], alpha=0.2, linewidth=0)
    _over_tasks(axes, max(len(R) for runs in curves.values() for R in runs))
    axes.set_ylabel("AP over the tasks seen", color=INK)
    _legend(figure)
    return figure


def basis_growth(subspaces: Sequence[Mapping[str, Mapping[str, int]]]) -> Figure:
    """Share of its input directions that each basis keeps, after each task.

    Args:
        subspaces: one subspace.json per finished task; at least one has a basis.
    """
    last = subspaces[-1]
    panels = [name for name in ("gate", "layers") if last[name]]
    figure = _figure(7.4, 0.5 + 2.5 * len(panels))
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        steps = [t for t, s in enumerate(subspaces, start=1) if s[panel]]
        shares = {
            key: [100 * subspaces[t - 1][panel][key] / last[panel + "_width"][key] for t in steps]
            for key in last[panel]
        }
        if panel == "gate":  # few: a line each
            for index, (key, line) in enumerate(shares.items()):
                sizes = f"{last['gate'][key]} of {last['gate_width'][key]}"
                axes.plot(steps, line, label=f"input of layer {key}: {sizes}", **_line(index))
        else:  # dozens: their mean and range
            points = list(zip(*shares.values(), strict=True))
            axes.plot(steps, [sum(p) / len(p) for p in points], label=f"mean of {len(shares)} bases", **_line(0))
            low, high = [min(p) for p in points], [max(p) for p in points]
            axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label="smallest to largest")
        axes.set_title("gate" if panel == "gate" else "adapted layers", fontsize=9, color=INK, loc="left")
        _over_tasks(axes, len(subspaces))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("% of width", color=INK)
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        _ink_legend(legend)
    return figure


def performance(R: Rows) -> list[float]:
    """AP after each finished task: the mean of what row t of R holds."""
    rows = [[score for score in row if score is not None] for row in R]
    return [sum(row) / len(row) for row in rows if row]


def short(name: str, length: int = 26) -> str:
    """The name, cut to `length` characters for an axis."""
    return name if len(name) <= length else name[: length - 1] + "…"


def _heat_map(
    values: Rows, rows: Sequence[str], columns: Sequence[str], top: float, decimals: int, unit: str
) -> tuple[Figure, Axes]:
    import numpy as np

    width = max(len(columns), 1)
    grid = np.full((len(rows), width), np.nan)
    for t, row in enumerate(values):
        grid[t, : len(row)] = [np.nan if value is None else value for value in row]
    cell = 0.62 if width <= 8 else 0.46
    figure = _figure(max(4.2, 3.0 + cell * width), 1.3 + 0.42 * len(rows))
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
    _style(axes, grid=False)
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


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _line(index: int) -> dict[str, Any]:
    """Colour, marker and dash of line `index`; 105 before one comes again."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _over_tasks(axes: Axes, count: int) -> None:
    _style(axes, grid=True)
    axes.set_xticks(range(1, count + 1))
    axes.set_xlim(0.8, count + 0.2)
    axes.set_xlabel("tasks learned", color=INK)


def _style(axes: Axes, grid: bool) -> None:
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for side, spine in axes.spines.items():
        spine.set_visible(grid and side in ("left", "bottom"))
        spine.set_color(INK)
    axes.patch.set_visible(False)
    if grid:
        axes.grid(color="#888888", alpha=0.25, linewidth=0.7)
        axes.set_axisbelow(True)


def _legend(figure: Figure) -> None:
    _ink_legend(figure.legend(loc="outside right upper", frameon=False, fontsize=8))


def _ink_legend(legend: Any) -> None:
    for text in legend.get_texts():
        text.set_color(INK)
