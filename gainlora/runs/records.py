"""Records of runs: the one reader of a run folder's JSON files; result files, small ones for version control.

    results/<order>/<method>-<model>-<seed>.json            with a label: <method>+<label>-<model>-<seed>.json

    order, method, model, seed, tasks, R, AP, FT, BWT       as in result.json, first
    label                                                   distinguishes a variant from the plain method; mostly ""
    run_id, config, dtype, device, code, versions, skipped  config.json: every option, and the environment
    data                                                    data.json: path, hashes and example counts per task
    steps                                                   per step: scores.json, coefficients (mean and standard
                                                            deviation), subspace (basis sizes), stored (parameters),
                                                            examples (task -> score of each test example, in order)

R and MEASURES are always computed here, from the scores of the steps (`gainlora.training.metrics`); if a file also
states them, they must agree. A finished step is read only if its files match its checksums. Reading needs no torch
and no model: of the learned state it reads only tensor shapes, from safetensors headers.
"""

import contextlib
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from gainlora.config import complete
from gainlora.errors import GainLoRAError, printable
from gainlora.io import mending, read_json, read_lines, verify_checksums
from gainlora.training.metrics import summary

Matrix = list[list[float | None]]
"""R, (T, T): R[t][i] is the score (0-100) on task i after learning task t; None if not measured."""
MEASURES = ("AP", "FT", "BWT", "LA", "AIA", "FWT")
DIGITS = 4
"""Decimals of a score in a result file."""
PHASES = ("prepare", "train", "update", "evaluate")
BASELINES = ("base", "majority")
"""Scores on a new task without learning: of the base model, and of its most frequent label (exact match)."""
UNLEARNED = (*BASELINES, "before")
"""And of the model that has learned the earlier tasks."""
ROUTING = ("top1", "auc")
"""Of `gainlora.training.metrics.routing`."""
COUNTS = ("truncated", "replayed", "trainable_parameters", "num_processes")
TOLERANCE = 1e-3
"""Largest difference between a stated AP, FT, BWT or R and the one computed from the scores."""
OWN = ("label", "data", "R", *MEASURES, "steps")
"""Keys of a result file that config.json does not have."""
FILES = ("coefficients", "subspace", "stored", "validation_curve", "examples")
"""Keys of a step in a result file that scores.json does not have; validation_curve only with a validation split."""
STATE = {"adapter": "adapter_model", "gate": "gate", "router": "router", "subspace": "subspace", "rule": "rule"}
"""Kind of learned state -> its safetensors file."""


class Key(NamedTuple):
    """Identifies a measured value of a step."""

    metric: str
    task: str | None = None
    """The task that was evaluated."""
    branch: int | None = None
    """Branch of the coefficient, from 1."""


@dataclass(frozen=True)
class Step:
    """One finished step: a task, or all of them for a method that learns them at once."""

    index: int
    """1-based."""
    task: str
    values: dict[Key, float]
    """All measured values: score and UNLEARNED (0-100), ROUTING, coefficient, seconds.<phase>, stored.<kind>, ..."""
    validation: list[dict[str, float]] = field(default_factory=list)
    """Validation scores during training, in order; empty without a validation split."""
    files: dict[str, Any] = field(default_factory=dict, compare=False)
    """The source JSON, for result files; empty for a step from MLflow."""
    folder: Path | None = field(default=None, compare=False)

    def total(self, metric: str) -> float | None:
        """The value of `metric`, or the sum of `metric`.*; None without one."""
        found = [v for key, v in self.values.items() if key.metric == metric or key.metric.startswith(metric + ".")]
        return sum(found) if found else None


