"""Tasks: rows in memory, the files of a folder, or what a run keeps of them -> validated examples and prompts.

A task's folder holds one file for training and one for testing, train.json and test.json in the benchmark's format
(`gainlora.data.instances`) or another (`gainlora.data.formats`). dev.json is read only for `data.validation` and the
published protocol (`hold_out`); labels.json never, since it disagrees with the benchmark's answers (qqp declares True
and False and answers yes and no).

A run needs no file outside its folder to learn one more task and to evaluate all earlier ones:

    data/<task>/train.json, test.json      an added task: copied files, or one file split in two
    task_02_<task>/test/<task>.json        every task: its test examples, in the same format
"""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, replace
from pathlib import Path
from typing import Any

from gainlora.data.formats import SUFFIXES, Source, memory_rows, rows_split
from gainlora.data.instances import Example, benchmark_split
from gainlora.data.prompts import Prompt, build_prompt
from gainlora.data.validation import SHARE, TEST_SHARE, common_inputs, split_off, split_test
from gainlora.errors import GainLoRAError, short_repr
from gainlora.io import read_json
from gainlora.sections import DataConfig, OrderConfig, is_name

FILES = ("train.json", "test.json")
"""Files of a complete task folder."""
DEV = "dev.json"
"""Optional file."""
KEPT = "test"
"""Subfolder of a run's step for its tasks' test examples."""


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

        Task("tickets", train=rows, test=more_rows, instruction="Which team should handle the ticket?")

    Args:
        name: letters, digits, _ - and . only.
        train: rows with an input and its answer: dicts, a data frame or a `datasets.Dataset`.
        test: None: one in five different inputs of `train` is held out.
        instruction: stands in every prompt; "": none.
        validation: rows for `data.validation`, in place of a part of `train`.
        columns: {"input": ..., "output": ...} where the columns are not recognized (`gainlora.data.formats.PAIRS`).

    Raises:
        GainLoRAError: the columns are not recognized, or a row has no input or no answer.
    """

    name: str
    train: Any
    """tuple[Example, ...], once made."""
    test: Any = None
    """tuple[Example, ...], once made."""
    instruction: str = ""
    _: KW_ONLY
    validation: Any = ()
    """tuple[Example, ...], once made: training examples that were held out, or the task's own for validation."""
    template: str = "long_sequence"
    """A learner's own setting replaces it."""
    metric: str = "exact_match"
    """A learner's own setting replaces it."""
    sha256: str = ""
    """Of the contents of the files; of the examples of a task made in memory."""
    notes: tuple[str, ...] = ()
    """Notes on omitted and converted content, one sentence each."""
    validation_from: str = ""
    """The file of the validation examples."""
    keep_punctuation: bool | None = None
    """How answers are compared (`gainlora.data.checks`), as decided before the task is learned; None: not yet."""
    columns: InitVar[Mapping[str, str] | None] = None

    def __post_init__(self, columns: Mapping[str, str] | None) -> None:
        if not isinstance(self.name, str) or not is_name(self.name):
            raise GainLoRAError(f"task: {short_repr(self.name)} cannot name a task; use letters, digits, _ - and .")
        if not isinstance(self.instruction, str):
            raise GainLoRAError(f"task {self.name}: instruction: {short_repr(self.instruction)} is no text.")
        if columns is not None and not (isinstance(columns, Mapping) and columns.keys() <= {"input", "output"}):
            raise GainLoRAError(
                f"task {self.name}: columns: {short_repr(columns)}: give the names of two columns, as "
                '{"input": ..., "output": ...}.'
            )
        made: dict[str, Any] = {"notes": list(self.notes), "instruction": self.instruction.strip()}
        for split in ("train", "test", "validation"):
            rows = getattr(self, split)
            if isinstance(rows, tuple) and all(isinstance(row, Example) for row in rows):
                made[split] = rows
            elif rows is not None or split == "train":
                if isinstance(rows, (str, Path, Mapping)) or not isinstance(rows, Iterable):
                    raise GainLoRAError(
                        f"task {self.name}: {split}: {short_repr(rows)}: give a list of dicts, a data frame or a "
                        "datasets.Dataset."
                    )
                plain, notes = memory_rows(rows)
                given = columns or {}
                where = f"task {self.name}: {split}"
                read = rows_split(plain, where, given.get("input"), given.get("output"), split == "train", notes)
                made[split] = tuple(read.examples)
                made["notes"] += read.notes
        if "test" not in made:
            held = split_test([e.input for e in made["train"]], self.name, f"task {self.name}")
            of = f"{len(held)} of {len(made['train'])} rows, one in {TEST_SHARE} different inputs"
            made["notes"].append(f"{of}, are held out to test.")
            made["train"], made["test"] = _divided(made["train"], held)
        if not self.sha256:
            parts = [[[e.input, e.references] for e in made[split]] for split in ("train", "test")]
            content = json.dumps([made["instruction"], *parts])
            made["sha256"] = hashlib.sha256(content.encode()).hexdigest()
        made["notes"] = tuple(dict.fromkeys(made["notes"]))
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def prompt(self, example: Example) -> str:
        """The text the model completes."""
        return self.parts(example).text

    def parts(self, example: Example) -> Prompt:
        """The prompt in its parts."""
        return build_prompt(self.template, self.instruction, example.input)


