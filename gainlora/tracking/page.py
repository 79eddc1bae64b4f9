"""A report as one HTML page that needs no network: style and figures are in it. All text is escaped here."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

from gainlora.tracking.document import Block, Heading, Note, Picture, Table
from gainlora.tracking.drawing import INK

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
tbody th { font-weight: 500; white-space: normal; min-width: 9rem }
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
  h2[id] { break-before: page } .scroll { overflow: visible }
}
"""


def html_page(title: str, blocks: Sequence[Block], drawings: Mapping[str, str]) -> str:
    """The whole document.

    Args:
        blocks: its parts.
        drawings: name of every picture -> its SVG.
    """
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        + "\n".join(_part(block, drawings) for block in blocks)
        + "\n</body>\n</html>\n"
    )


def _part(block: Block, drawings: Mapping[str, str]) -> str:
    match block:
        case Heading():
            name = f' id="{html.escape(block.anchor)}"' if block.anchor else ""
            return f"<h{block.level}{name}>{html.escape(block.text)}</h{block.level}>"
        case Note():
            return f'<p class="note">{html.escape(block.text)}</p>'
        case Table():
            return _table(block)
        case Picture():
            drawn = _inline(drawings[block.name], block.caption)
            return f"<figure>\n{drawn}\n<figcaption>{html.escape(block.caption)}</figcaption>\n</figure>"


def _table(table: Table) -> str:
    def cells(texts: Sequence[str], tag: str, link: str | None = None) -> str:
        made = []
        for column, text in enumerate(texts):
            kind = "th" if column == 0 else tag
            inner = html.escape(text)
            if column == 0 and link:
                inner = f'<a href="#{html.escape(link)}">{inner}</a>'
            numeric = ' class="n"' if column >= table.numbers else ""
            made.append(f"<{kind}{numeric}>{inner}</{kind}>")
        return "<tr>" + "".join(made) + "</tr>"

    anchors: list[str | None] = [*table.links] or [None] * len(table.rows)
    body = "\n".join(cells(row, "td", link) for row, link in zip(table.rows, anchors, strict=True))
    head = cells(table.head, "th")
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _inline(svg: str, label: str) -> str:
    """The SVG as a part of the page: text and axes in the page's colour."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # an HTML parser knows them
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
