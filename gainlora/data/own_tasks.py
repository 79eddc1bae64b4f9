"""Tasks stored in a run's own folder: tasks beyond its order, and the test examples of all tasks.

    data/<task>/train.json, test.json      an added task: copied files, or one file split in two
    task_02_<task>/test/<task>.json        every task: its test examples, in the same format

So a run needs no file outside its folder to learn one more task and to evaluate all earlier ones.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gainlora.data.formats import Source
from gainlora.data.instances import Example, benchmark_split
from gainlora.data.tasks import DEV, FILES, Task, read_task
from gainlora.io import read_json


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


def read_kept_test(path: Path, template: str, metric: str, sha256: str) -> Task:
    """The task with its test examples, and those training examples that are kept for replay.

    Raises:
        GainLoRAError: the file is damaged.
    """
    remedy = "restore the run's folder from a copy"
    raw = read_json(path, absent=remedy, damaged=remedy)
    definition, examples, _ = benchmark_split(raw, path, allow_blank=False)
    again = {**raw, "Instances": raw.get("Replay")}
    replay = benchmark_split(again, path, allow_blank=False).examples if raw.get("Replay") else []
    return Task(path.stem, tuple(replay), tuple(examples), definition, template=template, metric=metric, sha256=sha256)
