"""Callbacks that observe a run; they never change what it learns.

With several processes each calls its own callbacks. All must have the same ones, since reading `run.finished` is a
collective operation.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gainlora import distributed
from gainlora.progress import shown, terminal

if TYPE_CHECKING:
    from gainlora.runs.run import Run


class Callback:
    """Base class with no-op methods. t counts steps from 1; a step is a task (`multitask`: all of them)."""

    def on_run_begin(self, run: "Run") -> None:
        """A run is about to learn its remaining steps; `run.notices` holds messages for the user."""

    def on_task_begin(self, t: int, name: str) -> None:
        """Step t begins, or was finished before."""

    def on_note(self, text: str) -> None:
        """Something about the task that its user should know."""

    def on_step(self, record: dict[str, Any]) -> None:
        """An optimizer step is done: a record of train.jsonl."""

    def on_validation(self, record: dict[str, Any]) -> None:
        """The validation examples were evaluated: a record of validation.jsonl."""

    def on_task_end(self, t: int, name: str, row: dict[str, Any]) -> None:
        """Step t is finished; `row` is its scores.json, and "falls": earlier tasks that fell by more than
        their 95 % interval, each with its scores before and after."""

    def on_run_end(self, result: dict[str, Any]) -> None:
        """All steps are finished; the content of result.json."""


class Callbacks(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        for hook in (name for name in vars(Callback) if name.startswith("on_")):
            setattr(self, hook, lambda *arguments, hook=hook: [getattr(c, hook)(*arguments) for c in callbacks])


class Console(Callback):
    """One line for each finished task: its scores, AP, and the time it took."""

    def __init__(self, decimals: int = 1) -> None:
        self.terminal, self.decimals = Terminal(highlight=False, soft_wrap=True), decimals
        self.steps, self.finished = 0, 0  # not known without a run

    def on_note(self, text: str) -> None:
        self._print(f"note: {text}")

    def on_run_begin(self, run: "Run") -> None:
        self.steps, self.finished = len(run.steps), run.finished
        resumed = f", {run.finished} finished before" if run.finished else ""
        self._print(f"runs/{run.folder.name}: {len(run.steps)} tasks{resumed}")
        for notice in run.notices:
            self.on_note(notice)

    def on_task_end(self, t: int, name: str, row: dict[str, Any]) -> None:
        self._print(self.line(t, self.steps, name, row, self.decimals, t <= self.finished))
        for task, base in row.get("base", {}).items():
            score, least = row["scores"][task], max(base, row["majority"].get(task, 0.0))
            if score <= least and t > self.finished:
                which = "the base model" if least == base else "its most frequent label"
                self.on_note(
                    f"{task}: scores {score:.{self.decimals}f}, no better than {which} ({least:.{self.decimals}f}); "
                    "give it more examples, or raise train.epochs, train.min_steps or train.learning_rate"
                )

    @staticmethod
    def line(t: int, steps: int, name: str, row: dict[str, Any], decimals: int = 1, resumed: bool = False) -> str:
        """The line of step t; `resumed`: the step was finished before."""
        scores = "  ".join(f"{task} {score:.{decimals}f}" for task, score in row["scores"].items())
        seconds = sum(row["seconds"].values())
        took = "finished before" if resumed else f"{int(seconds // 60)} min {seconds % 60:02.0f} s"
        notes = []
        if kept := row.get("validation"):
            which = "best" if "best" in kept else "last"
            notes.append(f"kept the {which} state, step {kept['step']}, validation {kept['score']:.{decimals}f}")
        if cut := row.get("cut"):
            parts = (f"{split} {', '.join(f'{n} {what}' for what, n in found.items())}" for split, found in cut.items())
            notes.append(f"cut to length: {'; '.join(parts)}")
        for fallen, (before, after) in row.get("falls", {}).items():
            notes.append(f"{fallen} fell from {before:.{decimals}f} to {after:.{decimals}f}, more than by chance")
        if empty := row.get("zero_rows"):
            notes.append(
                f"{len(empty)} layers have fewer free input directions than lora.rank: {sum(empty.values())} rows of A "
                "are zero"
            )
        if loss := row.get("loss"):
            notes.insert(0, f"loss {loss[0]:.2f} -> {loss[1]:.2f}")
        of = f"/{steps}" if steps else ""
        return " | ".join([f"task {t}{of} {name}", scores, f"AP {row['AP']:.{decimals}f}", took, *notes])

    def on_run_end(self, result: dict[str, Any]) -> None:
        measured = [f"{key} {result[key]:.{self.decimals}f}" for key in ("AP", "FT", "BWT") if result[key] is not None]
        self._print("  ".join(measured))

    def _print(self, text: str) -> None:
        if distributed.index() == 0:
            self.terminal.print(text, markup=False)


class RunBar(Callback):
    """A bar for the whole run: task k of T, loss, time left by the optimizer steps of all tasks. A context manager."""

    def __enter__(self) -> Self:
        columns = (BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
        look: Any = {"transient": True, "disable": not shown(), "redirect_stdout": sys.stdout.isatty()}
        self.bar = Progress(TextColumn("{task.description}"), *columns, console=terminal(), **look)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def on_run_begin(self, run: "Run") -> None:
        self.planned = run.planned_steps
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
