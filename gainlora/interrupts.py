"""Signals that must not be lost.

Python raises what a signal handler raises wherever the program is. Inside a finalizer or the callback of a weak
reference it prints that exception and goes on: whoever asked the program to stop would wait for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN = 0.1
"""Seconds after which a lost signal is sent again."""


@contextmanager
def resent() -> Iterator[None]:
    """Send a signal again whose exception (KeyboardInterrupt, Prefect's TerminationSignal) Python dropped."""

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        error = dropped.exc_value
        if isinstance(error, Exception) or error is None:
            before(dropped)
            return
        number = getattr(error, "signal", None) or next(iter(error.args), signal.SIGINT)
        threading.Timer(AGAIN, os.kill, (os.getpid(), number)).start()

    before, sys.unraisablehook = sys.unraisablehook, hook
    try:
        yield
    finally:
        sys.unraisablehook = before
