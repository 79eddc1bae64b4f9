"""Runs, read from their folders: what MLflow, the report and the tables are made of.

A run folder is the truth (`gainlora/learning/stream.py` writes it); nothing here changes it. No torch, no model:
JSON, and of the learned state only the sizes in the headers of its safetensors files.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gainlora import reading
from gainlora.config import Config
from gainlora.errors import GainLoRAError

Matrix = list[list[float | None]]
"""R, (T, T): R[t][i] is the score (0-100) on task i after learning task t; None where not (yet) measured."""
GATED = "gainlora-"
"""What a method's name starts with if gates weigh its branches; the rest is the name of its branch rule."""


@dataclass(frozen=True)
class Step:
    """One finished step of a run: a task, or all of them for a method that learns them at once."""

    index: int
    """1-based position among the run's steps."""
    task: str
    scores: dict[str, Any]
    """scores.json: scores of the tasks seen so far, AP, FT, BWT, seconds per phase, counts."""
    coefficients: dict[str, dict[str, list[float]]]
    """Seen task -> mean and standard deviation of every branch's coefficient; empty without gates."""
    subspace: dict[str, dict[str, int]]
    """Basis sizes k and widths d of gate and adapted layers."""
    stored: dict[str, int]
    """Parameters kept after the step: adapter, gate, subspace, rule; empty where they were not recorded."""
    folder: Path | None = field(default=None, compare=False)
    """Where it was read; None: of a result file, which has no examples."""


@dataclass(frozen=True)
class Run:
    """One run: its description and its finished steps, in order."""

    config: dict[str, Any]
    """config.json; `config["config"]` holds every option, `config["steps"]` the names of the steps."""
    data: dict[str, dict[str, Any]]
    """data.json: path, digests and example counts per task."""
    steps: list[Step]
    label: str = ""
    """What tells it from the plain method, as in `gainlora-inflora+no-init`; mostly empty."""
    folder: Path | None = field(default=None, compare=False)
    """Where it was read; None: from a result file."""

    @property
    def run_id(self) -> str:
        """<order>-<method>-<model>-<seed>-<digest>."""
        return str(self.config["run_id"])

    @property
    def tasks(self) -> list[str]:
        """Names in the order they are learned."""
        return list(self.config["tasks"])

    @property
    def method(self) -> str:
        """The method's name, with the run's label."""
        return "+".join(filter(None, (self.config["method"], self.label)))

    @property
    def model(self) -> str:
        """The model's name, without its owner or folder."""
        return Path(self.config["model"]).name

    @property
    def complete(self) -> bool:
        """Whether every step is done."""
        return len(self.steps) == len(self.config["steps"])

    @property
    def at_once(self) -> bool:
        """Whether all tasks are learned in one step, so that there is no sequence."""
        return len(self.config["steps"]) < len(self.tasks)

    def learned(self, step: Step) -> int:
        """Number of tasks learned when the step is done, 1 to T."""
        return len(self.tasks) - len(self.config["steps"]) + step.index

    @property
    def R(self) -> Matrix:
        """Accuracy matrix; rows of unfinished tasks are all None, so are all but the last of tasks learned at once."""
        rows: Matrix = [[None] * len(self.tasks) for _ in self.tasks]
        for step in self.steps:
            rows[self.learned(step) - 1] = [step.scores["scores"].get(task) for task in self.tasks]
        return rows

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
        config.setdefault("steps", list(config["tasks"]))  # folders of version 0.1.0 do not name them
        folders = [folder / f"task_{index:02d}_{name}" for index, name in enumerate(config["steps"], start=1)]
        steps = [read_step(path) for path in itertools.takewhile(Path.is_dir, folders)]
        return checked(Run(config, read_json(folder / "data.json"), steps, folder=folder))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise GainLoRAError(f"{folder}: damaged ({error} is missing in its files); delete it and run again.") from None


def read_step(folder: Path) -> Step:
    """Read one finished task's folder.

    Raises:
        GainLoRAError: a file is missing or damaged.
    """
    scores = read_json(folder / "scores.json")
    gated = (folder / "coefficients.json").exists()
    coefficients = read_json(folder / "coefficients.json") if gated else {}
    subspace = read_json(folder / "subspace.json")
    return Step(scores["index"], scores["task"], scores, coefficients, subspace, _stored(folder), folder)


def checked(run: Run) -> Run:
    """The run, if what every reader needs is there. Options that its version did not know yet have their defaults.

    Raises:
        LookupError, TypeError, AttributeError: it is not.
        GainLoRAError: one of its names, which become parts of paths, would lead out of a folder.
    """
    for name in (run.run_id, *map(str, [run.config["order"], run.config["method"], *run.config["tasks"]])):
        check_part(name, f"{run.folder or run.run_id}")
    run = replace(run, config={**run.config, "config": _with_defaults(run.config["config"])})
    _ = run.run_id, run.model, run.result, run.config["code"], run.config["dtype"], run.config["config"]["gate"]
    _ = [(run.data[task]["sha256"], run.data[task]["test"]) for task in run.tasks]
    _ = [score + 0.0 for row in run.R for score in row if score is not None]  # numbers
    _ = [(step.scores["seconds"]["train"], step.subspace["gate"]) for step in run.steps]
    return run


def check_part(name: str, where: str) -> None:
    """Refuse a name that is no plain part of a path: runs of others are read, too.

    Raises:
        GainLoRAError: it is not; `where` says whose name it is.
    """
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise GainLoRAError(f"{where}: the name {name!r} would lead out of its folder; use no file of this origin.")


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    sections = [s for s in dataclasses.fields(Config) if s.default_factory is not dataclasses.MISSING]
    defaults = {s.name: dataclasses.asdict(s.default_factory()) for s in sections}  # type: ignore[operator]
    return {**values, **{name: {**section, **values[name]} for name, section in defaults.items()}}


def example_coefficients(step: Step) -> dict[str, list[list[float]]]:
    """Seen task -> coefficients of every test example, (examples, t); empty without gates or examples."""
    if step.folder is None:
        return {}
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
        GainLoRAError: not there, or no JSON object.
    """
    damaged = "delete its task folder and run the order again"
    content = reading.read_json(path, "name a folder that `gainlora run` wrote under runs/", damaged)
    if not isinstance(content, dict):
        raise GainLoRAError(f"{path}: holds no JSON object; {damaged}.")
    return content


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _stored(folder: Path) -> dict[str, int]:
    """Parameters per kind of state in a task's folder; a kind without a file is left out."""
    names = {"adapter": "adapter_model", "gate": "gate", "subspace": "subspace", "rule": "rule"}
    paths = {kind: folder / f"{name}.safetensors" for kind, name in names.items()}
    return {kind: _parameters(path) for kind, path in paths.items() if path.exists()}


def _parameters(path: Path) -> int:
    """Numbers in a safetensors file, by its header: 8 bytes of length, then JSON with every tensor's shape.

    Raises:
        GainLoRAError: damaged.
    """
    with path.open("rb") as file:
        try:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
            raise GainLoRAError(f"{path}: damaged; delete its task folder and run the order again.") from None