@dataclass(frozen=True)
class Record:
    """One run, finished or not."""

    config: dict[str, Any]
    """config.json; `config["config"]` holds the options as recorded, `config["steps"]` the names of the steps."""
    data: dict[str, dict[str, Any]]
    """data.json: path, digests and example counts per task."""
    steps: list[Step]
    label: str = ""
    """Of a variant, as in `gainlora-inflora+no-update`."""
    folder: Path | None = field(default=None, compare=False)

    @property
    def run_id(self) -> str:
        """<order>-<method>-<model>-<seed>-<digest>."""
        return str(self.config["run_id"])

    @property
    def tasks(self) -> list[str]:
        """Names, in the order of learning."""
        return list(self.config["tasks"])

    @property
    def method(self) -> str:
        """The method's name, with the label."""
        return "+".join(filter(None, (self.config["method"], self.label)))

    @property
    def model(self) -> str:
        """The model's name without owner or folder."""
        return Path(self.config["model"]).name

    @property
    def complete(self) -> bool:
        """Whether every step is finished."""
        return len(self.steps) == len(self.config["steps"])

    def check_finished(self, state: int | None = None) -> None:
        """Refuse an unfinished run, or an earlier state of a finished one (GainLoRAError).

        Args:
            state: number of steps learned in the state that is used; None: the last one.
        """
        total = len(self.config["steps"])
        done = min(len(self.steps), total if state is None else state)
        if done < total:
            remedy = "run the same command again to finish it, or name a finished run"
            raise GainLoRAError(f"{self.folder or self.run_id}: {done} of {total} tasks are learned; {remedy}.")

    @property
    def at_once(self) -> bool:
        """Whether all tasks are learned in one step, so that there is no sequence."""
        return list(self.config["steps"]) != self.tasks  # `multitask` of one task has a step of another name

    @property
    def is_bound(self) -> bool:
        """Whether the method is a bound, not a continual learner: all tasks at once, or the task id at inference."""
        return self.at_once or self.config["method"] == "single"

    @property
    def options(self) -> dict[str, Any]:
        """Dotted option -> value; options that the run's version lacked have their defaults."""
        return flat_options(self.config["config"])

    def learned(self, step: Step) -> int:
        """Number of tasks learned after the step, 1 to T."""
        return len(self.tasks) - len(self.config["steps"]) + step.index

    def scores(self, step: Step) -> list[float]:
        """Scores on the tasks learned so far: a row of R."""
        return [step.values[Key("score", task)] for task in self.tasks[: self.learned(step)]]

    @property
    def R(self) -> Matrix:
        """Accuracy matrix; rows of unfinished tasks are None, and all but the last of tasks learned at once."""
        rows: Matrix = [[None] * len(self.tasks) for _ in self.tasks]
        for step in self.steps:
            row = self.scores(step)
            rows[self.learned(step) - 1][: len(row)] = row
        return rows

    def measures(self, step: Step) -> dict[str, float | None]:
        """MEASURES after the step, rounded to DIGITS (`gainlora.training.metrics`)."""
        steps, tasks = self.steps[: step.index], self.tasks[: self.learned(step)]
        known = {key: value for earlier in steps for key, value in earlier.values.items()}
        before, base = ([known.get(Key(kind, task)) for task in tasks] for kind in ("before", "base"))
        return rounded(summary([self.scores(earlier) for earlier in steps], before, base))

    def example_scores(self, step: Step) -> dict[str, list[float]]:
        """Task -> score (0-100) of each of its test examples after the step, in order; {} if they are not recorded."""
        if step.folder is None:
            return dict(step.files.get("examples", {}))
        files = {task: step.folder / "predictions" / f"{task}.jsonl" for task in self.tasks[: self.learned(step)]}
        if not all(path.is_file() for path in files.values()):
            return {}
        return {task: [line["score"] for line in read_lines(path)] for task, path in files.items()}

    @property
    def result(self) -> dict[str, Any]:
        """The content of result.json; for an unfinished run AP, FT and BWT after its last finished task."""
        named = {key: self.config[key] for key in ("order", "method", "model", "seed")}
        measures = self.measures(self.steps[-1]) if self.steps else dict.fromkeys(MEASURES)
        return rounded({**named, "tasks": self.tasks, "R": self.R, **measures})


# ---- run folders --------------------------------------------------------------------------------


def read_record(path: Path) -> Record:
    """The record of a run folder or a result file.

    Raises:
        GainLoRAError: neither, or damaged.
    """
    return read_run(path) if path.is_dir() or path.suffix != ".json" else read_result_file(path)


