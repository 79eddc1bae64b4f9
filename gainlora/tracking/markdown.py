"""A report as Markdown, with its figures as files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from gainlora.tracking.document import Block, Heading, Note, Picture, Table


def markdown_page(title: str, blocks: Sequence[Block]) -> str:
    """The whole document."""
    return "\n\n".join([f"# {_escaped(title)}", *(_part(block) for block in blocks)]) + "\n"


def _part(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escaped(block.text)}"
        case Note():
            return _escaped(block.text)
        case Table():
            return _table(block)
        case Picture():
            return f"![{_escaped(block.name)}]({block.name}.svg)\n\n{_escaped(block.caption)}"


def _table(table: Table) -> str:
    ruler = ["---:" if column >= table.numbers else "---" for column in range(len(table.head))]
    rows = [[_escaped(text) for text in row] for row in (table.head, *table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ruler, *rows[1:]))


def _escaped(text: str) -> str:
    for character in ("\\", "|", "<", "*", "[", "]", "`"):
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
