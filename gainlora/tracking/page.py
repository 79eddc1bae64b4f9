"""The parts of the report's HTML: style, tables, inline figures. All text is escaped here."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gainlora.tracking.figures import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fdfdfc; --soft: #5c5c5c; --line: #d9d9d6; --band: #f3f3f0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --paper: #17181a; --soft: #a3a3a0; --line: #3a3b3d; --band: #212225 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.2rem }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem }
a { color: inherit }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .6rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
thead th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom }
tbody th { font-weight: 500 }
tbody tr:nth-child(even) { background: var(--band) }
.n { text-align: right }
.note, figcaption { color: var(--soft); font-size: .88rem; max-width: 46rem }
figure { margin: 1.4rem 0 }
figure svg { max-width: 100%; height: auto; display: block }
code { font-size: .85em; overflow-wrap: anywhere }
@media print {
  :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --band: #fff }
  body { max-width: none; padding: 0; font-size: 10.5pt }
  h2, h3 { break-after: avoid } figure, tr { break-inside: avoid }
  .run { break-before: page } .scroll { overflow: visible }
}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The document around its parts (HTML already)."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2, anchor: str | None = None) -> str:
    """A heading, with an id where the page links to it."""
    name = f' id="{html.escape(anchor)}"' if anchor else ""
    return f"<h{level}{name}>{html.escape(text)}</h{level}>"


def note(text: str) -> str:
    """A paragraph of explanation."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int, links: Sequence[str] = ()) -> str:
    """A table; columns from index `numbers` on are aligned right, row k's first cell links to anchor links[k]."""

    def cells(texts: Sequence[str], tag: str, link: str | None = None) -> str:
        made = []
        for column, text in enumerate(texts):
            kind = "th" if column == 0 else tag
            inner = html.escape(text)
            if column == 0 and link:
                inner = f'<a href="#{html.escape(link)}">{inner}</a>'
            made.append(f'<{kind} class="n">{inner}</{kind}>' if column >= numbers else f"<{kind}>{inner}</{kind}>")
        return "<tr>" + "".join(made) + "</tr>"

    anchors: list[str | None] = [*links] or [None] * len(rows)
    body = "\n".join(cells(row, "td", link) for row, link in zip(rows, anchors, strict=True))
    return f'<div class="scroll"><table>\n<thead>{cells(head, "th")}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def figure(drawn: Figure, caption: str, png: Path, dpi: int) -> str:
    """Write the figure as PNG and return it as inline SVG with its caption."""
    png.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(png, dpi=dpi, facecolor="white")
    text = html.escape(caption)
    return f"<figure>\n{_svg(drawn, caption, png.stem)}\n<figcaption>{text}</figcaption>\n</figure>"


def _svg(drawn: Figure, label: str, salt: str) -> str:
    """Inline SVG: no ids shared between figures, no links, text and axes in the page's colour."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        drawn.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # an HTML parser knows them
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
