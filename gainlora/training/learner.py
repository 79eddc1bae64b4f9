"""ContinualLearner: a model that learns tasks one after another, in memory."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

from gainlora import distributed
from gainlora.config import RunConfig
from gainlora.data.checks import data_entry, keeps_punctuation, majority_score
from gainlora.data.collate import Split, count_cut, tokenize
from gainlora.data.prompts import as_prompts
from gainlora.data.tasks import Task, as_tasks, hold_out, judged, kept_for_replay, limited
from gainlora.errors import GainLoRAError, add_context, short_repr
from gainlora.model.base import check_positions, load_base, pick_device, pick_dtype, prepare_base
from gainlora.model.modeling import GainLoRAModel
from gainlora.model.probe import check_behavior
from gainlora.rules import ALL_TASKS
from gainlora.training.callbacks import Callback, Callbacks, Console
from gainlora.training.checkpoint import Checkpoints, Records, restore_branch
from gainlora.training.evaluate import Prediction, answer_prompts, coefficient_summary, evaluate_task, mean, step_scores
from gainlora.training.general import general_ability
from gainlora.training.steps import Examples, Unscored, basis_sizes, new_adapter, prepare_task, update_memory, zero_rows
from gainlora.training.train import train_task
from gainlora.training.validation import Validation

HORIZON = 15
"""H of the threshold schedule where the number of tasks is not known in advance: that of the paper's orders."""


