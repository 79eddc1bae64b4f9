"""The data of a run: entries of data.json, and the tasks read again, unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gainlora.config import RunConfig
from gainlora.data.checks import inspect
from gainlora.data.own_tasks import judged, read_kept_test
from gainlora.data.tasks import Task, limited, load_order
from gainlora.errors import GainLoRAError
from gainlora.runs.reuse import OWN

if TYPE_CHECKING:
    from gainlora.runs.run import Run

TEST = "test"
"""Subfolder of a step for its tasks' test examples."""


def data_entry(task: Task, config: RunConfig, path: str, dvc: str | None, tokenizer: Any) -> dict[str, Any]:
    """A task's entry in data.json. The task is read without limits: counts are those within the limits; notes and
    comparison (`gainlora.data.checks`) consider all examples."""
    used = limited(task, config.data)
    counts: dict[str, Any] = {"train": len(used.train), "test": len(used.test)}
    if used.validation:
        counts |= {"validation": len(used.validation), "validation_from": used.validation_from}
    entry = {"path": path, "dvc": dvc, "sha256": task.sha256, "definition": task.instruction, **counts}
    findings = inspect(task, tokenizer, benchmark_protocol=config.data.protocol is not None)
    return {**entry, "keep_punctuation": findings.keep_punctuation, "notes": list(findings.notes)}


def data_notes(data: dict[str, Any]) -> list[str]:
    """The notes of data.json, each with its task's name."""
    return [f"{name}: {note}" for name, entry in data.items() for note in entry.get("notes", [])]


def kept_tasks(run: Run, finished: int) -> list[Task]:
    """The tasks of the first finished steps, as their folders keep them."""
    order = run.config.order
    return [
        read_kept_test(file, order.template, order.metric, run.recorded[name]["sha256"])
        for t in range(1, finished + 1)
        for name in run.learned_at(t)
        for file in [run.task_folder(t) / TEST / f"{name}.json"]
    ]


def read_data(run: Run) -> dict[str, Task]:
    """A run's tasks: tasks to be learned from their files, test examples of finished tasks from the run's folders.

    Raises:
        GainLoRAError: files are missing, damaged, or changed since the run began.
    """
    order, found = run.config.order, {task.name: task for task in kept_tasks(run, run.finished)}
    rest = order.model_copy(update={"tasks": tuple(name for name in run.tasks if name not in found)})
    data = run.config.data.model_copy(update={"skip_incomplete": False})  # `rest` holds no skipped tasks
    for task in load_order(rest, data, run.root, run.folder / OWN)[0] if rest.tasks else []:
        if task.sha256 != run.recorded[task.name]["sha256"]:
            raise GainLoRAError(
                f"{run.recorded[task.name]['path']}: changed since this run began; start the order again for a new run."
            )
        found[task.name] = task
    return {name: judged(task, run.recorded[name]) for name, task in found.items()}
