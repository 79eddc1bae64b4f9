"""Servers of this machine are reached directly, whatever HTTP_PROXY and ALL_PROXY say."""

import os

LOCAL = ("127.0.0.1", "localhost", "::1")


def direct() -> dict[str, str]:
    """NO_PROXY, in both spellings, with the addresses of this machine: to be laid over an environment."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = ",".join(dict.fromkeys([*filter(None, known.split(",")), *LOCAL]))
    return {"NO_PROXY": hosts, "no_proxy": hosts}
