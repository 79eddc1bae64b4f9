"""Signals that ask a run to stop: Ctrl-C, SIGTERM, a terminal that closes.

In the flow's process each becomes one KeyboardInterrupt. An exception can be lost or turned into another one wherever
it happens to come (in a callback, in Prefect's engine), so that a stop was asked for is noted, too.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
asked = threading.Event()


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """A signal handler."""
    asked.set()
    raise KeyboardInterrupt


def check() -> None:
    """Stop here where a stop was asked for."""
    if asked.is_set():
        raise KeyboardInterrupt
