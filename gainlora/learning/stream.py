"""A run folder: everything a run has learned, and the steps that add a task to it.

    runs/<order>-<method>-<model>-<seed>-<digest>/
      config.json, data.json       what is learned, from which data (hashes), by which code and versions
      task_01_<name>/              adapter, gate and bases after that task, predictions, scores, checksums; test
                                   examples, so that later steps need no data of earlier tasks
      .task_02_<name>.partial/     the task being learned
      result.json                  R, AP, FT, BWT when all tasks are learned

A task folder appears by one atomic rename: it is there whole, or not at all. Every step is idempotent, so a
stopped run continues by starting it again; finished tasks are never retrained. The digest covers the
configuration, the data and the code that learns, so a folder never mixes two of them.
Several processes (gainlora/learning/worker.py) take the steps together; the first one holds the folder and writes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gainlora import distributed
from gainlora.config import Config, from_dict
from gainlora.data.sources import resolve_model
from gainlora.errors import GainLoRAError, within
from gainlora.learning.checkpoint import PROGRESS, Checkpoints, latest, restore_branch
from gainlora.learning.evaluate import Prediction, coefficient_statistics, evaluate_task
from gainlora.learning.files import flush, read_json, seal, verify_checksums, write_json, write_lines
from gainlora.learning.metrics import summary
from gainlora.learning.run_data import RunData
from gainlora.learning.run_folder import NEXT, check_base, hold, make_run
from gainlora.learning.steps import Examples, basis_sizes, new_adapter, prepare_task, update_memory
from gainlora.learning.trainer import train_task
from gainlora.model.base import check_positions, load_base, place
from gainlora.model.gainlora_model import GainLoRAModel


class Stream:
    """One run folder, opened for work. Make it with `create` or `open`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder.parent.parent
        read_json(folder / "config.json")
        self._lock = None if distributed.index() else hold(folder)
        try:
            self.read()
        except BaseException:
            self.close()
            raise

    def read(self) -> None:
        """Read the run's description, now or as it is about to be (`gainlora.learning.grow`)."""
        file = self.folder / (NEXT if (self.folder / NEXT).exists() else "config.json")
        described = read_json(file, "run_id", "config", "tasks", "steps", "skipped", "dtype")
        self.run_id: str = described["run_id"]
        self.config: Config = from_dict(described["config"])
        self.tasks: list[str] = described["tasks"]
        self.steps: list[str] = described["steps"]  # one a task; multitask: one for all
        self.skipped: list[str] = described["skipped"]
        self.base: str | None = described.get("base")
        self.dtype: torch.dtype = getattr(torch, described["dtype"])
        self.horizon = self.config.subspace.horizon or len(self.tasks)
        recorded = read_json(self.folder / "data.json", *self.tasks)
        self.recorded = {name: recorded[name] for name in self.tasks}
        self._loaded: tuple[GainLoRAModel, Any] | None = None
        self._holds = -1  # tasks that the model in memory has learned; -1: in the middle of one
        self._seconds: dict[str, float] = {}
        self.__dict__.pop("data", None)

    @staticmethod
    def create(config: Config, root: Path = Path("."), alone: bool = True) -> Stream:
        """Check the configuration against data and model, then make the run folder or find it again.
        Not `alone`: other processes are to learn, so the model is not loaded here.

        Raises:
            GainLoRAError: data or model are unusable, another process works here, or a finished task is damaged.
        """
        folder = make_run(config, root)
        for task_folder in sorted(folder.glob("task_*")):  # before the run is held: finished tasks never change
            verify_checksums(task_folder)
        stream = Stream.open(folder)
        if alone and not any(folder.glob("*task_*")):
            try:
                stream._model_after(0)
            except GainLoRAError:  # nothing is learned yet: an unusable model leaves no run behind
                shutil.rmtree(folder)
                Stream.close_all()
                raise
        return stream

    @staticmethod
    def open(folder: Path | str) -> Stream:
        """The run in `folder`; within one process always the same object, with the model in its memory.

        Raises:
            GainLoRAError: no run folder, or another process works in it.
        """
        folder = Path(folder).resolve()
        if folder not in _opened:
            _opened[folder] = Stream(folder)
        return _opened[folder]

    @staticmethod
    def close_all() -> None:
        """Let go of every run that this process opened, and of its model."""
        while _opened:
            _opened.popitem()[1].close()

    def close(self) -> None:
        """Let others hold the run. Not left to the garbage collector: an error's traceback may keep this object."""
        self._loaded = None
        if self._lock is not None:
            self._lock.close()

    @property
    def finished(self) -> int:
        """Number of finished steps."""
        T = len(self.steps)
        return distributed.first(lambda: next((t for t in range(T) if not self.task_folder(t + 1).is_dir()), T))

    def task_folder(self, t: int) -> Path:
        """Folder of finished step t (1-based)."""
        return self.folder / f"task_{t:02d}_{self.steps[t - 1]}"

    def learned_at(self, t: int) -> list[str]:
        """Tasks that step t learns."""
        return [self.tasks[t - 1]] if len(self.steps) == len(self.tasks) else self.tasks

    def seen(self, t: int) -> list[str]:
        """Tasks that are learned after step t, in order."""
        return [name for k in range(1, t + 1) for name in self.learned_at(k)]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let another process of this machine hold the run meanwhile."""
        assert self._lock is not None
        self._lock.close()
        try:
            yield
        finally:
            self._lock = hold(self.folder)

    # -- the parts of step t (1-based), in this order; each returns at once where its work is done -------------

    def prepare(self, t: int) -> None:
        """Start branch and gate t from the new task's inputs; nothing to do where training can go on."""
        if self._learned(t) or latest(self._partial(t)):
            return
        started = time.perf_counter()
        model, _ = self._model_after(t - 1)
        self._holds = -1
        with within(f"task {self.steps[t - 1]}"):
            prepare_task(model, self._examples(t), self.config, t)
        self._seconds = {"prepare": time.perf_counter() - started}

    def train(self, t: int) -> None:
        """Train branch and gate t."""
        if self._learned(t):
            return
        # taken before anything changes: what fails half-way is prepared anew, or goes on from its checkpoint
        seconds, self._seconds = self._seconds, {}
        partial, saved = self._partial(t), latest(self._partial(t))
        if saved:
            model, tokenizer = self._model_after(t - 1)
            self._holds = -1
            restore_branch(saved, model, self.config.rule)
            progress = read_json(saved / PROGRESS)
            seconds, before = progress["seconds"], sum(record["seconds"] for record in progress["records"])
        else:
            if "prepare" not in seconds or "train" in seconds:
                self.prepare(t)
                seconds, self._seconds = self._seconds, {}
            # what an update that was stopped left there
            distributed.first(lambda: shutil.rmtree(partial, ignore_errors=True))
            before = 0.0
        started = time.perf_counter() - before
        model, tokenizer = self._model()
        self._trainable = model.trainable_parameters()
        model.task = t - 1
        checkpoints = Checkpoints(partial, self.config.train.checkpoint_every, seconds)
        records = train_task(
            model, self._training(t), self.config, t, self.steps[t - 1], tokenizer.pad_token_id, checkpoints
        )
        distributed.first(lambda: write_lines(partial / "train.jsonl", records))
        self._seconds = {**seconds, "train": time.perf_counter() - started}

    def update(self, t: int) -> None:
        """Freeze branch and gate t, expand the memories, and write the learned state."""
        if self._learned(t):
            return
        if "train" not in self._seconds:
            self.train(t)
        seconds, self._seconds = self._seconds, {}
        started = time.perf_counter()
        model, _ = self._model()
        with within(f"task {self.steps[t - 1]}"):
            update_memory(model, self._examples(t), self.config, t, self.steps[t - 1], self.horizon)
        self._holds = t
        partial = self._partial(t)

        def save() -> None:
            model.save_pretrained(partial)
            write_json(partial / "subspace.json", basis_sizes(model))
            flush(partial)
            learned = {
                "seconds": {**seconds, "update": time.perf_counter() - started},
                "truncated": sum(self._training(t)["truncated"]),
                "trainable_parameters": self._trainable,
                "num_processes": distributed.count(),
            }
            write_json(partial / "learned.json", learned)  # last: it says that the state above is whole

        distributed.first(save)

    def evaluate(self, t: int) -> dict[str, Any]:
        """Answer the test examples of tasks 1..t; row t of R. Returns the content of scores.json."""
        if t <= self.finished:
            return read_json(self.task_folder(t) / "scores.json")
        self.update(t)
        started = time.perf_counter()
        predictions = {name: self._predict(name, t) for name in self.seen(t)}
        return distributed.first(lambda: self._score(t, predictions, started))

    def _score(self, t: int, predictions: dict[str, list[Prediction]], started: float) -> dict[str, Any]:
        """Write the files of an evaluation; the content of scores.json."""
        partial = self._partial(t)
        for name, answers in predictions.items():
            write_lines(partial / "predictions" / f"{name}.jsonl", [vars(p) for p in answers])
        scores = {name: sum(p.score for p in answers) / len(answers) for name, answers in predictions.items()}
        for name in self.learned_at(t):
            self.data.keep(name, partial)
        R = [*self.accuracy_matrix(t - 1), list(scores.values())]
        learned = read_json(partial / "learned.json")
        learned["seconds"]["evaluate"] = time.perf_counter() - started
        row = {
            "task": self.steps[t - 1],
            "index": t,
            "scores": scores,
            **summary(R),
            **learned,
            "seconds": {phase: round(s, 2) for phase, s in learned["seconds"].items()},
        }
        if self.config.gated:
            coefficients = {name: coefficient_statistics(answers) for name, answers in predictions.items()}
            write_json(partial / "coefficients.json", coefficients)
        write_json(partial / "scores.json", row)
        return row

    def finish(self, t: int) -> Path:
        """Seal task t's folder: checksums, then one rename. Returns the folder."""
        if t > self.finished:
            if not distributed.first((self._partial(t) / "scores.json").exists):
                self.evaluate(t)
            distributed.first(lambda: seal(self._partial(t), self.task_folder(t)))
        return self.task_folder(t)

    def result(self) -> dict[str, Any]:
        """Write and return result.json: order, method, model, seed, tasks, R, AP, FT, BWT.

        Raises:
            GainLoRAError: tasks are still to be learned.
        """
        T, steps = len(self.tasks), len(self.steps)
        if self.finished < steps:
            raise GainLoRAError(f"{self.folder}: {self.finished} of {steps} tasks are learned; run the order again.")
        R = distributed.first(lambda: self.accuracy_matrix(steps))
        c = self.config
        run = {"order": c.order.name, "method": c.method, "model": c.model.name, "seed": c.seed, "tasks": self.tasks}
        result = {
            **run,
            # what was learned at once has a last row only
            "R": [[None] * T] * (T - steps) + [[round(v, 4) for v in row] + [None] * (T - len(row)) for row in R],
            **{key: None if v is None else round(v, 4) for key, v in summary(R).items()},
        }
        distributed.first(lambda: write_json(self.folder / "result.json", result))
        return result

    def accuracy_matrix(self, t: int) -> list[list[float]]:
        """Rows 1..t of R, row k with k entries."""
        rows = [read_json(self.task_folder(k) / "scores.json")["scores"] for k in range(1, t + 1)]
        return [[row[name] for name in self.seen(k)] for k, row in enumerate(rows, start=1)]

    # -- what the steps work with ------------------------------------------------------------------------------

    def _partial(self, t: int) -> Path:
        return self.folder / f".task_{t:02d}_{self.steps[t - 1]}.partial"

    def _learned(self, t: int) -> bool:
        """Whether the state after task t is on disk, evaluated or not."""
        return t <= self.finished or distributed.first((self._partial(t) / "learned.json").exists)

    def _model(self) -> tuple[GainLoRAModel, Any]:
        assert self._loaded is not None
        return self._loaded

    def _model_after(self, k: int) -> tuple[GainLoRAModel, Any]:
        """The model with tasks 1..k learned, from memory or disk, and its tokenizer."""
        if self._loaded is not None and self._holds == k:
            return self._loaded
        config = self.config
        self._loaded = None  # never two bases in memory
        location = resolve_model(config.model.location, self.root)
        check_base(self.folder, self.base, config, self.root)
        base, tokenizer = load_base(location, self.dtype, config.model.device_map)
        check_positions(base, config.data.max_prompt_tokens, config.data.max_target_tokens)
        place(base, config.model.device_map)
        if k == 0:
            model = GainLoRAModel(base, new_adapter(config, self.horizon, base.weights_digest))
        else:
            folder = self.task_folder(k)
            if folder.is_dir():
                verify_checksums(folder)
            else:
                folder = self._partial(k)
            model = GainLoRAModel.from_pretrained(folder, base)
        model.eval()
        self._loaded, self._holds = (model, tokenizer), k
        return self._loaded

    @cached_property
    def data(self) -> RunData:
        """The tasks' examples; GainLoRAError where they are not there or changed."""
        finished = {name: self.task_folder(t) for t in range(1, self.finished + 1) for name in self.learned_at(t)}
        return RunData(self.folder, self.root, self.config, self.recorded, finished)

    def _training(self, t: int) -> Any:
        """The examples that step t trains on."""
        return self.data.training(self.learned_at(t), *self._model())

    def _examples(self, t: int) -> Examples:
        model, tokenizer = self._model()
        return Examples(self._training(t), model, self.config, tokenizer.pad_token_id)

    def _predict(self, name: str, t: int) -> list[Prediction]:
        """Answers on a task's test examples after step t."""
        model, tokenizer = self._model_after(t)
        model.task = self.tasks.index(name)
        rows = self.data.rows(name, "test", *self._model())
        return evaluate_task(model, tokenizer, rows, self.config.order.metric, self.config, name)


_opened: dict[Path, Stream] = {}