class ContinualLearner:
    """Learns tasks in sequence; answers prompts of any learned task without a task id.

        learner = ContinualLearner("Qwen/Qwen2.5-0.5B", method="gainlora-inflora", rank=8, learning_rate=3e-4)
        learner.learn(Task("tickets", train=rows, instruction="Which team should handle the ticket?"))
        learner.evaluate()
        learner.generate(["The invoice has a wrong sum."])
        learner.save("adapter")

    Only `save` writes files.

    Args:
        base: hub id or folder of the base model; or model and tokenizer, loaded: its layers are replaced.
        config: of a run; None: the defaults of `RunConfig` with `options`.
        adapter: folder of the learned state to continue; None: no task is learned yet.
        horizon: H of the threshold schedule; None: `subspace.horizon`, else the number of the order's tasks, else 15.
        cache: folder of tokenized examples; None: memory.
        callbacks: observe all that is learned; None: `Console`, which prints a line for each task.
        options: any option of `RunConfig` by its own name (rank=8), or by section and name where a name occurs twice
            (train__batch_size=8).

    Raises:
        GainLoRAError: an option is unknown or wrong, or the base model or the adapter is unusable.
    """

    def __init__(
        self, base: str | Path | tuple[Any, Any], config: RunConfig | None = None, *, adapter: Path | str | None = None,
        horizon: int | None = None, cache: Path | None = None, callbacks: Sequence[Callback] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        if config is not None and options:
            raise GainLoRAError(f"{min(options)}: give options or a whole configuration, not both.")
        if not isinstance(base, (str, Path, tuple)):
            raise GainLoRAError(f"base: {short_repr(base)}: give a folder, a hub id, or (model, tokenizer).")
        name = (getattr(base[0], "name_or_path", "") or "in-memory") if isinstance(base, tuple) else str(base)
        self.config = config or RunConfig.of(name, **options)
        if isinstance(base, tuple):
            model, self.tokenizer = base
            if not hasattr(model, "weights_fingerprint"):
                prepare_base(model, self.tokenizer, name)
        else:
            from gainlora.data.sources import resolve_model

            dtype = pick_dtype(self.config.model.dtype, pick_device())
            model, self.tokenizer = load_base(resolve_model(name), dtype, self.config.model.device_map)
        check_positions(model, self.config.data.max_prompt_tokens, self.config.data.max_target_tokens)
        self.horizon = horizon or self.config.subspace.horizon or len(self.config.order.tasks) or HORIZON
        if adapter is None:
            self.model = GainLoRAModel(model, new_adapter(self.config, self.horizon, model)).eval()
            check_behavior(self.model, self.tokenizer.pad_token_id)
        else:
            self.model = GainLoRAModel.from_pretrained(adapter, model).eval()
        self.model.tf32, self.cache = self.config.model.tf32, cache
        self.callbacks: Sequence[Callback] = (Console(),) if callbacks is None else callbacks
        self.stage: Literal["ready", "begun", "trained"] | None = "ready"
        """None: learning a task failed midway, and the model is unusable."""
        self.trainable_parameters = self.replayed = 0
        self.records: Records = []
        """Of the step that was trained last, one an optimizer step."""
        self.validation: Validation | None = None
        self.tasks: dict[str, Task] = {}
        """The tasks of `learn`, with their test examples, and the training examples that `data.replay` keeps."""
        self.entries: dict[str, dict[str, Any]] = {}
        """What a run records of each task in data.json."""
        self.history: list[dict[str, Any]] = []
        """Of each step of `learn`: what a run records in scores.json, subspace.json and coefficients.json."""
        self._unscored: Unscored | None = None

    @classmethod
    def load(cls, folder: Path | str, base: Any = None, **arguments: Any) -> Self:
        """The learner that `save` wrote, or that of a run's folder.

        Args:
            folder: what `save` wrote, a run's folder, a released adapter, or its hub id.
            base: as of the constructor, in place of the base model that the adapter names.
            arguments: `cache` and `callbacks` of the constructor.
        """
        from gainlora.export.saved import open_saved, read_learned

        saved = open_saved(folder)
        given = {"adapter": saved.folder, "horizon": saved.adapter.horizon, **arguments}
        learner = cls(base or saved.base(), saved.config, **given)
        read_learned(saved, learner)
        return learner

    def save(self, folder: Path | str) -> None:
        """Write the adapter, the record of what was learned, and the test examples: what `load` and the commands
        predict, export and serve take.

        Raises:
            GainLoRAError: nothing is learned yet, or the folder holds something else.
        """
        from gainlora.export.saved import write_learned

        write_learned(self, Path(folder))

    @property
    def learned(self) -> int:
        """Number of learned steps: tasks, or 1 after all at once."""
        return len(self.model.config.tasks)

    @property
    def accuracy_matrix(self) -> list[list[float]]:
        """R: row t holds the scores (0 to 100) on the tasks learned so far, after step t."""
        return [list(step["scores"]["scores"].values()) for step in self.history]

    def learn(self, task: Task | Sequence[Task], callbacks: Sequence[Callback] = ()) -> dict[str, float]:
        """Learn one more task, or several together with a method that learns all at once; then evaluate.

        Args:
            callbacks: beside those of the learner, for this task.

        Returns:
            The score (0 to 100) on each task learned so far.

        Raises:
            GainLoRAError: the task cannot be learned. If training had begun, the model is unusable; load it again.
        """
        tasks = [self._taken(t) for t in as_tasks(task)]
        tell = Callbacks([*self.callbacks, *callbacks])
        if self._unscored is None:
            self._unscored = self._learn(tasks, tell)
        elif [t.name for t in tasks] != [t.name for t in self._unscored.tasks]:
            self.check_scored()
        tasks, entries, before, seconds = self._unscored
        known = self.tasks | {t.name: replace(t, train=kept_for_replay(t, self.config.data.replay)) for t in tasks}
        earlier = [step["scores"] for step in self.history]
        row, found = self.scored(known.values(), tasks, before, earlier, partial(_timed, seconds))
        row |= {**self.facts(tasks), "seconds": seconds}
        coefficients = {n: coefficient_summary(p) for n, p in found.items()} if self.model.config.by_prompt else {}
        curve = {"validation_curve": self.validation.records} if self.validation and self.validation.records else {}
        step = {"scores": row, "subspace": basis_sizes(self.model), "coefficients": coefficients, "stored": {}, **curve}
        self.tasks, self.entries, self._unscored = known, {**self.entries, **entries}, None
        self.config = self.config.with_options({"order.tasks": tuple(known)})
        self.history.append(step)
        tell.on_task_end(self.learned, row["task"], row)
        return dict(row["scores"])

    def _learn(self, tasks: list[Task], tell: Callbacks) -> Unscored:
        """All of `learn` but the evaluation."""
        name = ALL_TASKS if self.config.rule.all_at_once else tasks[0].name
        self._check_new(tasks)
        entries = {t.name: self._entry(t) for t in tasks}
        for t in tasks:
            for note in entries[t.name]["notes"]:
                tell.on_note(f"{t.name}: {note}")
        tasks = [judged(limited(t, self.config.data), entries[t.name]) for t in tasks]
        seconds: dict[str, float] = {}
        tell.on_task_begin(self.learned + 1, name)
        with _timed(seconds, "before"):
            before = self.scores_before(tasks)
        with _timed(seconds, "prepare"):
            self.begin_task(name, tasks)
        with _timed(seconds, "train"):
            self.train_task(name, tasks, callbacks=[tell], replay=list(self.tasks.values()))
        with _timed(seconds, "update"):
            self.end_task(name, tasks)
        return Unscored(tasks, entries, before, seconds)

    def check_scored(self) -> None:
        """Raise a GainLoRAError if the evaluation after the last task was interrupted."""
        if self._unscored is not None:
            names = ", ".join(t.name for t in self._unscored.tasks)
            raise GainLoRAError(
                f"learner: {names}: learned, but not evaluated; `learn` it again, which only does that."
            )

    def _taken(self, task: Task) -> Task:
        """The task under this learner's settings, with its validation examples."""
        order = self.config.order
        return hold_out(replace(task, template=order.template, metric=order.metric), None, self.config.data)

    def _check_new(self, tasks: Sequence[Task]) -> None:
        if self.config.rule.all_at_once and self.learned:
            raise GainLoRAError(f"{self.config.method}: learns all tasks at once: give them in one list.")
        if len(tasks) > 1 and not self.config.rule.all_at_once:
            raise GainLoRAError(f"{self.config.method}: learns one task at a time; learn them one after the other.")
        for task in tasks:
            if task.name in self.model.config.tasks or task.name in self.tasks:
                raise GainLoRAError(f"task {task.name}: is learned already; give the new one another name.")

    def _entry(self, task: Task) -> dict[str, Any]:
        entry = data_entry(task, self.config, "", None, self.tokenizer)
        notes = [
            f"{entry[split]} of {len(examples)} {split} examples are used (data.{split}_limit)."
            for split, examples in (("train", task.train), ("test", task.test))
            if entry[split] < len(examples)
        ]
        return {**entry, "notes": [*entry["notes"], *notes]}

    # -- the three parts of learning a task, or several tasks at once ------------------------------------------

    def begin_task(self, name: str, tasks: Sequence[Task]) -> None:
        """Start a branch and a gate from the new task's inputs."""
        self._enter("ready")
        with add_context(f"task {name}"):
            prepare_task(self.model, self._examples(tasks), self.config, self.learned + 1)
        self.stage = "begun"

    def resume_task(self, checkpoint: Path) -> None:
        """Restore branch and gate from a checkpoint instead; `train_task` then resumes from it."""
        self._enter("ready")
        restore_branch(checkpoint, self.model, self.config.rule)
        self.stage = "begun"

    def train_task(
        self, name: str, tasks: Sequence[Task], checkpoints: Checkpoints | None = None,
        callbacks: Sequence[Callback] = (), replay: Sequence[Task] = (),
    ) -> Records:  # fmt: skip
        """Train branch and gate; returns a record per optimizer step. `validation` then holds the validation curve.

        Args:
            replay: earlier tasks; their training examples are mixed in.
        """
        self._enter("begun")
        config, rows = self.config, self.rows([*tasks, *(task for task in replay if task.train)], "train")
        self.replayed = sum(len(task.train) for task in replay)
        if self.model.gate is not None and config.gate.trained == "key":
            self.model.gate.train_key_alone()
        self.trainable_parameters = self.model.trainable_parameters()
        self.model.task = self.learned
        held_out = {task.name: self.rows([task], "validation") for task in tasks if task.validation}
        steps, epochs = math.ceil(len(rows) / config.train.batch_size), config.epochs(name, len(rows))
        keep = {task.name: bool(task.keep_punctuation) for task in tasks}
        self.validation = Validation(held_out, keep, self.model, self.tokenizer, config, epochs, steps)
        checkpoints = checkpoints or Checkpoints(None, None)
        self.records = train_task(
            self.model, rows, config, self.learned + 1, name, self.tokenizer.pad_token_id,
            checkpoints, self.validation, Callbacks(callbacks),
        )  # fmt: skip
        self.stage = "trained"
        return self.records

    def end_task(self, name: str, tasks: Sequence[Task]) -> None:
        """Freeze branch and gate, and expand the memories by the task's directions."""
        self._enter("trained")
        with add_context(f"task {name}"):
            update_memory(self.model, self._examples(tasks), self.config, self.learned + 1, name, self.horizon)
        self.stage = "ready"

    def facts(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """What is recorded of the step that ended last, ready for JSON."""
        losses, chosen = [record["loss"] for record in self.records], self.validation and self.validation.chosen()
        tenth = math.ceil(len(losses) / 10)
        return {
            "loss": [sum(part) / tenth for part in (losses[:tenth], losses[-tenth:])],
            **({"replayed": self.replayed} if self.replayed else {}),
            "truncated": sum(self.rows(tasks, "train")["truncated"]),
            "zero_rows": zero_rows(self.model) if self.config.rule.input_memory else {},
            **({"cut": cut} if (cut := self.cut(tasks)) else {}),
            **({"validation": chosen} if chosen else {}),
            "trainable_parameters": self.trainable_parameters,
            "num_processes": distributed.count(),
        }

    def _enter(self, stage: str) -> None:
        if self.stage != stage:
            raise GainLoRAError(f"learner: is {self.stage or 'in the middle of a task that failed'}, not {stage}.")
        self.stage = None

    # -- using the model ---------------------------------------------------------------------------------------

    def evaluate(self, tasks: Task | Sequence[Task] | None = None) -> dict[str, float]:
        """The score (0 to 100) on each task's test examples.

        Args:
            tasks: with other test examples; None: all learned tasks.
        """
        order, given = self.config.order, [*self.tasks.values()]
        if tasks is not None:
            asked = (replace(t, template=order.template, metric=order.metric) for t in as_tasks(tasks))
            given = [limited(t, self.config.data) for t in asked]
        return {name: mean(answers) for name, answers in self.predictions(given).items()}

    def predictions(self, tasks: Iterable[Task]) -> dict[str, list[Prediction]]:
        """Answers to each task's test examples, in order. Only `single`, a bound, uses the task id."""
        names, found = self.model.config.tasks, {}
        for task in tasks:
            self.model.task = names.index(task.name) if task.name in names else None
            found[task.name] = self._answered(task, task.name)
        return found

    def scored(
        self, learned: Iterable[Task], new: Sequence[Task], before: Mapping[str, float],
        earlier: Sequence[Mapping[str, Any]], timed: Callable[[str], AbstractContextManager[None]],
    ) -> tuple[dict[str, Any], dict[str, list[Prediction]]]:  # fmt: skip
        """What is known of the newest step once all learned tasks are answered, as in scores.json; and the answers.

        Args:
            learned: all tasks. new: those of the step.
            before: `scores_before` of the new ones.
            earlier: what this method returned for the steps before.
            timed: measures the block that it is given a name for.
        """
        with timed("evaluate"):
            found = self.predictions(learned)
        with timed("base"):
            base, general = self.base_scores(new), self.general_ability()
        measured = {"base": base, "before": before, "majority": {t.name: majority_score(t) for t in new}}
        scores = step_scores(found, measured, earlier)
        return {"task": self.model.config.tasks[-1], "index": self.learned, **scores, "general": general}, found

    def base_scores(self, tasks: Iterable[Task]) -> dict[str, float]:
        """The base model's mean score (0 to 100) on each task's test examples, all branches off: row 0 of R."""
        with self.model.branches_off():
            return {t.name: mean(self._answered(t, f"base on {t.name}", unlearned=True)) for t in tasks}

    def scores_before(self, tasks: Iterable[Task]) -> dict[str, float]:
        """Mean scores (0 to 100) on tasks that are not learned yet, R[i-1][i]. Empty before the first step, where they
        are the base model's, and with `single`, which has no branch for such a task."""
        known = self.learned and not self.config.rule.task_known
        return {t.name: mean(self._answered(t, f"before on {t.name}", unlearned=True)) for t in tasks if known}

    def _answered(self, task: Task, name: str, unlearned: bool = False) -> list[Prediction]:
        if task.keep_punctuation is None and task.name in self.entries:
            task = judged(task, self.entries[task.name])
        keep = keeps_punctuation(task) if task.keep_punctuation is None else task.keep_punctuation
        given = (self.rows([task], "test"), task.metric, self.config, name, keep, unlearned)
        return evaluate_task(self.model, self.tokenizer, *given)

    def general_ability(self) -> dict[str, Any]:
        """`gainlora.training.general.general_ability`; empty with `single`, whose branches need a task."""
        return {} if self.config.rule.task_known else general_ability(self.model, self.tokenizer)

    def generate(self, texts: Sequence[str], task: str | None = None, max_new_tokens: int | None = None) -> list[str]:
        """Answers, in the texts' order.

        Args:
            texts: inputs, which become prompts with a task's instruction; or complete prompts, which end in "Output: ".
            task: whose instruction; None: the one that all learned tasks share. No gate sees it.
            max_new_tokens: None: `data.max_target_tokens`.

        Raises:
            GainLoRAError: the tasks have several instructions, or no such task is learned.
        """
        instructions = {name: entry.get("definition", "") for name, entry in self.entries.items()}
        if self.config.rule.task_known and task is None:
            raise GainLoRAError(f"task: {self.config.method} needs the task of the texts: {', '.join(instructions)}.")
        prompts = as_prompts(texts, self.config.order.template, instructions, task)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise GainLoRAError(f"max_new_tokens: {max_new_tokens}: give 1 or more.")
        self.model.task = self.model.config.tasks.index(task) if task in self.model.config.tasks else None
        return [a.text for a in answer_prompts(self.model, self.tokenizer, prompts, self.config, max_new_tokens)]

    def rows(self, tasks: Sequence[Task], split: Split) -> Any:
        """The tasks' tokenized examples, a datasets.Dataset."""
        from datasets import concatenate_datasets

        encoder_decoder = self.model.encoder_decoder
        parts = [tokenize(t, split, self.tokenizer, self.config.data, encoder_decoder, self.cache) for t in tasks]
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]

    def cut(self, tasks: Sequence[Task]) -> dict[str, dict[str, int]]:
        """Counts of examples that the length limits cut (`count_cut`), per affected split."""
        used = {split: [task for task in tasks if getattr(task, split)] for split in get_args(Split)}
        found = {split: count_cut(self.rows(tasks, split)) for split, tasks in used.items() if tasks}
        return {split: counts for split, counts in found.items() if counts}

    def _examples(self, tasks: Sequence[Task]) -> Examples:
        return Examples(self.rows(tasks, "train"), self.model, self.config, self.tokenizer.pad_token_id)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - started, 2)