def as_tasks(given: Any) -> list[Task]:
    """One task, or several, as a list.

    Raises:
        GainLoRAError: none, or something else.
    """
    tasks = [given] if isinstance(given, Task) else list(given) if isinstance(given, Sequence) else []
    if not tasks or not all(isinstance(task, Task) for task in tasks):
        raise GainLoRAError(f"task: {short_repr(given)}: give a gainlora.Task, or a list of them.")
    return tasks


def read_task(source: Source | Path | str, template: str, metric: str, name: str = "") -> Task:
    """Read one complete task.

    Args:
        source: a folder that holds train.json and test.json, or another `Source`.
        template: `superni` or `long_sequence`.
        metric: `rouge_l` or `exact_match`, stored with the task.
        name: "": that of the source.

    Raises:
        GainLoRAError: a file is missing, unreadable or not in a known format; names the file, the instance's
            number and the key.
    """
    source = Source.of(source)
    splits = [found for part in ("train", "test") if (found := source.read(part))]
    digests = b"".join(hashlib.sha256(content).digest() for _, content in splits)
    sha256 = hashlib.sha256(digests + source.mapping).hexdigest()
    definitions = [split.definition for split, _ in splits]
    if len(set(definitions)) > 1:
        raise GainLoRAError(f"{source.label('test')}: 'Definition' differs from train.json's; give both the same text.")
    notes = tuple(dict.fromkeys(note for split, _ in splits for note in split.notes))
    given = [tuple(split.examples) for split, _ in splits]  # without test examples, Task holds some out
    known: dict[str, Any] = {"template": template, "metric": metric, "sha256": sha256, "notes": notes}
    return Task(name or source.name, given[0], given[1] if len(given) > 1 else None, definitions[0], **known)


def load_order(
    order: OrderConfig, data: DataConfig, root: Path = Path("."), own: Path | None = None
) -> tuple[list[Task], list[str]]:
    """Read the tasks of an order, in its sequence, with `data.train_limit` and `data.test_limit` applied.

    A limit selects a random subset, in file order, that depends only on the task's name and the split; a smaller
    limit's subset is part of a larger one's. Every seed and method uses the same examples.

    Args:
        own: folder of a run's added tasks; tasks in it are read from there.

    Returns:
        The tasks, and the names of those skipped (only with `data.skip_incomplete`).

    Raises:
        GainLoRAError: the order's folder or some task's files are missing, or a file is invalid.
    """
    base = root / order.data
    added = {name: Source(own / name) for name in order.tasks if own and (own / name).is_dir()}
    rest = [name for name in order.tasks if name not in added]
    inside = [name for name in rest if name not in order.sources or order.sources[name].path is None]
    if inside and not base.is_dir():
        raise GainLoRAError(f"orders.{order.name}.data: {order.data}: no such folder; {_remedy(order.data)}.")
    sources = {**added, **{name: _located(name, base, order) for name in rest}}
    missing = {name: absent for name in order.tasks if (absent := sources[name].lacks())}
    if missing and not data.skip_incomplete:
        listing = "; ".join(f"{name} lacks {' and '.join(absent)}" for name, absent in missing.items())
        raise GainLoRAError(
            f"orders.{order.name}: incomplete in {order.data}: {listing}. Complete the folder "
            f"({_remedy(order.data)}), or run without these tasks: --skip-incomplete (data.skip_incomplete: true)."
        )
    complete = [name for name in order.tasks if name not in missing]
    if not complete:
        raise GainLoRAError(f"orders.{order.name}: no complete task in {order.data}; {_remedy(order.data)}.")
    read = [(read_task(sources[name], order.template, order.metric, name), sources[name]) for name in complete]
    return [limited(hold_out(task, source, data), data) for task, source in read], list(missing)


