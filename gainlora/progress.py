"""Progress bars on a terminal, silence elsewhere (a worker's log keeps one line per finished task)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """`items` with a bar that vanishes when done; of several processes the first one's."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    hidden = os.environ.get("RANK", "0") != "0"  # accelerate launch numbers its processes
    return rich_track(items, description, console=console, transient=True, disable=not console.is_terminal or hidden)
