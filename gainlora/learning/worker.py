"""One of several processes that learn a run together.

    accelerate launch [OPTIONS] -m gainlora.learning.worker RUN_FOLDER [TASK]

Learns the run's unfinished tasks, or TASK (from 1) alone, as `gainlora run` does on one process, which starts this
where launch.num_processes is more than 1 (flows/launch.py). By hand it runs on several machines: docs/cluster.md.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path

from gainlora import distributed
from gainlora.errors import GainLoRAError, Passing
from gainlora.learning.stream import Stream
from gainlora.model.base import pick_device

PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent ends."""


def main(arguments: list[str]) -> int:
    """Learn as one of the processes; the exit code. Of several that fail, the first prints `error: ` and the reason;
    `stopped: ` where the same command, given again, goes on."""
    parser = argparse.ArgumentParser("accelerate launch ... -m gainlora.learning.worker")
    parser.add_argument("run", type=Path, help="a folder under runs/")
    parser.add_argument("task", type=int, nargs="?", help="the only task to learn, from 1; none: all, and the result")
    options = parser.parse_args(arguments)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # accelerate launch is the parent
        _end_with_launcher()
    try:
        distributed.join(pick_device())
        stream = Stream.open(options.run)
        stream.config.check_processes(distributed.count())
        if options.task is not None:
            _learn(stream, options.task)
            return 0
        for t in range(1, len(stream.steps) + 1):
            _learn(stream, t)
            if distributed.index() == 0:
                print(f"task {t}/{len(stream.steps)} {stream.steps[t - 1]}", flush=True)
        stream.result()
    except Passing as error:
        return _failed(f"stopped: {error}")
    except GainLoRAError as error:
        return _failed(f"error: {error}")
    except distributed.Lost:
        return _failed(f"process {distributed.index()}: another process has ended")
    except Exception as error:
        return _failed(f"{traceback.format_exc()}error: {type(error).__name__}: {error}")
    return 0


def _learn(stream: Stream, t: int) -> None:
    possible = min(stream.finished + 1, len(stream.steps))
    if not 1 <= t <= possible:
        raise GainLoRAError(
            f"task {t}: this run has learned {stream.finished} of {len(stream.steps)}; give 1 to {possible}."
        )
    stream.finish(t)


def _failed(message: str) -> int:
    sys.stderr.write(f"{message}\n")  # in one piece, as others write there, too
    sys.stderr.flush()
    os._exit(1)  # a process that waits for the others would never end


def _end_with_launcher() -> None:
    """Be killed when the launcher ends, however it ends: it would leave this process behind, which writes on. What is
    written is whole at any moment."""
    launcher = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != launcher:  # it ended before that
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    distributed.leave()
    sys.exit(code)
