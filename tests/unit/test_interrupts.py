"""A signal that arrives while Python collects garbage."""

import signal
import sys
import time
from collections.abc import Callable

import pytest

from gainlora.interrupts import resent


class Finalized:
    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end

    def __del__(self) -> None:
        self.end()


def test_a_signal_in_a_finalizer_is_sent_again() -> None:
    with resent(), pytest.raises(KeyboardInterrupt):
        Finalized(lambda: signal.raise_signal(signal.SIGINT))  # collected at once; the exception is dropped
        time.sleep(20)


def test_another_exception_in_a_finalizer_is_reported_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: seen.append(dropped.exc_type))
    with resent():
        Finalized(lambda: 1 / 0)
    assert seen == [ZeroDivisionError]
