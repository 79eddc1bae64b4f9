"""The learning version of a method: a hash of the pinned numbers of a short trajectory.

pins.json holds the losses, R and tensor norms that `tests/trajectory.py` learns with every method and every option
that decides numbers. Code that learns different numbers needs different pins and thus has another learning version;
comments, refactorings and new methods change no version.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

from gainlora import rules

PINS = Path(__file__).with_name("pins.json")


@cache
def learning_version(method: str) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the pins that concern a method, as this process found them."""
    return present_version(method)


def present_version(method: str) -> str:
    """The same, of the file as it is now."""
    others = {*rules.methods()} - {method}  # a case is called `<family> <method>` or `<family> <option>`
    pins = {case: pin for case, pin in json.loads(PINS.read_text()).items() if case.partition(" ")[2] not in others}
    return hashlib.sha256(json.dumps(pins, sort_keys=True).encode()).hexdigest()[:12]
