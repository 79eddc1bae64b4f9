"""The progress bar of a whole run."""

import math
import sys
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gainlora.progress import shown, terminal
from gainlora.runs.run import Run
from gainlora.training.callbacks import Callback


def planned_steps(run: Run) -> list[int]:
    """Optimizer steps of each step of a run (early stopping may end one before)."""
    trained = [sum(run.recorded[task]["train"] for task in run.learned_at(t + 1)) for t in range(len(run.steps))]
    size, epochs = run.config.train.batch_size, run.config.epochs
    return [math.ceil(count / size) * epochs(name, count) for name, count in zip(run.steps, trained, strict=True)]


class RunBar(Callback):
    """A bar for the whole run: task k of T, loss, time left by the optimizer steps of all tasks. A context manager."""

    def __enter__(self) -> Self:
        columns = (BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
        look: Any = {"transient": True, "disable": not shown(), "redirect_stdout": sys.stdout.isatty()}
        self.bar = Progress(TextColumn("{task.description}"), *columns, console=terminal(), **look)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def on_run_begin(self, run: Run) -> None:
        self.planned = planned_steps(run)
        done = sum(self.planned[: run.finished])
        self.task = self.bar.add_task("", total=sum(self.planned), completed=done, loss="")
        self.bar.start()

    def on_task_begin(self, t: int, name: str) -> None:
        self.before = sum(self.planned[: t - 1])
        self.bar.update(self.task, description=f"task {t} of {len(self.planned)}: {name}", loss="")

    def on_step(self, record: dict[str, Any]) -> None:
        self.bar.update(self.task, completed=self.before + record["step"], loss=f"loss {record['loss']:.2f}")

    def on_task_end(self, t: int, name: str, row: dict[str, Any]) -> None:
        self.bar.update(self.task, completed=sum(self.planned[:t]))
