"""Task files -> validated examples and prompts.

A task is a folder with train.json and test.json in the format of the CL benchmark (O-LoRA, SAPT, GainLoRA):

    {"Definition": ["..."], "Instances": [{"input": "...", "output": "..." or ["...", ...]}, ...], ...}

`Definition` may be a list (its first entry counts), a string, empty or absent; other keys are ignored.
dev.json is a copy of test.json in the benchmark and never read, nor is labels.json: the benchmark's own answers are not
all in it (qqp declares True and False and answers yes and no). All text is stripped at both ends, since
some inputs of the benchmark end in a line break and some do not: exactly one stands before "Output: ".
Prompt templates: the authors' (GainLoRA, NeurIPS 2025).
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gainlora.config import DataConfig, OrderConfig
from gainlora.errors import GainLoRAError
from gainlora.reading import parse_json, read_bytes, shown

FILES = ("train.json", "test.json")
"""What a complete task folder holds."""
REMEDY = "correct it or fetch it again"


@dataclass(frozen=True)
class Example:
    """One instance: the input text and its correct answers, all stripped, none empty."""

    input: str
    references: tuple[str, ...]
    """At least one; training uses the first."""


@dataclass(frozen=True)
class Task:
    """One task of a sequence."""

    name: str
    template: str
    metric: str
    definition: str
    """The instruction, "" where the files have none."""
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    sha256: str
    """Of the contents of train.json and test.json."""
    blank: int = 0
    """Training instances left out because their reference list holds only blank text (6 in one benchmark task)."""

    def prompt(self, example: Example) -> str:
        """The text the model completes."""
        return fill_template(self.template, self.definition, example.input)


def fill_template(template: str, definition: str, text: str) -> str:
    """The prompt for an input text (stripped) of a task. Built by concatenation: braces in the data are text."""
    if template == "superni":
        head = f"Definition: {definition}\n\n" if definition else ""
        return head + "Now complete the following example -\nInput: " + text + "\nOutput: "
    head = f"{definition}\n" if definition else ""
    return head + text + "\nOutput: "


def read_task(folder: Path, template: str, metric: str) -> Task:
    """Read one complete task folder; the task is named after it.

    Args:
        folder: holds train.json and test.json.
        template: `superni` or `long_sequence`.
        metric: `rouge_l` or `exact_match`, carried along.

    Raises:
        GainLoRAError: a file is missing, unreadable or not in the format; names the file, the instance's
            number (from 0) and the key.
    """
    if template not in ("superni", "long_sequence"):
        raise GainLoRAError(f"template: {template!r} is not one of superni, long_sequence.")
    digest = hashlib.sha256()
    definitions: list[str] = []
    splits: list[list[Example]] = []
    blank = 0
    for name in FILES:
        content = read_bytes(folder / name, "a task folder holds train.json and test.json", REMEDY)
        digest.update(hashlib.sha256(content).digest())
        definition, examples, left_out = parse_split(content, folder / name, allow_blank=name == "train.json")
        definitions.append(definition)
        splits.append(examples)
        blank += left_out
    if definitions[0] != definitions[1]:
        raise GainLoRAError(f"{folder / FILES[1]}: 'Definition' differs from train.json's; give both the same text.")
    train, test = splits
    return Task(folder.name, template, metric, definitions[0], tuple(train), tuple(test), digest.hexdigest(), blank)


def parse_split(content: bytes, path: Path, allow_blank: bool = False) -> tuple[str, list[Example], int]:
    """One file's definition and examples, and how many were left out as blank (`allow_blank`; refused otherwise).

    Raises:
        GainLoRAError: the content is not in the format.
    """
    raw = _parse(content, path)
    return _definition(raw, path), *_examples(raw, path, allow_blank)


def load_order(
    order: OrderConfig, data: DataConfig, root: Path = Path("."), own: Path | None = None
) -> tuple[list[Task], list[str]]:
    """Read the tasks of an order, in its sequence, with `data.train_limit` and `data.test_limit` applied.

    A limit takes a random subset that depends on the task's name and the split alone, in file order, and a
    smaller limit's subset lies inside a larger one's: every seed and method sees the same examples.

    Args:
        own: folder of tasks that a run learned beyond the order's; one that is there is read from there.

    Returns:
        The tasks, and the names of those skipped (only with `data.skip_incomplete`).

    Raises:
        GainLoRAError: the order's folder or some task's files are missing, or a file is invalid.
    """
    base = root / order.data
    places = {name: own / name if own and (own / name).is_dir() else base / name for name in order.tasks}
    if not base.is_dir() and any(place.parent == base for place in places.values()):
        raise GainLoRAError(f"orders.{order.name}.data: {order.data}: no such folder; {_remedy(order.data)}.")
    missing = {
        name: absent for name, place in places.items() if (absent := [f for f in FILES if not (place / f).is_file()])
    }
    if missing and not data.skip_incomplete:
        listing = "; ".join(f"{name} lacks {' and '.join(absent)}" for name, absent in missing.items())
        raise GainLoRAError(
            f"orders.{order.name}: incomplete in {order.data}: {listing}. Complete the folder "
            f"({_remedy(order.data)}), or run without these tasks: --skip-incomplete (data.skip_incomplete: true)."
        )
    complete = [name for name in order.tasks if name not in missing]
    if not complete:
        raise GainLoRAError(f"orders.{order.name}: no complete task in {order.data}; {_remedy(order.data)}.")
    tasks = [limited(read_task(places[name], order.template, order.metric), data) for name in complete]
    return tasks, list(missing)


def _remedy(folder: str) -> str:
    """How to get the data that belongs in `folder`."""
    if folder.startswith("data/embedded"):
        return "get it by `gainlora fetch embedded`"
    if folder.startswith("data/CL_Benchmark"):
        return "get it by `gainlora fetch cl-benchmark`, or from a copy by `gainlora fetch cl-benchmark --from DIR`"
    return "put one folder per task there, each with train.json and test.json"


def limited(task: Task, data: DataConfig) -> Task:
    """The task with `data.train_limit` and `data.test_limit` applied."""
    return replace(
        task,
        train=_subset(task.train, data.train_limit, f"{task.name}/train"),
        test=_subset(task.test, data.test_limit, f"{task.name}/test"),
    )


def _subset(examples: tuple[Example, ...], limit: int | None, key: str) -> tuple[Example, ...]:
    if limit is None or limit >= len(examples):
        return examples
    order = list(range(len(examples)))
    random.Random(key).shuffle(order)  # seeded by text: the same on every machine
    return tuple(examples[i] for i in sorted(order[:limit]))


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    raw = parse_json(content, path, REMEDY)
    if not isinstance(raw, dict):
        raise GainLoRAError(f"{path}: holds {_kind(raw)}; expected an object with 'Definition' and 'Instances'.")
    return raw


def _definition(raw: dict[str, Any], path: Path) -> str:
    value = raw.get("Definition", [])
    if isinstance(value, list):
        value = value[0] if value else ""
    return _text(value, f"{path}: 'Definition'", "give text or a list of texts")


def _examples(raw: dict[str, Any], path: Path, allow_blank: bool) -> tuple[list[Example], int]:
    """The file's examples, and how many were left out as blank (allow_blank; refused otherwise)."""
    instances = raw.get("Instances")
    if not isinstance(instances, list):
        found = f"is {_kind(instances)}" if "Instances" in raw else f"is missing (keys: {', '.join(raw) or 'none'})"
        raise GainLoRAError(f"{path}: 'Instances' {found}; give a list of objects with 'input' and 'output'.")
    examples = []
    for number, instance in enumerate(instances):
        where = f"{path}: instance {number}"
        if not isinstance(instance, dict):
            raise GainLoRAError(f"{where}: is {_kind(instance)}; give an object with 'input' and 'output'.")
        for key in ("input", "output"):
            if key not in instance:
                keys = ", ".join(instance) or "none"
                raise GainLoRAError(f"{where}: key {key!r} is missing (keys: {keys}); add it.")
        text = _text(instance["input"], f"{where}: 'input'", "give text")
        if not text:
            raise GainLoRAError(f"{where}: 'input' is empty; give it text or remove the instance.")
        references = _references(instance["output"], where)
        if references:
            examples.append(Example(text, references))
        elif not allow_blank:
            raise GainLoRAError(f"{where}: 'output' has only blank text; give an answer or remove the instance.")
    if not examples:
        raise GainLoRAError(f"{path}: 'Instances' has no usable instance; give at least one with input and output.")
    return examples, len(instances) - len(examples)


def _references(output: Any, where: str) -> tuple[str, ...]:
    """The answers without blank ones; () for a list of nothing but blanks."""
    if isinstance(output, list):
        if not output:
            raise GainLoRAError(f"{where}: 'output' is an empty list; give at least one answer.")
        texts = [_text(o, f"{where}: 'output' entry {i}", "give text") for i, o in enumerate(output)]
        return tuple(t for t in texts if t)
    text = _text(output, f"{where}: 'output'", "give text or a list of texts")
    if not text:
        raise GainLoRAError(f"{where}: 'output' is empty; give an answer or remove the instance.")
    return (text,)


def _text(value: Any, where: str, remedy: str) -> str:
    if not isinstance(value, str):
        raise GainLoRAError(f"{where} is {_kind(value)}; {remedy}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a lone \\ud800 is legal JSON, yet no tokenizer takes it
        raise GainLoRAError(f"{where} holds half a surrogate pair, which is no character; correct the text.") from None
    return value.strip()


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value)) or f"the number {shown(value)}"
