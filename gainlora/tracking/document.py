"""What a report is made of, whatever it is written as: headings, notes, tables and figures, in order."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3; the part that follows has an anchor where something links to it."""

    text: str
    level: int = 2
    anchor: str | None = None


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int
    """Columns from this one on hold numbers: aligned right."""
    links: Sequence[str] = ()
    """Anchor that row k's first cell links to."""


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    drawn: Figure
    caption: str
    name: str
    """Of its files beside the page, without suffix; may hold a folder."""


Block = Heading | Note | Table | Picture


def save_picture(picture: Picture, folder: Path, dpi: int) -> tuple[str, list[Path]]:
    """Write <folder>/<name>.png and .svg, on white paper.

    Returns:
        The SVG's text without a background, and the files.
    """
    png, svg = folder / f"{picture.name}.png", folder / f"{picture.name}.svg"
    png.parent.mkdir(parents=True, exist_ok=True)
    picture.drawn.savefig(png, dpi=dpi, facecolor="white")
    text = _svg(picture.drawn, salt=picture.name)
    start = re.match(r"<svg[^>]*>", text)
    assert start is not None
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
    svg.write_text(f"{start.group()}\n{paper}{text[start.end() :]}", encoding="utf-8")
    return text, [png, svg]


def _svg(drawn: Figure, salt: str) -> str:
    """The figure as one <svg> element; no ids shared with other figures, no links, no date."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}):
        drawn.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # hundredths of a point are enough
    return re.sub(r"\n\s+", "\n", text)