def read_run(folder: Path) -> Record:
    """Read a run folder, finished or not.

    Raises:
        GainLoRAError: not a run folder, or a file is damaged or differs from its checksum.
    """
    config = read_json(folder / "config.json")
    with complete_or_refused(folder, "damaged", "delete it and run again"):
        config.setdefault("steps", list(config["tasks"]))  # folders of version 0.1.0 do not name them
        folders = [folder / f"task_{index:02d}_{name}" for index, name in enumerate(config["steps"], start=1)]
        steps = [read_step(path) for path in itertools.takewhile(Path.is_dir, folders)]
        return checked(Record(config, read_json(folder / "data.json"), steps, folder=folder))


def read_step(folder: Path) -> Step:
    """Read one finished task's folder.

    Raises:
        GainLoRAError: a file is missing, damaged, or differs from its checksum.
    """
    kinds, curve = ("scores", "subspace", "coefficients"), "validation.jsonl"
    sums = verify_checksums(folder, *(f"{kind}.json" for kind in kinds), curve)
    files: dict[str, Any] = {k: read_json(folder / f"{k}.json") if f"{k}.json" in sums else {} for k in kinds}
    paths = {kind: folder / f"{name}.safetensors" for kind, name in STATE.items()}
    if curve in sums:
        files["validation_curve"] = read_lines(folder / curve)
    files["stored"] = {kind: _parameters(path) for kind, path in paths.items() if path.exists()}
    return replace(step_of(files), folder=folder)


def train_records(folder: Path) -> list[dict[str, float]]:
    """train.jsonl of a finished task's folder: an object per optimizer step (loss, learning_rate, seconds)."""
    verify_checksums(folder, "train.jsonl")
    return read_lines(folder / "train.jsonl")


def checked(record: Record) -> Record:
    """Check that every value that readers rely on exists, and return the record.

    Raises:
        LookupError, TypeError, AttributeError: a value is missing or of another type.
        GainLoRAError: a name could lead out of a folder, or a stated AP, FT or BWT contradicts the scores.
    """
    where = str(record.folder or record.run_id)
    for name in map(str, (record.run_id, record.config["order"], record.config["method"], *record.config["tasks"])):
        if not name or name.startswith(".") or "/" in name or printable(name) != name:  # files may come from others
            raise GainLoRAError(f"{where}: the name {name!r} would lead out of its folder; use no file of this origin.")
    _ = record.model, record.config["code"], record.config["dtype"], record.options, record.config["seed"]
    _ = [(record.data[task]["sha256"], 1 / record.data[task]["test"]) for task in record.tasks]
    for index, step in enumerate(record.steps, start=1):
        if step.index != index:
            raise LookupError(f"step {index}")
        _ = step.values[Key("seconds.train")], [score + 0.0 for score in record.scores(step)]
        check_measures(where, step.files.get("scores", {}), record.measures(step))
    return record


def check_measures(where: str, stated: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Refuse measures (GainLoRAError) that contradict the scores."""
    for key in (*MEASURES, "R"):
        if key in stated and key in computed and not _close(stated[key], computed[key]):
            raise GainLoRAError(f"{where}: its {key} is not that of its scores; it was changed, so make it again.")


def flat_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded options as dotted option -> value, with present names and defaults for missing ones."""
    return flatten(complete(config))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 1}} -> {"train.epochs": 1}; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def falls(before: Path, after: Path) -> dict[str, tuple[float, float]]:
    """The tasks whose score fell from one step to the next by more than chance: task -> both scores.

    The 95 % interval of the mean difference, paired by test example, lies below 0.

    Args:
        before, after: folders of finished steps.
    """
    found = {}
    for file in sorted((before / "predictions").glob("*.jsonl")):
        both = (file, after / "predictions" / file.name)
        old, new = ([line["score"] for line in read_lines(lines)] for lines in both)
        changes = [n - o for o, n in zip(old, new, strict=True)]
        if len(changes) > 1:
            error = statistics.stdev(changes) / math.sqrt(len(changes))
            if statistics.fmean(changes) + 1.96 * error < 0:
                found[file.stem] = (statistics.fmean(old), statistics.fmean(new))
    return found


