"""A run: tasks learned in sequence, in a folder that survives any interruption.

    runs/<order>-<method>-<model>-<seed>-<id>/
      config.json, data.json       configuration, hashes of the data, the steps' ids, code and versions
      task_01_<name>/              adapter, gate and bases after that task, predictions, scores, checksums, and
                                   test examples, so that later steps need no data of earlier tasks
      .task_02_<name>.partial/     the task being learned
      data/                        files of tasks beyond the order's
      result.json                  R, AP, FT, BWT once all tasks are learned

A task folder is created by one atomic rename and never changes afterwards, so that runs with the same first steps
(`gainlora.runs.identity`) share them by hard link. Every phase of a step is idempotent and stores its state on disk: a
stopped run resumes when it is started again. Several processes (`gainlora.launch`) run the phases together; only the
first one locks the run and writes.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

from gainlora import distributed, io
from gainlora.config import RunConfig
from gainlora.data.checks import data_entry, data_notes
from gainlora.data.sources import dvc_hash, resolve_model
from gainlora.data.tasks import KEPT, Task, as_file, judged, kept_for_replay, limited, load_order, read_kept_test
from gainlora.errors import GainLoRAError
from gainlora.launch import launch
from gainlora.model.base import load_tokenizer
from gainlora.runs import identity, lineage
from gainlora.runs.loading import load_learner, memory_note
from gainlora.runs.records import falls, read_run, read_step
from gainlora.runs.reuse import OWN, link_steps, make_folder
from gainlora.sections import LaunchConfig
from gainlora.training.callbacks import Callback, Callbacks
from gainlora.training.checkpoint import PROGRESS, Checkpoints, latest
from gainlora.training.evaluate import Prediction, coefficient_summary
from gainlora.training.learner import ContinualLearner
from gainlora.training.steps import basis_sizes

TIMINGS, LEARNED, BEFORE = "timings.json", "learned.json", "before.json"
"""Files of a step that is being learned, later part of its scores.json."""
ALONE = LaunchConfig()
"""One process."""
Call = Callable[..., Any]
"""call(name, function, *arguments) -> what the function returns."""


def call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Just call the function."""
    return function(*arguments)


