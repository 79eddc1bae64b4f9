"""Progress bars on a terminal and in notebooks, silence elsewhere (a worker's log keeps one line per finished task)."""

import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TypeVar

from rich import progress
from rich.console import Console

T = TypeVar("T")


@cache
def terminal() -> Console:
    """The console of all bars, so that those of parts stand below that of the run."""
    return Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")  # accelerate launch numbers its processes


def shown() -> bool:
    """Whether bars are shown."""
    return terminal().is_terminal or terminal().is_jupyter


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """`items` with a transient bar."""
    return progress.track(items, description, console=terminal(), transient=True, disable=not shown())
