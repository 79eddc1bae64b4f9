"""One of several processes that learn a run together.

    accelerate launch [OPTIONS] -m gainlora.learning.worker RUN_FOLDER [TASK]

Learns the run's unfinished tasks, or TASK (from 1) alone, as `gainlora run` does on one process, which starts this
where launch.num_processes is more than 1 (flows/launch.py). By hand it runs on several machines: docs/cluster.md.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from gainlora import distributed
from gainlora.errors import GainLoRAError
from gainlora.learning.stream import Stream
from gainlora.model.base import pick_device


def main(arguments: list[str]) -> int:
    """Learn as one of the processes; the exit code. Of several that fail, the first prints `error: ` and the reason."""
    threading.Thread(target=_end_with_launcher, args=[os.getppid()], daemon=True).start()
    try:
        distributed.join(pick_device())
        stream = Stream.open(Path(arguments[0]))
        stream.config.check_processes(distributed.count())
        tasks = [int(arguments[1])] if len(arguments) > 1 else range(1, len(stream.steps) + 1)
        for t in tasks:
            stream.finish(t)
            if len(arguments) == 1 and distributed.index() == 0:
                print(f"task {t}/{len(stream.steps)} {stream.steps[t - 1]}", flush=True)
        if len(arguments) == 1:
            stream.result()
    except GainLoRAError as error:
        return _failed(f"error: {error}")
    except distributed.Lost:
        return _failed(f"process {distributed.index()}: another process has ended")
    except Exception as error:
        return _failed(f"{traceback.format_exc()}error: {type(error).__name__}: {error}")
    return 0


def _failed(message: str) -> int:
    sys.stderr.write(f"{message}\n")  # in one piece, as others write there, too
    sys.stderr.flush()
    os._exit(1)  # a process that waits for the others would never end


def _end_with_launcher(launcher: int) -> None:
    """A launcher that is killed leaves its processes behind; what they have written is whole at any moment."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
