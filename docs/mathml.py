"""mkdocs hook: equations ($...$ and $$...$$, as GitHub reads them) become MathML, which browsers draw by themselves."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
"""What pymdownx.arithmatex leaves in the page."""


def on_page_content(html_text: str, **_: Any) -> str:
    return EQUATION.sub(_mathml, html_text)


def _mathml(match: re.Match[str]) -> str:
    tag, bracket, latex = match.groups()
    made = convert(html.unescape(latex).strip(), display="block" if bracket == "[" else "inline")
    return f"<{tag}>{made}</{tag}>"
