"""The examples that a run works with: training and test examples of tasks to be learned come from the tasks' files,
test examples of finished tasks from the run's own folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from gainlora.config import Config
from gainlora.data.batches import tokenize
from gainlora.data.own_tasks import kept_test, read_kept_test
from gainlora.data.tasks import load_order
from gainlora.errors import GainLoRAError
from gainlora.learning.files import write_json
from gainlora.learning.run_folder import OWN

TEST = "test"
"""Folder in a finished task's, with what the task is tested on."""


class RunData:
    """Tasks of one run, checked against what its data.json says of them.

    Args:
        recorded: data.json.
        finished: task -> folder of the step that learned it. Where that keeps no test examples, as in runs of earlier
            versions, the task's files are read.

    Raises:
        GainLoRAError: files are missing, damaged, or changed since the run began.
    """

    def __init__(
        self, folder: Path, root: Path, config: Config, recorded: dict[str, Any], finished: Mapping[str, Path]
    ) -> None:
        self.config, self.cache = config, root / ".cache" / "tokenized"
        self._tasks = {}
        order = config.order
        for name, task_folder in finished.items():
            if (file := task_folder / TEST / f"{name}.json").is_file():
                self._tasks[name] = read_kept_test(file, order.template, order.metric, recorded[name]["sha256"])
        others = replace(order, tasks=tuple(name for name in recorded if name not in self._tasks))
        complete = replace(config.data, skip_incomplete=False)  # what it left out is not among `recorded`
        for task in load_order(others, complete, root, folder / OWN)[0] if others.tasks else []:
            if task.sha256 != recorded[task.name]["sha256"]:
                raise GainLoRAError(
                    f"{recorded[task.name]['path']}: changed since this run began; start the order again for a new run."
                )
            self._tasks[task.name] = task

    def rows(self, name: str, split: Literal["train", "test"], model: Any, tokenizer: Any) -> Any:
        """One task's tokenized examples."""
        task = self._tasks[name]
        return tokenize(task, split, tokenizer, self.config.data, model.encoder_decoder, self.cache)

    def training(self, names: Sequence[str], model: Any, tokenizer: Any) -> Any:
        """The tokenized examples that a step which learns these tasks trains on."""
        from datasets import concatenate_datasets

        parts = [self.rows(name, "train", model, tokenizer) for name in names]
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]

    def keep(self, name: str, task_folder: Path) -> None:
        """Put what a task is tested on into the folder of the step that learns it."""
        write_json(task_folder / TEST / f"{name}.json", kept_test(self._tasks[name]))
