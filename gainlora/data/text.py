"""Plain text in pieces: cleaning, sentences, passages of a wanted length."""

import re
import unicodedata
from collections.abc import Iterator, Sequence

_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Sr|Jr|Gov|Sen|Rep|Gen|Col|Lt|vs|[A-Z])\.$")


def clean(text: str) -> str:
    """Normalize to one line: single spaces, no control characters, plain quotes."""
    text = unicodedata.normalize("NFC", text)
    for old, new in (("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u2026", "...")):
        text = text.replace(old, new)
    text = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    """Sentences of one line of text; a full stop after a title or an initial ends none."""
    found: list[str] = []
    for piece in re.split(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])|(?<=[.!?][\"')])\s+(?=[\"'(]?[A-Z])", text):
        if found and _ABBREVIATION.search(found[-1]):
            found[-1] += " " + piece
        else:
            found.append(piece)
    return [f for f in found if f]


def _joined(parts: Sequence[str], least: int) -> Iterator[str]:
    """Sentences joined until `least` words are reached; the last text may be shorter."""
    taken = ""
    for part in parts:
        taken = f"{taken} {part}".lstrip()
        if len(taken.split()) >= least:
            yield taken
            taken = ""
    yield taken


def opening(parts: Sequence[str], least: int, most: int) -> str:
    """Sentences from the start until `least` words are reached; "" if that takes more than `most`."""
    text = next(_joined(parts, least))
    return text if least // 2 <= len(text.split()) <= most else ""


def passages(text: str, least: int, most: int) -> list[str]:
    """Pieces of complete sentences with `least` to `most` words each; other parts are omitted."""
    return [piece for piece in _joined(sentences(text), least) if least <= len(piece.split()) <= most]
