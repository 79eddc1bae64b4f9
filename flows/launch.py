"""One task of a run on several processes: `accelerate launch` on gainlora/learning/worker.py.

The launcher stays in this process's group, so what ends the flow ends it; its processes end when it does.
"""

from __future__ import annotations

import subprocess
import sys

from gainlora.errors import GainLoRAError, Passing

HERE = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
"""All of it on this machine. Without GPUs, too: the option's name is older than what it does."""


def launch(folder: str, t: int, num_processes: int, config: str | None) -> None:
    """Learn task t (1-based) of the run in `folder`; the processes' output is shown.

    Raises:
        GainLoRAError: a process failed: what the first one to fail said.
    """
    how = ["--config_file", config] if config else [*HERE, "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", str(num_processes)]
    child = subprocess.Popen(
        [*command, "-m", "gainlora.learning.worker", folder, str(t)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert child.stdout is not None
    said = None
    try:
        for line in child.stdout:
            if said is None and line.startswith("error: "):
                said = line.removeprefix("error: ").strip()
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
    if said or code:
        lost = f"one of {num_processes} processes ended without a message (exit code {code}; killed, out of memory?)"
        if said:
            raise GainLoRAError(said)
        raise Passing(f"{lost}; the same command goes on from the last checkpoint.")
