"""The documentation's pages and the blocks of code on them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: ```language title="file"."""

    page: str
    line: int
    language: str
    title: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    found = [Block(name, text.count("\n", 0, m.start()) + 1, m[1], m[2], m[3]) for m in FENCE.finditer(text)]
    assert 2 * len(found) == len(re.findall("^ *```", text, re.MULTILINE)), f"{name}: a fence that is not read"
    return found


def commands(block: Block) -> list[str]:
    """A sh block's commands without their comments; one goes over as many lines as its quotes and backslashes say."""
    found, begun = [], ""
    for line in block.text.replace("\\\n", "").splitlines():
        begun += line
        if _closed(text := _without_comment(begun)):
            found.append(re.sub(" {2,}", " ", text.strip()))
            begun = ""
        else:
            begun += "\n"
    assert not begun, f"{block.page}:{block.line}: {begun!r} does not end"
    return [command for command in found if command]


def _without_comment(text: str) -> str:
    starts = (match.start() for match in re.finditer(r"(^|\s)#", text))
    return next((text[:start] for start in starts if _closed(text[:start])), text)


def _closed(text: str) -> bool:
    """Whether no quote is left open."""
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True
