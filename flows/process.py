"""A flow as a process of its own, started and ended by flows/supervise.py."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from flows import stops
from gainlora.errors import told

HEAVY = dict.fromkeys(
    ("continual", "learn"), ("gainlora.learning.stream", "accelerate", "datasets", "mlflow", "transformers")
)
"""What a flow takes seconds to import: while it does, a signal ends the process, for an exception would leave half."""


def main(arguments: list[str]) -> int:
    """`python -m flows.process FLOW PARAMETERS [FD]`: run flows/FLOW.py on JSON parameters; the exit code."""
    name, parameters, *pipe = arguments
    if pipe:
        threading.Thread(target=_end_with_supervisor, args=[int(pipe[0])], daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops.SIGNALS)  # the supervisor blocked them: none came before this
    for module in (f"flows.{name}", *HEAVY.get(name, ())):
        importlib.import_module(module)
    signal.signal(signal.SIGINT, stops.interrupt)
    try:
        return _run_flow(name, json.loads(parameters))
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is to end what Prefect started


def _run_flow(name: str, parameters: dict[str, Any]) -> int:
    from flows.show import show

    module = sys.modules[f"flows.{name}"]
    _print_own_lines()
    state = getattr(module, name)(**parameters, return_state=True)
    if state.is_completed():
        if name in ("continual", "learn") and "DVC_STAGE" not in os.environ:
            show(state.result())
        return 0
    stops.check()
    error = state.result(raise_on_failure=False)
    if isinstance(error, BaseException) and error.__traceback__ and state.data is not None:
        traceback.print_exception(error)
    else:
        print(told(str(state.message)), file=sys.stderr)
    return 1


def _print_own_lines() -> None:
    """What this folder's modules log, plainly, on stdout; the supervisor keeps Prefect's console handler quiet."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(lambda entry: Path(entry.pathname).parent == Path(__file__).parent)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(handler)


def _end_with_supervisor(pipe: int) -> None:
    """End this process's group when the supervisor is gone: its end of the pipe closes even on SIGKILL."""
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)  # task folders appear whole, so nothing is half-written; a request may be ignored


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
