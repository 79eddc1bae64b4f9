"""One task of a run on several processes: `accelerate launch` on gainlora/learning/worker.py.

The launcher stays in this process's group, so what ends the flow ends it; its processes end when it does.
"""

from __future__ import annotations

import re
import subprocess
import sys

from gainlora.errors import GainLoRAError, Passing

HERE = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
"""All of it on this machine. Without GPUs, too: the option's name is older than what it does."""

KINDS: dict[str, type[GainLoRAError]] = {"error: ": GainLoRAError, "stopped: ": Passing}
"""How a worker's last words begin."""


def launch(folder: str, t: int, num_processes: int, config: str | None) -> None:
    """Learn task t (1-based) of the run in `folder`; the processes' output is shown.

    Raises:
        GainLoRAError: a process failed: what the first one to fail said. Passing where it said so, or was killed.
    """
    how = ["--config_file", config] if config else [*HERE, "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", str(num_processes)]
    child = subprocess.Popen(
        [*command, "-m", "gainlora.learning.worker", folder, str(t)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert child.stdout is not None
    said: GainLoRAError | None = None
    killed = False
    try:
        for line in child.stdout:
            for begins, kind in KINDS.items():
                if said is None and line.startswith(begins):
                    said = kind(line.removeprefix(begins).strip())
            killed = killed or re.match(r"\s*exitcode\s*: -\d", line) is not None  # the launcher's report
            if said is None:  # afterwards others and the launcher report that a process has ended
                print(line, end="", flush=True)
        code = child.wait()
    finally:
        child.terminate()
        try:
            child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if said is not None:
        raise said
    if killed:
        raise Passing(
            f"one of {num_processes} processes was killed (out of memory?); the same command goes on from the last "
            "checkpoint."
        )
    if code:
        raise GainLoRAError(
            f"{num_processes} processes: ended without a message (exit code {code}); what they printed says more."
        )
