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

from flows.show import show
from gainlora.errors import told


def main(arguments: list[str]) -> int:
    """`python -m flows.process FLOW PARAMETERS [FD]`: run flows/FLOW.py on JSON parameters; the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
    name, parameters, *pipe = arguments
    if pipe:
        threading.Thread(target=_end_with_supervisor, args=[int(pipe[0])], daemon=True).start()
    module = importlib.import_module(f"flows.{name}")
    _print_lines_of(str(module.__file__))
    try:
        state = getattr(module, name)(**json.loads(parameters), return_state=True)
    except KeyboardInterrupt:
        print("Interrupted. What is learned is kept; the same command goes on from there.", file=sys.stderr)
        return 130
    if state.is_completed():
        if name == "continual" and "DVC_STAGE" not in os.environ:
            show(state.result())
        return 0
    error = state.result(raise_on_failure=False)
    if isinstance(error, BaseException) and error.__traceback__ and state.data is not None:
        traceback.print_exception(error)
    else:
        print(told(str(state.message)), file=sys.stderr)
    return 1


def _print_lines_of(file: str) -> None:
    """What the flow in `file` logs, plainly, on stdout; Prefect's console handler is kept quiet by the supervisor."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(lambda entry: entry.pathname == file)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(handler)


def _end_with_supervisor(pipe: int) -> None:
    """End this process's group when the supervisor is gone: its end of the pipe closes even on SIGKILL."""
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)  # task folders appear whole, so nothing is half-written; a request may be ignored


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
