"""`gainlora run`, `gainlora sweep` -> one flow run in a process group of its own.

A flow called as a function starts a temporary Prefect server, which outlives a hard kill and then holds
the terminal's pipes open (`dvc repro | tail` would hang). So the flow runs in a child with its own session;
signals are passed on, and when the child has ended its whole group is ended.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from flows import stops
from flows.server import answers, environment, find_server
from gainlora.errors import GainLoRAError


def run_flow(parameters: Mapping[str, Any], flow: str = "continual") -> int:
    """Run a flow with its parameters; the exit code.

    Uses the Prefect server of PREFECT_API_URL or `make serve` when there is one, else a temporary one.

    Returns:
        0 when the run completed, 1 when it failed, 130 or 143 when it was interrupted.
    """
    url = find_server()
    if url and not answers(url):
        raise GainLoRAError(f"PREFECT_API_URL: no Prefect server answers at {url}; unset it, or start one: make serve.")
    # The child holds the pipe's reading end: it ends itself when this process is killed without warning.
    alive, held = os.pipe()
    received: list[int] = []
    values = environment(url)
    # Prefect's own lines stay in its UI; the flow prints its own (flows/process.py).
    values["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    if url is None:  # the temporary server answers its own run only
        secret = f"run:{secrets.token_urlsafe()}"
        values |= {"PREFECT_SERVER_API_AUTH_STRING": secret, "PREFECT_API_AUTH_STRING": secret}

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 2:  # whoever asks a third time means now
            os.killpg(child.pid, signal.SIGKILL)
        else:
            os.kill(child.pid, signal.SIGINT)  # whichever it was: the child has one way to stop

    signal.pthread_sigmask(signal.SIG_BLOCK, stops.SIGNALS)  # none is lost, nor seen by the child before it is ready
    child = subprocess.Popen(
        [sys.executable, "-m", "flows.process", flow, json.dumps(dict(parameters)), str(alive)],
        env=values,
        pass_fds=[alive],
        start_new_session=True,
    )
    os.close(alive)
    before = {number: signal.signal(number, forward) for number in stops.SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops.SIGNALS)
    try:
        # Not reaped before its group is ended: until then the group's id cannot be given to anyone else.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        os.close(held)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        print("Interrupted. What is learned is kept; the same command goes on from there.", file=sys.stderr)
        return 130 if received[0] == signal.SIGINT else 143
    return code if code >= 0 else 128 - code
