"""How figures look: sizes, colours, axes.

No pyplot, so no global state and no display. Colours hold for colour-blind readers (cividis for values, Okabe and
Ito's set with markers and dashes for lines) and on light as on dark paper: text and axes are drawn in `INK`, which the
report replaces by the page's own text colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1b1b"
"""Colour of text and axes."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", "--", ":")
WIDTH = 7.4
"""Inches, of a figure as wide as the text."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of line `index`; 105 before one comes again."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def axes_style(axes: Axes, grid: bool) -> None:
    """Ticks, labels and spines in the text's colour; spines only where there is a grid."""
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


def over_tasks(axes: Axes, count: int) -> None:
    """The axis "tasks learned", 1 to count."""
    axes_style(axes, grid=True)
    axes.set_xticks(range(1, count + 1))
    axes.set_xlim(0.8, count + 0.2)
    axes.set_xlabel("tasks learned", color=INK)


def panel_title(axes: Axes, text: str) -> None:
    """What one of several panels shows."""
    axes.set_title(text, fontsize=9, color=INK, loc="left")


def legend(figure: Figure) -> None:
    """One legend beside the axes, of all that has a label."""
    ink_legend(figure.legend(loc="outside right upper", frameon=False, fontsize=8))


def legend_below(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    """One legend under all panels."""
    if handles:
        ink_legend(figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=8, ncols=columns))


def ink_legend(made: Any) -> None:
    """A legend's text in the text's colour."""
    for text in made.get_texts():
        text.set_color(INK)


def short(name: str, length: int = 26) -> str:
    """The name, cut to `length` characters for an axis."""
    return name if len(name) <= length else name[: length - 1] + "…"


def distinct(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all begin or end with."""
    parts = [name.split(".") for name in names]
    start = end = 0
    while len(names) > 1 and min(map(len, parts)) > start + 1 and len({row[start] for row in parts}) == 1:
        start += 1
    while len(names) > 1 and min(map(len, parts)) > start + end + 1 and len({row[-1 - end] for row in parts}) == 1:
        end += 1
    return [".".join(row[start : len(row) - end]) for row in parts]


def listed(numbers: Sequence[int]) -> str:
    """ "50 and 576"."""
    return " and ".join(map(str, numbers)) if len(numbers) < 3 else f"{numbers[0]} to {numbers[-1]}"
