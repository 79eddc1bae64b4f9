"""A signal that arrives while Python collects garbage."""

import signal
import time

import pytest

from gainlora.interrupts import resent


class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_in_a_finalizer_is_sent_again():
    with resent(), pytest.raises(KeyboardInterrupt):
        Finalized()  # collected at once; the exception is dropped
        time.sleep(20)
