"""A run folder, read: what MLflow, the report and the tables are made of.

The folder is the truth (`gainlora/learning/stream.py` writes it); nothing here changes it. JSON only,
so a report needs neither torch nor the model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gainlora.errors import GainLoRAError

Matrix = list[list[float | None]]
"""R, (T, T): R[t][i] is the score (0-100) on task i after learning task t; None where not (yet) measured."""


@dataclass(frozen=True)
class Step:
    """One finished task of a run."""

    folder: Path
    index: int
    """1-based position in the order."""
    task: str
    scores: dict[str, Any]
    """scores.json: scores of the tasks seen so far, AP, FT, BWT, seconds per phase, counts."""
    coefficients: dict[str, dict[str, list[float]]]
    """Seen task -> mean and standard deviation of every branch's coefficient; empty without gates."""
    subspace: dict[str, dict[str, int]]
    """Basis sizes k and widths d of gate and adapted layers."""


@dataclass(frozen=True)
class Run:
    """One run: its description and its finished tasks, in order."""

    folder: Path
    config: dict[str, Any]
    """config.json; `config["config"]` holds every option."""
    data: dict[str, dict[str, Any]]
    """data.json: path, digests and example counts per task."""
    steps: list[Step]

    @property
    def tasks(self) -> list[str]:
        """Names in the order they are learned."""
        return list(self.config["tasks"])

    @property
    def complete(self) -> bool:
        """Whether every task of the order is learned."""
        return len(self.steps) == len(self.tasks)

    @property
    def R(self) -> Matrix:
        """Accuracy matrix, rows of unfinished tasks all None."""
        rows = [[step.scores["scores"].get(task) for task in self.tasks] for step in self.steps]
        return rows + [[None] * len(self.tasks) for _ in range(len(self.tasks) - len(self.steps))]

    @property
    def result(self) -> dict[str, Any]:
        """result.json's content; of an unfinished run AP, FT and BWT are those after its last finished task."""
        last = self.steps[-1].scores if self.steps else {}
        named = {key: self.config[key] for key in ("order", "method", "model", "seed")}
        measured = {key: last.get(key) for key in ("AP", "FT", "BWT")}
        return {**named, "tasks": self.tasks, "R": self.R, **measured}


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        GainLoRAError: no run folder, or one of its files is damaged.
    """
    config = read_json(folder / "config.json")
    try:
        folders = [folder / f"task_{index:02d}_{name}" for index, name in enumerate(config["tasks"], start=1)]
        steps = [read_step(path) for path in itertools.takewhile(Path.is_dir, folders)]
        run = Run(folder, config, read_json(folder / "data.json"), steps)
        _ = run.result, config["code"], [run.data[step.task]["sha256"] for step in steps]
    except (KeyError, TypeError) as error:
        raise GainLoRAError(f"{folder}: damaged ({error} is missing in its files); delete it and run again.") from None
    return run


def read_step(folder: Path) -> Step:
    """Read one finished task's folder.

    Raises:
        GainLoRAError: a file is missing or damaged.
    """
    scores = read_json(folder / "scores.json")
    gated = (folder / "coefficients.json").exists()
    coefficients = read_json(folder / "coefficients.json") if gated else {}
    subspace = read_json(folder / "subspace.json")
    return Step(folder, scores["index"], scores["task"], scores, coefficients, subspace)


def example_coefficients(step: Step) -> dict[str, list[list[float]]]:
    """Seen task -> coefficients of every test example, (examples, t); empty without gates."""
    values = {}
    for task in step.coefficients:
        rows = [row["coefficients"] for row in read_lines(step.folder / "predictions" / f"{task}.jsonl")]
        values[task] = [row for row in rows if row is not None]
    return {task: rows for task, rows in values.items() if rows}


def options(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 1}} -> {"train.epochs": 1}; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= options(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        GainLoRAError: not there, or not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except OSError as error:
        reason = f"{path}: {error.strerror}; name a folder that `gainlora run` wrote under runs/."
        raise GainLoRAError(reason) from None
    except ValueError as error:
        raise GainLoRAError(f"{path}: damaged ({error}); delete its task folder and run the order again.") from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
