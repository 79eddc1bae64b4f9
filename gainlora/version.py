"""The learning version: a hash of the pinned numbers of a short trajectory.

pins.json holds the losses, R and tensor norms that `tests/trajectory.py` learns with every method and every option
that decides numbers. Code that learns different numbers needs different pins and thus has another learning version;
comments and refactorings change neither.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

PINS = Path(__file__).with_name("pins.json")


@cache
def learning_version() -> str:
    """The first 12 hexadecimal digits of the SHA-256 of pins.json, as this process found it."""
    return present_version()


def present_version() -> str:
    """The same, of the file as it is now."""
    return hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]