def _located(name: str, base: Path, order: OrderConfig) -> Source:
    """Where a task of an order is: its entry in `sources`, else its folder or file in the order's folder, or one folder
    deeper, as in O-LoRA's benchmark (SC/yelp)."""
    entry = order.sources.get(name)
    read = (entry.input, entry.output, entry.instruction) if entry else (None, None, None)
    if entry and entry.path:
        place = Source.of(entry.path).place
        return Source(place if isinstance(place, str) else base / place, *read)
    if (base / name).is_dir():
        return Source(base / name, *read)
    found = [path for suffix in SUFFIXES if (path := base / f"{name}{suffix}").is_file()]
    found = found or sorted(path for path in base.glob(f"*/{name}") if path.is_dir())
    if len(found) > 1:
        raise GainLoRAError(f"orders.{order.name}: {name} is {found[0]} or {found[1]}; name its path under sources.")
    return Source(found[0] if found else base / name, *read)


def hold_out(task: Task, source: Source | Path | None, data: DataConfig) -> Task:
    """The task, all of it, with the validation examples that `data.validation` asks for, and without its instruction if
    `data.instruction` says so.

    The published protocol trains on the whole training set: a dev.json that is a part of it, not the test set, is put
    back unless it is validated on.

    Args:
        source: of dev.json; None: the task was made in memory.

    Raises:
        GainLoRAError: dev.json is missing, invalid or shares inputs with test.json, or nothing can be held out.
    """
    task = _with_validation(task, None if source is None else Source.of(source), data)
    return replace(task, instruction="") if data.instruction == "none" else task


def _with_validation(task: Task, source: Source | None, data: DataConfig) -> Task:
    share, whole = data.validation, data.protocol == "published" and not isinstance(data.validation, str)
    remedy = "set data.validation to a fraction, or put a dev.json there that is not the test set"
    where = source.label("dev") if source else f"task {task.name}: validation"
    if task.validation:
        _check_apart(task.validation, task, where, remedy)
        return replace(task, validation_from=task.validation_from or "validation")
    dev = source.read("dev") if source and (share in ("dev", "auto") or whole) else None
    if share == "dev" and dev is None:
        raise GainLoRAError(f"{where}: not found; {remedy}.")
    if dev is not None:
        split, content = dev
        if split.definition != task.instruction:
            raise GainLoRAError(f"{where}: 'Definition' differs from train.json's; give both the same text.")
        # the run depends on it, however it is used
        task = replace(task, sha256=hashlib.sha256(task.sha256.encode() + content).hexdigest())
        name, n = Path(where).name, len(split.examples)
        common = common_inputs([e.input for e in split.examples], [e.input for e in task.test])
        if share == "dev":
            _check_apart(split.examples, task, where, remedy)
        notes = list(dict.fromkeys((*task.notes, *split.notes)))
        if not common and not whole:
            return replace(task, validation=tuple(split.examples), validation_from=name, notes=tuple(notes))
        if not common:
            added = f"{name}: its {n} instances are added to the training examples (data.protocol: published)."
            task = replace(task, train=(*task.train, *split.examples), notes=(*notes, added))
        elif len(common) < n:  # the test set itself is expected: the benchmark's first edition
            unused = f"{name}: {len(common)} of {n} inputs are also in test.json, so it is not used"
            task = replace(task, notes=(*task.notes, f"{unused} (first: {short_repr(common[0])})."))
    if not share:
        return task
    held = split_off([e.input for e in task.train], SHARE if isinstance(share, str) else share, task.name)
    where = str(source.label("train")) if source else f"task {task.name}"
    if not held:
        raise GainLoRAError(
            f"data.validation: {where} has one input, so none can be held out; add some, or set it to 0."
        )
    train, validation = _divided(task.train, held)
    return replace(task, train=train, validation=validation, validation_from=Path(where).name)


def _check_apart(examples: Any, task: Task, where: str, remedy: str) -> None:
    """Refuse validation examples that are test examples."""
    if common := common_inputs([e.input for e in examples], [e.input for e in task.test]):
        raise GainLoRAError(
            f"data.validation: dev: {where} shares {len(common)} of its {len(examples)} inputs with {FILES[1]} "
            f"({short_repr(common[0])}); no state may be chosen on the test set: {remedy}."
        )


