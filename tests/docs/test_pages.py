"""The docs site: it builds, asks nothing of the network, and its error texts are those of the code."""

import ast
import re
import subprocess
import sys

import pytest

from gainlora.errors import SECTIONS, format_error
from tests.pages import ROOT, blocks

LEAST = 10
"""Characters that a text in the code must have of its own: one with fewer would match anything."""
VALUE = 25
"""Characters that an example value of several words may have; more is itself a text of the code."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return folder


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.glob("*.html"))
    assert len(pages) > 5
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?\ssrc=[\"']?([^\"' >]+)", html)
        loaded += re.findall(r"<link\b[^>]*?\shref=[\"']?([^\"' >]+)", html)
        assert loaded and not [address for address in loaded if re.match(r"(\w+:)?//", address)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(\w+:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_equations_are_drawn(site):
    html = (site / "method.html").read_text(encoding="utf-8")
    assert html.count("<math") > 20 and "arithmatex" not in html and "\\(" not in html


def texts_of_the_code():
    """What the code can say, as patterns: every line of a string, with anything where a value is put in."""
    lines = re.findall('echo "(.*?)"', (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(PYTHON)", "\0"))
    for file in [*(ROOT / "gainlora").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "\0" for p in parts]
            lines += "".join(texts).splitlines()
    own = {line for line in lines if len(line.replace("\0", "")) >= LEAST}
    return [re.compile(re.escape(line).replace("\0", "(.*)")) for line in own]


def said(message, known):
    """Whether the code can say this; "..." stands for any value."""
    fits = (pattern.fullmatch(message) for pattern in known)
    return any(
        match and all(len(v) <= VALUE or " " not in v or "..." in v or said(v, known) for v in match.groups())
        for match in fits
    )


def test_error_texts_are_those_of_the_code():
    known = texts_of_the_code()
    page = blocks(ROOT / "docs" / "troubleshooting.md")
    messages = [block.text.strip() for block in page if block.language == "text"]
    assert len(messages) > 25
    for message in messages:
        assert said(message, known), message
    assert not said("params.yaml: not found; run from the folder of the project, which holds it.", known)


def test_a_message_points_to_the_section_that_holds_it():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    pointed = set()
    for part in page.split("\n## ")[1:]:
        section = re.sub(r"[^a-z]+", "-", part.splitlines()[0].lower()).strip("-")
        for message in re.findall("```text\n(.*?)\n```", part, re.DOTALL):
            _, _, more = format_error(message).partition("\nsee ")
            assert more in ("", f"docs/troubleshooting.md#{section}"), message
            pointed.add(section if more else "")
    assert set(SECTIONS) <= pointed
