"""Tasks that a run keeps in its own folder: one that it learns beyond its order, and what it is tested on.

    data/<task>/train.json, test.json      of a task that was added: as they were given, or one file split in two
    task_02_<task>/test/<task>.json        of every task: the test examples it is asked, in the same format

So a run needs no file outside its folder to learn one more task and to ask all earlier ones again.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from gainlora.data.tasks import FILES, REMEDY, Task, parse_split, read_task
from gainlora.errors import GainLoRAError
from gainlora.reading import parse_json, read_bytes

SHARE = 5
"""One in so many inputs of a single file is held out to test."""


def task_name(source: Path) -> str:
    """The name that a task's folder or file gives it."""
    path = source.absolute()
    return path.stem if path.suffix == ".json" else path.name


def take_task(source: Path, folder: Path, template: str, metric: str) -> Task:
    """Copy a task to `folder`, whose name is the task's.

    Args:
        source: a folder with train.json and test.json, copied as they are; or one file in their format. Of a file, one
            in `SHARE` of its distinct inputs is held out to test, chosen by the task's name alone.
        folder: made; must not be there yet.

    Raises:
        GainLoRAError: the source is not there, not in the format, or too small to hold anything out.
    """
    folder.mkdir(parents=True)
    if source.suffix == ".json":
        for name, part in zip(FILES, _held_out(source), strict=True):
            (folder / name).write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    else:
        read_task(source, template, metric)  # an error names the given file, not its copy
        for name in FILES:
            shutil.copyfile(source / name, folder / name)
    return read_task(folder, template, metric)


def _held_out(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What train.json and test.json hold of one file; equal inputs stay on one side."""
    content = read_bytes(source, "give a task's folder, or one file of its instances", REMEDY)
    _, examples, _ = parse_split(content, source)
    inputs = list(dict.fromkeys(example.input for example in examples))
    if len(inputs) < SHARE:
        raise GainLoRAError(
            f"{source}: has {len(inputs)} different inputs, too few to hold one in {SHARE} out to test; add some, or "
            "give a folder with train.json and test.json."
        )
    asked = set(random.Random(f"{task_name(source)}/test").sample(inputs, len(inputs) // SHARE))
    raw = parse_json(content, source, REMEDY)
    sides: tuple[list[Any], list[Any]] = ([], [])
    for example, instance in zip(examples, raw["Instances"], strict=True):
        sides[example.input in asked].append(instance)
    head = {"Definition": raw["Definition"]} if "Definition" in raw else {}
    return {**head, "Instances": sides[0]}, {**head, "Instances": sides[1]}


def kept_test(task: Task) -> dict[str, Any]:
    """What a run keeps of a task to ask it again, ready for JSON."""
    instances = [{"input": example.input, "output": list(example.references)} for example in task.test]
    return {"Definition": [task.definition], "Instances": instances}


def read_kept_test(path: Path, template: str, metric: str, sha256: str) -> Task:
    """The task without training examples.

    Raises:
        GainLoRAError: the file is damaged.
    """
    remedy = "restore the run's folder from a copy"
    definition, examples, _ = parse_split(read_bytes(path, remedy, remedy), path)
    return Task(path.stem, template, metric, definition, (), tuple(examples), sha256)