def _divided(examples: tuple[Example, ...], held: set[int]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The examples that stay, and those held out."""
    return tuple(e for i, e in enumerate(examples) if i not in held), tuple(examples[i] for i in sorted(held))


def _remedy(folder: str) -> str:
    """How to get the data that belongs in `folder`."""
    if folder.startswith("data/embedded"):
        return "get it by `gainlora fetch embedded`"
    if folder.startswith("data/CL_Benchmark"):
        return "get it by `gainlora fetch cl-benchmark`, or from a copy by `gainlora fetch cl-benchmark --from DIR`"
    return "put one folder per task there, each with train.json and test.json"


def limited(task: Task, data: DataConfig) -> Task:
    """The task with `data.train_limit`, `data.validation_limit` and `data.test_limit` applied."""
    return replace(
        task,
        train=_subset(task.train, data.train_limit, f"{task.name}/train"),
        validation=_subset(task.validation, data.validation_limit, f"{task.name}/validation"),
        test=_subset(task.test, data.test_limit, f"{task.name}/test"),
    )


def kept_for_replay(task: Task, share: float) -> tuple[Example, ...]:
    """The training examples that `data.replay` keeps, at least one unless the share is 0."""
    return _subset(task.train, math.ceil(share * len(task.train)), f"{task.name}/replay")


def _subset(examples: tuple[Example, ...], limit: int | None, key: str) -> tuple[Example, ...]:
    if limit is None or limit >= len(examples):
        return examples
    order = list(range(len(examples)))
    random.Random(key).shuffle(order)  # seeded by text: the same on every machine
    return tuple(examples[i] for i in sorted(order[:limit]))


# ---- tasks that a run keeps -------------------------------------------------------------------------------------


def take_task(source: Source | Path | str, folder: Path, template: str, metric: str) -> Task:
    """Copy a task to `folder`, whose name is the task's.

    Args:
        source: a folder with train.json, test.json and perhaps dev.json in the benchmark's format, copied unchanged; or
            another source (`gainlora.data.formats`), which is converted.
        folder: created; must not exist.

    Raises:
        GainLoRAError: the source is missing, in no known format, or too small to hold examples out.
    """
    source = Source.of(source)
    task = read_task(source, template, metric, folder.name)  # an error names the given file, not its copy
    folder.mkdir(parents=True)
    if source.plain:
        for name in (*FILES, DEV):
            if (file := Path(source.place) / name).is_file():
                shutil.copyfile(file, folder / name)
    else:
        dev = source.read("dev")
        parts = {"train": task.train, "test": task.test, **({"dev": dev[0].examples} if dev else {})}
        for split, examples in parts.items():
            content = json.dumps(as_file(task, examples), ensure_ascii=False)
            (folder / f"{split}.json").write_text(content, encoding="utf-8")
    return replace(read_task(folder, template, metric), notes=task.notes)


def as_file(task: Task, examples: Sequence[Example], replay: Sequence[Example] = ()) -> dict[str, Any]:
    """Examples of a task in the benchmark's format, ready for JSON: as a run stores them.

    Args:
        replay: training examples that are kept beside them (`data.replay`).
    """
    parts = {"Instances": examples, **({"Replay": replay} if replay else {})}
    found = {part: [{"input": e.input, "output": list(e.references)} for e in kept] for part, kept in parts.items()}
    return {"Definition": [task.instruction], **found}


def judged(task: Task, entry: Mapping[str, Any]) -> Task:
    """The task, its answers compared as its entry in data.json says; by default as the benchmark does."""
    return replace(task, keep_punctuation=entry.get("keep_punctuation", False))


def read_kept_test(path: Path, template: str, metric: str, entry: Mapping[str, Any]) -> Task:
    """The task with its test examples, and those training examples that are kept for replay.

    Args:
        entry: of the task in data.json.

    Raises:
        GainLoRAError: the file is damaged.
    """
    remedy = "restore the run's folder from a copy"
    raw = read_json(path, absent=remedy, damaged=remedy)
    definition, examples, _ = benchmark_split(raw, path, allow_blank=False)
    again = {**raw, "Instances": raw.get("Replay")}
    replay = benchmark_split(again, path, allow_blank=False).examples if raw.get("Replay") else []
    known = {"template": template, "metric": metric, "sha256": entry["sha256"]}
    return judged(Task(path.stem, tuple(replay), tuple(examples), definition, **known), entry)
