"""Several processes that learn one run together.

    accelerate launch [OPTIONS] -m gainlora.launch RUN [STEP]

Every process runs this module's `main`: it learns the run's unfinished steps, or STEP (from 1) alone. `launch` starts
them on this machine through accelerate's launcher, in this process; by hand the command runs on several machines
(docs/cluster.md).
"""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from gainlora import distributed
from gainlora.distributed import PeerProcessDied
from gainlora.errors import GainLoRAError, RetryableError, RunLocked, reason
from gainlora.interrupts import end_with

HERE = "--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0".split()  # noqa: SIM905
"""All of it on this machine. Without GPUs, too: the option's name is older than what it does."""


def launch(folder: Path, step: int, num_processes: int, config: str | None = None) -> None:
    """Learn one step of a run on several processes; each writes to this process's output.

    Args:
        folder: of the run, which no process holds.
        step: from 1.
        config: a configuration file of accelerate, e.g. configs/fsdp.yaml; None: all processes on this machine.

    Raises:
        GainLoRAError: a process failed: the error of the first one to fail. RetryableError where the process was
            killed, or where the same command resumes.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    how = ["--config_file", config] if config else HERE
    worker = ["-m", "gainlora.launch", str(folder), str(step)]
    try:
        launch_command(launch_command_parser().parse_args([*how, "--num_processes", str(num_processes), *worker]))
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        # a process that lost its peer may report that before the launcher sees the peer's own end
        own = [failure for failure in failures if not _message(failure).startswith(PeerProcessDied.__name__)]
        raise _as_error((own or failures)[0], num_processes) from None
    except SignalException as error:  # SIGINT or SIGTERM, which the processes got, too
        raise KeyboardInterrupt(int(error.sigval)) from None
    except Exception as error:  # accelerate's, about its configuration
        raise GainLoRAError(
            f"launch.config: {config}: {num_processes} processes cannot start: {reason(error)}."
        ) from None


def _as_error(failure: Any, num_processes: int) -> GainLoRAError:
    if failure.exitcode < 0 and failure.message.startswith("Signal"):
        return RetryableError(
            f"one of {num_processes} processes was killed ({failure.signal_name()}; out of memory?); the same command "
            "continues from the last checkpoint."
        )
    kind, _, message = _message(failure).partition(": ")
    kinds = {kind.__name__: kind for kind in (GainLoRAError, RetryableError, RunLocked)}
    if kind in kinds:
        return kinds[kind](message)
    return GainLoRAError(f"process {failure.local_rank + 1} of {num_processes} failed: {kind}: {message}")


def _message(failure: Any) -> str:
    """What the process wrote to its error file (`record`)."""
    found: Any = failure.error_file_data["message"] if failure.error_file_data else failure.message
    return str(found["message"] if isinstance(found, dict) else found)


def main(arguments: list[str]) -> None:
    """Learn as one of the processes."""
    from gainlora.model.base import pick_device
    from gainlora.runs.run import Run
    from gainlora.training.callbacks import Console

    parser = argparse.ArgumentParser("accelerate launch ... -m gainlora.launch")
    parser.add_argument("run", type=Path, help="a folder under runs/")
    parser.add_argument("step", type=int, nargs="?", help="the only task to learn, from 1; none: all, and the result")
    options = parser.parse_args(arguments)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # accelerate's launcher is the parent; what is written is whole at any time
        end_with(os.getppid())
    distributed.join(pick_device())
    with Run.open(options.run) as run:
        run.config.check_processes(distributed.count())
        if options.step is None:
            run.learn([Console()])
            return
        possible = min(run.finished + 1, len(run.steps))
        if not 1 <= options.step <= possible:
            raise GainLoRAError(
                f"task {options.step}: this run has learned {run.finished} of {len(run.steps)}; give 1 to {possible}."
            )
        run.seal(options.step)


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(main)(sys.argv[1:])  # writes the error for the launcher
    except BaseException as error:
        if isinstance(error, PeerProcessDied):  # what gloo or NCCL say; the peer's own error tells why
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        elif not isinstance(error, GainLoRAError):  # which the launcher reports in one sentence
            sys.stderr.write(traceback.format_exc())  # in one piece, as others write there, too
        sys.stderr.flush()
        os._exit(1)  # a process that waits for the others would never end
    distributed.leave()
