"""Figures of a report: heat map, curves and bars, from pandas objects to a matplotlib Figure.

Readable in black and white and by colour-blind readers: every line has its own marker, dashes and colour (Okabe and
Ito's set), a label at its end, and at most five others in its panel; heat maps and bars also show values as numbers.
No pyplot: no global state, no display.
"""

import io
from collections.abc import Mapping
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gainlora.errors import printable
from gainlora.rules import GATED

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "x": "✕"}
"""A line's marker -> the symbol before its label."""
DASHES = ((0, (4, 2)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (2, 2)), (0, (7, 3)), (0, (3, 1, 1, 1, 1, 1)))
MOST = len(COLOURS)
"""Largest number of lines in one panel."""
STYLE: Any = {
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "text.parse_math": False,  # a "$" in a name is a "$"
    "svg.fonttype": "none",
}

Curve: TypeAlias = pd.DataFrame
"""Index x; column mean, and min and max where they span several runs."""


def short(name: str, length: int = 30) -> str:
    """A name as a label: printable, at most `length` characters."""
    name = printable(str(name))
    return name if len(name) <= length else name[: length - 1] + "…"


@matplotlib.rc_context(STYLE)
def heat_map(values: pd.DataFrame, top: float, decimals: int, unit: str, spread: pd.DataFrame | None = None) -> Figure:
    """One cell per value, with its number; NaN stays empty.

    Args:
        values: rows and columns with names; the index's and columns' names label the axes.
        top: value of the lightest colour; 0 has the darkest.
        spread: standard deviations, written below the values.
    """
    rows, columns = values.shape
    wide = columns > 8  # numbers instead of names, which the rows explain
    figure = Figure(figsize=(2.6 + (0.48 if wide else 0.72) * columns, 1.2 + 0.44 * rows), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False)
    grid = values.to_numpy(float)
    deviations = np.full_like(grid, np.nan) if spread is None or wide else spread.reindex_like(values).to_numpy(float)
    image = axes.imshow(np.ma.masked_invalid(grid), cmap="cividis", vmin=0, vmax=top, aspect="auto")
    for (t, i), value in np.ndenumerate(grid):
        if not np.isnan(value):
            below = "" if np.isnan(deviations[t, i]) else f"\n± {deviations[t, i]:.{decimals}f}"
            ink = "white" if value < 0.55 * top else "black"
            text = f"{value:.{decimals}f}{below}"
            axes.text(i, t, text, ha="center", va="center", color=ink, fontsize=6.5 if wide else 8)
    names = [str(i + 1) for i in range(columns)] if wide else [short(name, 18) for name in values.columns]
    tilt: dict[str, Any] = {} if wide else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(columns), names, **tilt)
    axes.set_yticks(range(rows), [short(name) for name in values.index])
    axes.set(xlabel=values.columns.name, ylabel=values.index.name)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, pad=0.02, label=unit)
    return figure


