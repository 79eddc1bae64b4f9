"""Signals that must not be lost, and the end of a process with its parent.

Python raises what a signal handler raises wherever the program is. Inside a finalizer or the callback of a weak
reference it prints that exception and goes on: whoever asked the program to stop would wait for ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent ends."""
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


stopped: list[int] = []
"""Signals that asked this process to stop: a lazy import, or Prefect's engine, can make another error of a
KeyboardInterrupt, or lose it."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise a KeyboardInterrupt with their number: by default the latter two end Python
    without cleaning up. What is ignored (nohup) stays ignored."""

    def stop(number: int, _frame: object) -> None:
        stopped.append(number)
        raise KeyboardInterrupt(number)

    stopped.clear()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        with resent():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(parent: int) -> None:
    """Be killed when the parent ends, however it ends: it would leave this process behind, which writes on."""
    if LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it ended before that
        os.kill(os.getpid(), signal.SIGKILL)
