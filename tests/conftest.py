"""Nothing leaves the machine, and nothing is reported anywhere, while tests run."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads only get in each other's way
import pytest


def pytest_configure():
    # a shell's background jobs ignore Ctrl-C, and what tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def newcomer(tmp_path_factory):
    """A copy of the project as tests/newcomer.py serves it: its folder and ports."""
    from tests.newcomer import served

    with served(tmp_path_factory.mktemp("newcomer") / "gainlora") as project:
        yield project