@matplotlib.rc_context(STYLE)
def curves(
    panels: Mapping[str, Mapping[str, Curve]], xlabel: str, ylabel: str, columns: int = 2, bottom: float | None = None
) -> Figure:
    """Lines with labels at their ends; a panel with more than `MOST` lines becomes several.

    Args:
        panels: title -> label -> curve. Lines of gated methods are solid, all others dashed.
        bottom: lower end of the y axes; None: automatic.
    """
    parts = [(title, part) for title, lines in panels.items() for part in _parts(lines)]
    columns = min(columns, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(7.6, 0.4 + (3.0 if columns == 1 else 2.3) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    ends = [float(x) for _, lines in parts for curve in lines.values() for x in (curve.index.min(), curve.index.max())]
    for axes, (title, lines) in zip(grid.flat, parts, strict=False):
        for index, (label, curve) in enumerate(lines.items()):
            solid = label.startswith(GATED) or (not any(name.startswith(GATED) for name in lines) and index == 0)
            look = {"color": COLOURS[index], "marker": [*MARKERS][index], "linestyle": "-" if solid else DASHES[index]}
            axes.plot(curve.index, curve["mean"], label=label, linewidth=1.5, markersize=4, **look)
            if "min" in curve and (curve["max"] > curve["min"]).any():
                axes.fill_between(curve.index, curve["min"], curve["max"], color=COLOURS[index], alpha=0.1, linewidth=0)
        axes.set(title=short(title, 60), xlabel=xlabel)
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        axes.set_xlim(min(ends) - 0.05 * (max(ends) - min(ends) or 1), max(ends) + 0.05 * (max(ends) - min(ends) or 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_ends(axes)
    for axes in grid.flat[len(parts) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    return figure


@matplotlib.rc_context(STYLE)
def bars(panels: Mapping[str, pd.DataFrame], decimals: int = 1) -> Figure:
    """Horizontal bars of the same names in every panel, with their values; gated methods are hatched.

    Args:
        panels: title -> frame with index names, column mean, and column std for error bars.
    """
    names = list(dict.fromkeys(name for table in panels.values() for name in table.index))
    figure = Figure(figsize=(7.6, 0.7 + 0.24 * len(names)), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    rows = range(len(names))
    for axes, (title, table) in zip(grid, panels.items(), strict=True):
        table = table.reindex(names)
        values, error = table["mean"], table["std"].fillna(0) if "std" in table else pd.Series(0.0, names)
        made = axes.barh(rows, values.fillna(0), 0.7, color=COLOURS[0], edgecolor="black", linewidth=0.5)
        for row, (bar, name, value, deviation) in enumerate(zip(made, names, values, error, strict=True)):
            if name.startswith(GATED):
                bar.set(facecolor=COLOURS[4], hatch="///")
            text, end = ("-", 0) if np.isnan(value) else (_compact(value, decimals), max(value, 0) + deviation)
            axes.annotate(text, (end, row), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.errorbar(values, rows, xerr=error, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        axes.grid(visible=False, axis="y")
        axes.set_title(short(title, 40))
        axes.margins(x=0.18)
        axes.tick_params(axis="x", labelsize=7)
        axes.xaxis.set_major_formatter(lambda x, _: _compact(x, 2))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_yticks(rows, [short(name, 44) for name in names])
    axes.invert_yaxis()
    return figure


def svg(figure: Figure, salt: str) -> str:
    """The figure as one SVG document, without a date, reproducible byte for byte."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _parts(lines: Mapping[str, Curve]) -> list[dict[str, Curve]]:
    """Split lines evenly into panels of at most MOST; a rule's gated and equal lines share one if possible."""
    items, parts = list(lines.items()), []
    while items:
        size = -(-len(items) // -(-len(items) // MOST))
        if 1 < size < len(items) and items[size][0].startswith(GATED + items[size - 1][0].partition(" ")[0]):
            size -= 1
        parts.append(dict(items[:size]))
        items = items[size:]
    return parts


def _label_ends(axes: Axes) -> None:
    """Write every line's label beside the right end of the axes, apart from each other."""
    low, high = axes.get_ylim()
    lines = [(np.asarray(line.get_xydata(), float), line) for line in axes.get_lines()]
    lines.sort(key=lambda pair: pair[0][-1, 1])
    heights = np.array([points[-1, 1] for points, _ in lines])
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + 0.075 * (high - low))
    heights -= max(0.0, heights[-1] - high)
    right = max(points[-1, 0] for points, _ in lines)
    for (_, line), height in zip(lines, heights, strict=True):
        text = f"{MARKERS[str(line.get_marker())]} {short(str(line.get_label()), 26)}"
        look: dict[str, Any] = {"color": line.get_color(), "fontsize": 7, "va": "center", "annotation_clip": False}
        axes.annotate(text, (right, height), (6, 0), textcoords="offset points", **look)


def _compact(value: float, decimals: int) -> str:
    """1234567 as 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.{decimals}f}" if value != round(value) or decimals < 2 else f"{value:g}"
