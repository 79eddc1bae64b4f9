"""Tables and pages: written once in Markdown, which becomes a self-contained HTML page; tables for the terminal."""

import base64
import re
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from gainlora.errors import printable
from gainlora.report import plots

Rows = Sequence[Sequence[str]]


class Page:
    """A page of headings, paragraphs, tables and figures, in order. Texts are escaped: names come from others."""

    def __init__(self, title: str) -> None:
        self.title, self.figures = title, dict[str, Figure]()
        """Figures by the name of their files, without suffix."""
        self.parts: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        self.parts.append(f"{'#' * level} {escaped(text)}")

    def note(self, *texts: str) -> None:
        """A paragraph for each text."""
        self.parts += map(escaped, texts)

    def table(self, head: Sequence[str], rows: Rows, numbers: int = 1, links: Sequence[str] = ()) -> None:
        """A table; the first cells link to the headings `links`."""
        self.parts.append(markdown_table(head, rows, numbers, links))

    def picture(self, figure: Figure, caption: str, *name: str) -> None:
        """A figure and its caption; `name`: folder and parts of its files' name."""
        *folders, last = name
        place = "/".join(["figures", *folders, re.sub(r"[^\w.=-]+", "_", last)])
        self.figures[place] = figure
        self.parts.append(f"![{escaped(place)}]({place}.svg)\n\n{escaped(caption)}")

    @property
    def markdown(self) -> str:
        """The page, with figures as files beside it."""
        return "\n\n".join([f"# {escaped(self.title)}", *self.parts]) + "\n"

    def write(self, path: Path, dpi: int) -> list[Path]:
        """Write the page to `path`, and report.md and figures/ beside it; returns all files, the page first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        drawings, written = {}, [path, path.with_name("report.md")]
        for name, figure in self.figures.items():
            png, svg = (path.parent / f"{name}.{suffix}" for suffix in ("png", "svg"))
            png.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(png, dpi=dpi, facecolor="white")
            drawings[f"{name}.svg"] = plots.svg(figure, salt=name)
            svg.write_text(drawings[f"{name}.svg"], encoding="utf-8")
            written += [png, svg]
        written[1].write_text(self.markdown, encoding="utf-8")
        path.write_text(self._html(drawings), encoding="utf-8")
        return written

    def _html(self, drawings: dict[str, str]) -> str:
        from jinja2 import Environment, StrictUndefined
        from markdown_it import MarkdownIt

        parser, contents = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table"), []
        tokens = parser.parse("\n\n".join(self.parts))
        for token, following in pairwise(tokens):
            if token.type == "heading_open":
                text = following.children[0].content if following.children else ""
                token.attrSet("id", anchor(text))
                contents += [(anchor(text), text)] if token.tag == "h2" else []
            for image in (child for child in token.children or [] if child.type == "image"):
                content = base64.b64encode(drawings[str(image.attrs["src"])].encode()).decode()
                image.attrSet("src", f"data:image/svg+xml;base64,{content}")
        template = files("gainlora.report").joinpath("report.html.j2").read_text(encoding="utf-8")
        page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(template)
        body = parser.renderer.render(tokens, parser.options, {})
        return page.render(title=self.title, contents=contents, body=body)


def markdown_table(head: Sequence[str], rows: Rows, numbers: int = 1, links: Sequence[str] = ()) -> str:
    """A table in Markdown; columns from `numbers` on hold numbers and are aligned right."""
    ruler = ["---:" if column >= numbers else "---" for column in range(len(head))]
    cells = [[escaped(text) for text in row] for row in rows]
    for row, link in zip(cells, links, strict=False):
        row[0] = f"[{row[0]}](#{anchor(link)})"
    return "\n".join("| " + " | ".join(row) + " |" for row in ([*map(escaped, head)], ruler, *cells))


def console_table(head: Sequence[str], rows: Rows, numbers: int = 1, **options: Any) -> Table:
    """The same table for rich to print; options of `rich.table.Table`."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, **options)
    for column, name in enumerate(head):
        table.add_column(Text(printable(name)), justify="right" if column >= numbers else "left")
    for row in rows:
        table.add_row(*(Text(printable(text)) for text in row))
    return table


def number(value: float | None, decimals: int, missing: str = "-") -> str:
    """A value in a table."""
    return missing if value is None or pd.isna(value) else f"{value:.{decimals}f}"


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def escaped(text: str) -> str:
    """Text as Markdown, without control characters."""
    return re.sub(r"([\\|<*\[\]`&])", r"\\\1", printable(" ".join(text.split())))