# ---- result files -------------------------------------------------------------------------------


def read_result_file(path: Path) -> Record:
    """The record that `gainlora.runs.result_files.write_result_file` wrote.

    Raises:
        GainLoRAError: no such file, not a result file, or its R, AP, FT and BWT contradict its scores.
    """
    content = read_json(path)
    with complete_or_refused(path, "not a result file", "write it anew with `gainlora results RUN`"):
        steps = []
        for step in content["steps"]:
            files = {kind: step[kind] for kind in FILES if kind in step}
            steps.append(step_of({"scores": {k: v for k, v in step.items() if k not in FILES}, **files}))
        config = {key: value for key, value in content.items() if key not in OWN}
        config["steps"] = [step.task for step in steps]
        record = checked(Record(config, content["data"], steps, content["label"]))
        check_measures(str(path), content, record.result)
        return record


# ---- parts --------------------------------------------------------------------------------------


@contextlib.contextmanager
def complete_or_refused(what: object, problem: str, remedy: str) -> Iterator[None]:
    """Turn a missing or mistyped value into one error that names the file and the remedy."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise GainLoRAError(f"{what}: {problem} ({error} is missing or wrong); {remedy}.") from None


def step_of(files: dict[str, Any]) -> Step:
    """A step, from the content of its JSON files by their names, and `stored`."""
    scores, subspace = files["scores"], files["subspace"]
    values = {Key("score", task): score for task, score in scores["scores"].items()}
    values |= {Key(kind, task): score for kind in UNLEARNED for task, score in scores.get(kind, {}).items()}
    for task, row in files["coefficients"].items():
        values |= {Key("coefficient", task, branch): mean for branch, mean in enumerate(row["mean"], start=1)}
        values |= {Key("coefficient_sd", task, branch): sd for branch, sd in enumerate(row["std"], start=1)}
    values |= {Key(kind, task): v for task, row in scores.get("routing", {}).items() for kind, v in row.items()}
    values |= {Key(f"general.{kind}"): v for kind, v in scores.get("general", {}).items() if kind != "text"}
    values |= {Key(f"seconds.{phase}"): seconds for phase, seconds in scores["seconds"].items()}
    values |= {Key(name): scores[name] for name in COUNTS if name in scores}
    values |= {Key(f"stored.{kind}"): count for kind, count in files["stored"].items()}
    if "zero_rows" in scores:
        values[Key("zero_rows")] = sum(scores["zero_rows"].values())
    for part in ("gate", "layers"):
        widths = subspace.get(f"{part}_width", {})
        percent = {name: 100 * k / widths[name] for name, k in subspace[part].items() if name in widths}
        for name, sizes in (("subspace", subspace[part]), ("subspace_percent", percent)):
            if part == "layers" and sizes:  # too many to list
                sizes = {"mean": sum(sizes.values()) / len(sizes), "max": max(sizes.values())}
            values |= {Key(f"{name}.{part}.{layer}"): size for layer, size in sizes.items()}
    return Step(scores["index"], scores["task"], values, files.get("validation_curve", []), files)


def _parameters(path: Path) -> int:
    """Number of values in a safetensors file, from the shapes in its header."""
    try:
        with safe_open(path, "numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError:
        raise GainLoRAError(f"{path}: damaged; {mending(path.parent)}.") from None


def _close(stated: Any, computed: Any) -> bool:
    """Whether two nested lists of numbers and None are equal up to TOLERANCE."""
    if isinstance(stated, list) and isinstance(computed, list):
        return len(stated) == len(computed) and all(map(_close, stated, computed))
    if stated is None or computed is None:
        return stated is computed
    return abs(stated - computed) <= TOLERANCE


def rounded(value: Any) -> Any:
    """Plain values with floats rounded to DIGITS."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return {key: rounded(item) for key, item in value.items()} if isinstance(value, dict) else value
