"""Where a run lives: its folder's name, its description, and who works in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from gainlora.config import Config
from gainlora.data.sources import dvc_hash, resolve_model
from gainlora.data.tasks import Task, load_order
from gainlora.errors import Busy, GainLoRAError
from gainlora.learning.files import read_json, write_json
from gainlora.model.base import pick_device, pick_dtype, stored_weights, weights_digest

LEARNING_CODE = ("config.py", "plain.py", "reading.py", "distributed.py", "data", "model", "rules", "learning")
"""What decides the result of a run, inside the package."""
ALL_TASKS = "all_tasks"
"""Name of the only step of a method that learns all tasks at once."""
NEXT = "next.json"
"""In a run that is about to know one task more or less (`gainlora.learning.grow`): its config.json to be."""
FORGETTING = "forgetting.json"
"""In a run that forgets a task (there, too): which one, and its folder's name."""
LEARNED = "learned"
"""In config.json, of tasks beyond the order: which, when, by which code, and the option `horizon` as it was before."""
OWN = "data"
"""Folder of the tasks that a run learned beyond its order's."""
PACKAGES = ("gainlora", "torch", "transformers", "accelerate", "datasets", "safetensors", "rouge-score")


def run_folder(config: Config, root: Path = Path(".")) -> Path:
    """runs/<order>-<method>-<model>-<seed>-<digest>; the digest covers all that decides the result."""
    data = {task.name: task.sha256 for task in load_order(config.order, config.data, root)[0]}
    parts = [config.to_dict(), _dtype(config), code_digest(), data, stored_base(config, root)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
    model = re.sub("[^A-Za-z0-9_.-]", "_", Path(config.model.name).name)
    return root.resolve() / "runs" / f"{config.order.name}-{config.method}-{model}-{config.seed}-{digest}"


def describe(config: Config, root: Path = Path("."), own: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json (but for its run_id) and data.json say of a run that is made here and now.

    Args:
        own: folder of tasks that are not among the order's (`load_order`).

    Raises:
        GainLoRAError: data are not there.
    """
    tasks, skipped = load_order(config.order, config.data, root, own)
    place = config.order.data
    data = {t.name: data_entry(t, f"{place}/{t.name}", dvc_hash(Path(place) / t.name, root)) for t in tasks}
    described = {
        "order": config.order.name,
        "method": config.method,
        "model": config.model.name,
        "seed": config.seed,
        "tasks": [task.name for task in tasks],
        "steps": [ALL_TASKS] if config.rule.all_at_once else [task.name for task in tasks],
        "skipped": skipped,
        "config": config.to_dict(),
        "dtype": _dtype(config),
        "base": stored_base(config, root),
        **environment(),
    }
    return described, data


def data_entry(task: Task, path: str, dvc: str | None) -> dict[str, Any]:
    """What data.json says of a task."""
    counts = {"train": len(task.train), "test": len(task.test)}
    return {"path": path, "dvc": dvc, "sha256": task.sha256, "definition": task.definition, **counts}


def stored_base(config: Config, root: Path) -> str | None:
    """What tells the base model's weights from others; None for a hub id, which may not be here yet."""
    location = Path(resolve_model(config.model.location, root))
    return weights_digest(stored_weights(location)) if location.is_dir() else None


def check_base(folder: Path, recorded: str | None, config: Config, root: Path) -> None:
    """Refuse to go on with a run whose base model's weights were replaced; None: it does not name them."""
    if recorded not in (None, stored_base(config, root)):
        raise GainLoRAError(
            f"{folder}: was begun on a base model with other weights than {config.model.location} has; put that one "
            "back, or begin a new run."
        )


def environment() -> dict[str, Any]:
    """What learns here and now, as config.json names it."""
    versions = {name: version(name) for name in PACKAGES}
    return {"device": pick_device().type, "code": code_digest(), "versions": versions}


def make_run(config: Config, root: Path = Path("."), name: str | None = None, own: Path | None = None) -> Path:
    """Make the run folder with config.json and data.json, or find it again.

    Args:
        name: of the folder under runs/; None: `run_folder`'s.
        own: folder of tasks that are not among the order's; copied.

    Raises:
        GainLoRAError: data or model are not there, or the run has learned or forgotten tasks since it was made.
    """
    resolve_model(config.model.location, root)
    folder = root.resolve() / "runs" / name if name else run_folder(config, root)
    if (folder / "config.json").exists():
        _check_unchanged(folder, config, root)
        return folder
    described, data = describe(config, root, own)
    folder.mkdir(parents=True, exist_ok=True)
    if own and own.is_dir():
        shutil.copytree(own, folder / OWN, dirs_exist_ok=True)
    write_json(folder / "data.json", data)
    write_json(folder / "config.json", {"run_id": folder.name, **described})  # last: with it the folder is a run
    return folder


def _check_unchanged(folder: Path, config: Config, root: Path) -> None:
    """Refuse a run whose tasks are not those of `config` any more: its results would pass for the order's."""
    where = f"runs/{folder.name}"
    if (folder / NEXT).exists():
        raise GainLoRAError(
            f"{where}: is about to know other tasks than its order's; give the same `gainlora learn` or `gainlora "
            "forget` again to finish that, or choose another seed."
        )
    described = read_json(folder / "config.json", "config", "tasks")
    found, asked = described["config"], config.to_dict()
    for options in (found, asked):  # what a task learned later has fixed is the default of as many tasks
        options["subspace"]["horizon"] = options["subspace"]["horizon"] or len(described["tasks"])
    if found != asked or _otherwise_learned(folder, described.get(LEARNED, []), config, root):
        there = ", ".join(described["tasks"])
        raise GainLoRAError(
            f"{where}: has learned or forgotten tasks since it was made, it knows {there}; `gainlora forget {where} "
            f"--last` and `gainlora learn {where} --task TASK` lead back, or choose another seed."
        )


def _otherwise_learned(folder: Path, learned: list[dict[str, Any]], config: Config, root: Path) -> bool:
    """Whether tasks that were learned later are others than the order's of the same names, or by other code."""
    if not learned:
        return False
    data = read_json(folder / "data.json")
    tasks, _ = load_order(config.order, config.data, root)
    same = all(task.sha256 == data[task.name]["sha256"] for task in tasks)
    return not same or any(entry["code"] != code_digest() for entry in learned)


def hold(folder: Path, what: str = "this run") -> IO[str]:
    """Hold a run for this process: two would mix their work. The lock ends with the process, however it ends.

    Raises:
        Busy: another process holds it; the message says which one, where and since when.
    """
    handle = (folder / ".lock").open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise Busy(
            f"{folder.name}: {what} is in progress already ({handle.read().strip() or 'just started'}); wait for "
            "it, or stop it and give the same command again: it continues where it stopped."
        ) from None
    handle.seek(0)
    handle.truncate()
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    handle.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
    handle.flush()
    return handle


def code_digest() -> str:
    """SHA-256 of the package's source that decides what is learned."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for part in LEARNING_CODE:
        path = package / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(str(file.relative_to(package)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _dtype(config: Config) -> str:
    return str(pick_dtype(config.model.dtype, pick_device())).removeprefix("torch.")
