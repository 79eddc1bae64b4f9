"""Processes that die by SIGKILL at a named point, with no hook in the code that they run.

    killed_at("gainlora.runs.run:prepare_task", 2, run, root, method)

runs `run(root, method)` in a process of its own until that function is called for the second time. Children are forked
from a server that has imported what takes seconds, and has done nothing else: each starts in a moment.
"""

import functools
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

fresh = multiprocessing.get_context("forkserver")
fresh.set_forkserver_preload(
    ["tests.unit.test_checkpoint", "transformers.models.llama.modeling_llama", "accelerate", "datasets", "mlflow"]
)


def in_a_process(work: Callable[..., Any], *arguments: Any) -> int | None:
    """Do the work in a process of its own; its exit code, negative for a signal."""
    process = fresh.Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def killed_at(point: str, call: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Do the work until it dies at that point, which it must reach."""
    code = in_a_process(_dying, point, call, work, *arguments)
    assert code == -signal.SIGKILL, f"{point} was called less than {call} times (exit code {code})"


def _dying(point: str, call: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Work, and die when `module:name` is called for that time; a trailing "!": when that call is over."""
    path, after = point.removesuffix("!"), point.endswith("!")
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), 0

    @functools.wraps(original)
    def deadly(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == call
        result = None if now and not after else original(*given, **named)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, deadly)
    work(*arguments)
