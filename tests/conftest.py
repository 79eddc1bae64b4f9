"""Nothing leaves the machine, and nothing is reported anywhere, while tests run."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads only get in each other's way
if os.environ.get("TEST_ON_GPU") != "1":  # the same device on every machine
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
import pytest


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="K/N", help="of the chosen tests the K-th of N parts, in whole groups")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """With `-n 2 --dist loadgroup` a file stays in one process, and files with one mark `xdist_group` stay together.

    Module fixtures, and servers that several files use, are so started once a run. A shard takes whole groups.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    result = yield  # -k and -m choose
    if shard := config.getoption("--shard"):
        k, n = map(int, shard.split("/"))
        if not 1 <= k <= n:
            raise pytest.UsageError(f"--shard {shard}: give K/N with K from 1 to N")
        groups = sorted({group_of(item) for item in items})
        others = [item for item in items if groups.index(group_of(item)) % n != k - 1]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    return result


def group_of(item):
    return item.get_closest_marker("xdist_group").args[0]


def pytest_configure():
    # a shell's background jobs ignore Ctrl-C, and what tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def newcomer(tmp_path_factory):
    """A copy of the project as tests/newcomer.py serves it: its folder and ports."""
    from tests.newcomer import served

    with served(tmp_path_factory.mktemp("newcomer") / "gainlora") as project:
        yield project