class Run(AbstractContextManager["Run"]):
    """A run folder, locked by this process until `close`; a context manager. Use `create` or `open`."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.root = folder.resolve(), folder.resolve().parent.parent
        self.notices: list[str] = []
        self.callbacks: Sequence[Callback] = ()
        self.already_shortened = False
        """Whether opening this run completed an interrupted `gainlora.runs.grow.shortened`."""
        self._learner: ContinualLearner | None = None
        self._locks: list[IO[str]] = []
        io.read_json(self.folder / "config.json")
        self._lock()
        try:
            self._read(name)
        except BaseException:
            self.close()
            raise

    def _read(self, lineage_name: str | None) -> None:
        keys = ("run_id", "config", "tasks", "steps", "skipped", "dtype")
        self.described = io.read_json(self.folder / "config.json", *keys)
        if "ids" not in self.described:
            raise GainLoRAError(
                f"{self.folder}: an earlier version made this run, without step ids: it can be read, reported and used "
                "to predict, not continued; run its order again for a new one."
            )
        self.config: RunConfig = RunConfig.from_stored(self.described["config"])
        self.tasks: list[str] = self.described["tasks"]
        self.steps: list[str] = self.described["steps"]  # one a task; multitask: one for all
        self.ids: list[str] = self.described["ids"]
        self.lineage: str = lineage_name or self.described["lineage"]
        self.horizon = identity.horizon(self.config, len(self.tasks))
        recorded = io.read_json(self.folder / "data.json", *self.tasks)
        self.recorded = {name: recorded[name] for name in self.tasks}

    @classmethod
    def create(cls, config: RunConfig, root: Path = Path("."), load: bool = True, repeats: Path | None = None) -> Self:
        """Check the configuration against data and model, then create the run folder or open the existing one.

        Steps that another run has finished are linked from there.

        Args:
            load: load the base model of a new run now; False if other processes will learn.
            repeats: the run to reproduce, in a folder beside it, without sharing steps.

        Raises:
            GainLoRAError: data or model are unusable, another process uses the run, or a finished task is damaged.
                No folder of a new run remains.
        """
        root = root.resolve()
        location = resolve_model(config.model.location, root)
        everything = config.data.model_copy(update={"train_limit": None, "test_limit": None})
        tasks, skipped = load_order(config.order, everything, root, repeats and repeats / OWN)
        used = [limited(task, config.data) for task in tasks]
        names, base = [task.name for task in tasks], identity.base_fingerprint(location, root)
        ids = identity.step_ids(config, {t.name: {"sha256": t.sha256, "train": len(t.train)} for t in used}, base)
        described = identity.describe(config, names, skipped, ids, base)
        if repeats:
            described["run_id"] = described["lineage"] = f"{repeats.name}{lineage.RERUN}"
        folder = root / "runs" / described["run_id"]
        lineage.collect(root)
        new, data = not (folder / "config.json").exists(), {}
        if new:
            tokenizer = load_tokenizer(location, identity.revision(location, base))
            for task in tasks:
                path = config.order.path(task.name)
                data[task.name] = data_entry(task, config, path, dvc_hash(Path(path), root), tokenizer)
        run = cls(make_folder(root, described, data, [repeats / OWN] if repeats else []))
        try:
            run.data = {task.name: judged(task, run.recorded[task.name]) for task in used}
            if skipped:
                left_out = f"{len(skipped)} of {len(config.order.tasks)} tasks left out, as their files are missing"
                run.notices.append(f"{left_out}: {', '.join(skipped)}")
            run.notices += [*filter(None, [config.note]), *data_notes(data)]
            for t in range(1, run.finished + 1):
                io.verify_checksums(run.task_folder(t))
            run.config = config
            if config.learning() != run.described["config"]:  # options that do not affect learning
                run.describe(config=config.learning())
            if not repeats:
                link_steps(run)
            if new and load and run.finished < len(run.steps):
                run._learner_after(run.finished)
        except BaseException:
            run.close()
            if new:  # nothing is learned yet
                io.remove(run.folder)
                lineage.remove(described["lineage"], root)
            raise
        return run

    @classmethod
    def open(cls, name: Path | str, root: Path = Path(".")) -> Self:
        """Open a run by its folder, name or unique prefix, lineage, or `latest` (`lineage.resolve`).

        Raises:
            GainLoRAError: no such run, or one of an earlier version.
            RunLocked: another process uses it.
        """
        root = root.resolve() if lineage.is_name(name) else Path(name).resolve().parent.parent
        forgotten = lineage.collect(root)
        name = forgotten.get(Path(name).name, name)
        folder = lineage.resolve(name, root)
        run = cls(folder, str(name) if folder.name != str(name) and lineage.exists(str(name), root) else None)
        run.already_shortened = folder.name in forgotten.values()
        return run

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release lock and model; a traceback may keep this object alive."""
        self._learner = None
        while self._locks:
            self._locks.pop().close()

    def take_locks(self, run: Self) -> None:
        """Hold another run's locks until `close`, and close that run."""
        self._locks += run._locks
        run._locks = []
        run.close()

    @contextmanager
    def unlocked(self) -> Iterator[None]:
        """Release the lock during the block, for other processes of this machine."""
        self._learner = None
        self._locks.pop(0).close()
        try:
            yield
        finally:
            self._lock()

    def _lock(self) -> None:
        if not distributed.index():
            self._locks.insert(0, io.lock(self.folder / ".lock", f"runs/{self.folder.name}: this run"))

    def describe(self, **changes: Any) -> None:
        """Change config.json."""
        self.described |= changes
        io.write_json(self.folder / "config.json", self.described)

    # -- state -------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> int:
        """Number of finished steps."""
        T = len(self.steps)
        return distributed.on_main(lambda: next((t for t in range(T) if not self.task_folder(t + 1).is_dir()), T))

    @property
    def planned_steps(self) -> list[int]:
        """Optimizer steps of each step of the run (early stopping may end one before)."""
        trained = [sum(self.recorded[task]["train"] for task in self.learned_at(t + 1)) for t in range(len(self.steps))]
        size, epochs = self.config.train.batch_size, self.config.epochs
        return [math.ceil(count / size) * epochs(name, count) for name, count in zip(self.steps, trained, strict=True)]

    def task_folder(self, t: int) -> Path:
        """Folder of finished step t (1-based)."""
        return self.folder / f"task_{t:02d}_{self.steps[t - 1]}"

    def partial_folder(self, t: int) -> Path:
        """Folder of step t while it is learned."""
        return self.folder / f".task_{t:02d}_{self.steps[t - 1]}.partial"

    def learned_at(self, t: int) -> list[str]:
        """Tasks that step t learns."""
        return self.tasks if self.config.rule.all_at_once else [self.tasks[t - 1]]

    def seen(self, t: int) -> list[str]:
        """Tasks learned up to step t, in order."""
        return [name for k in range(1, t + 1) for name in self.learned_at(k)]

    def learn(
        self, callbacks: Sequence[Callback] = (), call: Call = call, processes: LaunchConfig = ALONE
    ) -> dict[str, Any]:
        """Learn the remaining tasks one after another; the content of result.json.

        Args:
            call: calls each part of the work; flows make it a task of Prefect.
            processes: several processes learn each task together (`gainlora.launch`).
        """
        self.callbacks, tell = callbacks, Callbacks(callbacks)
        total, several = len(self.steps), processes.num_processes
        self.notices += memory_note(self)
        tell.on_run_begin(self)
        for t, name in enumerate(self.steps, start=1):
            where = f"{t}/{total} {name}"
            tell.on_task_begin(t, name)
            if t > self.finished and several > 1:
                with self.unlocked():
                    call(f"learn on {several} processes {where}", launch, self.folder, t, several, processes.config)
            elif t > self.finished:
                call(f"train {where}", self.train, t)
                call(f"update subspaces {where}", self.update, t)
            row = call(f"evaluate {where}", self.evaluate, t)
            self.seal(t)
            call(f"record {where}", tell.on_task_end, t, name, {**row, "falls": self.falls(t)})
        result = self.result()
        call("conclude", tell.on_run_end, result)
        return result

    def falls(self, t: int) -> dict[str, tuple[float, float]]:
        """Tasks that finished step t made worse, with their scores before and after (`gainlora.runs.records.falls`)."""
        return distributed.on_main(lambda: falls(self.task_folder(t - 1), self.task_folder(t))) if t > 1 else {}

    # -- the phases of step t (1-based), in this order; each returns at once if its work is done --------------

    def begin(self, t: int) -> None:
        """Start branch and gate t from the new task's inputs, unless a checkpoint holds them."""
        if self._learned(t) or self._stage(t) or latest(self.partial_folder(t)):
            return
        learner, partial = self._learner_after(t - 1), self.partial_folder(t)
        distributed.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))  # of an interrupted update
        tasks, started = self._tasks(t), time.perf_counter()
        scores = learner.scores_before(tasks)
        took = time.perf_counter() - started
        with self._timed(t, "prepare"):
            learner.begin_task(self.steps[t - 1], tasks)
        with self._timed(t, "before", took):  # now: a task that cannot begin leaves no folder
            distributed.on_main(lambda: io.write_json(partial / BEFORE, scores))

    def train(self, t: int) -> None:
        """Train branch and gate t."""
        if self._learned(t) or self._stage(t) == "trained":
            return
        before, partial = 0.0, self.partial_folder(t)
        if not self._stage(t) and (saved := latest(partial)):
            progress = io.read_json(saved / PROGRESS)
            before = sum(record["seconds"] for record in (*progress["records"], *progress["validation"]))
            self._learner_after(t - 1).resume_task(saved)
        self.begin(t)
        learner, tasks = self._learner, self._tasks(t)
        assert learner is not None
        with self._timed(t, "train", before):
            old = self._kept_tasks(t - 1) if self.config.data.replay else []
            given = (Checkpoints(partial, self.config.train.checkpoint_every), self.callbacks, old)
            records = learner.train_task(self.steps[t - 1], tasks, *given)
            distributed.on_main(lambda: io.write_lines(partial / "train.jsonl", records))
            if learner.validation and learner.validation.records:
                curve = learner.validation.records
                distributed.on_main(lambda: io.write_lines(partial / "validation.jsonl", curve))

    def update(self, t: int) -> None:
        """Freeze branch and gate t, expand the memories, and write the learned state."""
        if self._learned(t):
            return
        self.train(t)
        learner, partial = self._learner, self.partial_folder(t)
        assert learner is not None
        with self._timed(t, "update"):
            tasks = self._tasks(t)
            learner.end_task(self.steps[t - 1], tasks)
            distributed.on_main(lambda: learner.model.save_pretrained(partial))
        facts = learner.facts(tasks)

        def mark() -> None:
            io.write_json(partial / "subspace.json", basis_sizes(learner.model))
            io.flush(partial)
            io.write_json(partial / LEARNED, facts)  # last: marks the state above as complete

        distributed.on_main(mark)

    def evaluate(self, t: int) -> dict[str, Any]:
        """Answer the test examples of tasks 1..t; row t of R. Returns the content of scores.json."""
        if t <= self.finished:
            return dict(read_step(self.task_folder(t)).files["scores"])
        file = self.partial_folder(t) / "scores.json"
        if distributed.on_main(file.is_file):
            return distributed.on_main(lambda: io.read_json(file))
        self.update(t)
        learner, steps = self._learner_after(t), [self.task_folder(k) for k in range(1, t)]
        earlier = distributed.on_main(lambda: [read_step(step).files["scores"] for step in steps])
        before = distributed.on_main(lambda: io.read_json(self.partial_folder(t) / BEFORE))
        seen = [self.data[name] for name in self.seen(t)]
        row, answers = learner.scored(seen, self._tasks(t), before, earlier, lambda phase: self._timed(t, phase))
        return distributed.on_main(lambda: self._write_scores(t, row, answers))

    def seal(self, t: int) -> Path:
        """Write task t's checksums, then rename its folder. Returns the folder."""
        if t > self.finished:
            self.evaluate(t)
            distributed.on_main(lambda: io.seal(self.partial_folder(t), self.task_folder(t)))
        return self.task_folder(t)

    def result(self) -> dict[str, Any]:
        """Write and return result.json: order, method, model, seed, tasks, R, AP, FT, BWT. A run that extends its
        lineage's head becomes the new head.

        Raises:
            GainLoRAError: tasks remain to be learned.
        """

        def write() -> dict[str, Any]:
            record = read_run(self.folder)
            record.check_finished()
            io.write_json(self.folder / "result.json", record.result)
            if self.described.get("extends") == lineage.head(self.lineage, self.root):
                lineage.move(self.lineage, self.folder.name, self.root)
            return record.result

        return distributed.on_main(write)

    # -- internals of the phases ------------------------------------------------------------------------------

    @cached_property
    def data(self) -> dict[str, Task]:
        """The tasks: training examples of those to be learned, from their files; test examples of all, of finished
        tasks from the run's folders.

        Raises:
            GainLoRAError: files are missing, damaged, or changed since the run began.
        """
        order, found = self.config.order, {task.name: task for task in self._kept_tasks(self.finished)}
        rest = order.model_copy(update={"tasks": tuple(name for name in self.tasks if name not in found)})
        data = self.config.data.model_copy(update={"skip_incomplete": False})  # `rest` holds no skipped tasks
        for task in load_order(rest, data, self.root, self.folder / OWN)[0] if rest.tasks else []:
            entry = self.recorded[task.name]
            if task.sha256 != entry["sha256"]:
                raise GainLoRAError(
                    f"{entry['path']}: changed since this run began; start the order again for a new run."
                )
            found[task.name] = judged(task, entry)
        return found

    def _kept_tasks(self, finished: int) -> list[Task]:
        """The tasks of the first finished steps, as their folders keep them."""
        template, metric = self.config.order.template, self.config.order.metric
        return [
            read_kept_test(self.task_folder(t) / KEPT / f"{name}.json", template, metric, self.recorded[name])
            for t in range(1, finished + 1)
            for name in self.learned_at(t)
        ]

    def _write_scores(self, t: int, row: dict[str, Any], answers: dict[str, list[Prediction]]) -> dict[str, Any]:
        """Write the files of step t's evaluation; the content of scores.json."""
        folder = self.partial_folder(t)
        for name, given in answers.items():
            lines = [{"input": e.input, **vars(p)} for e, p in zip(self.data[name].test, given, strict=True)]
            io.write_lines(folder / "predictions" / f"{name}.jsonl", lines)
        for task in self._tasks(t):
            kept = as_file(task, task.test, kept_for_replay(task, self.config.data.replay))
            io.write_json(folder / KEPT / f"{task.name}.json", kept)
        row = {**row, **io.read_json(folder / LEARNED), "seconds": io.read_json(folder / TIMINGS)}
        if self.config.integration in ("gated", "routed"):
            coefficients = {name: coefficient_summary(given) for name, given in answers.items()}
            io.write_json(folder / "coefficients.json", coefficients)
        io.write_json(folder / "scores.json", row)
        return row

    def _tasks(self, t: int) -> list[Task]:
        """The tasks that step t learns."""
        return [self.data[name] for name in self.learned_at(t)]

    def _learned(self, t: int) -> bool:
        """Whether the state after task t is on disk, evaluated or not."""
        return t <= self.finished or distributed.on_main((self.partial_folder(t) / LEARNED).exists)

    def _stage(self, t: int) -> str | None:
        """Stage of step t in memory: begun, trained, or None."""
        learner = self._learner
        return learner.stage if learner and learner.learned == t - 1 and learner.stage != "ready" else None

    def _learner_after(self, k: int) -> ContinualLearner:
        """The learner after steps 1..k, from memory or disk."""
        if self._learner and self._learner.stage == "ready" and self._learner.learned == k:
            return self._learner
        self._learner = None  # never two bases in memory
        self._learner = load_learner(self, k)
        return self._learner

    @contextmanager
    def _timed(self, t: int, phase: str, before: float = 0.0) -> Iterator[None]:
        started, file = time.perf_counter(), self.partial_folder(t) / TIMINGS
        yield
        seconds = before + time.perf_counter() - started

        def write() -> None:
            io.write_json(file, {**(io.read_json(file) if file.is_file() else {}), phase: round(seconds, 2)})

        distributed.on_main(write)
