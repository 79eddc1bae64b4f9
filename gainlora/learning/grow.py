"""A finished run learns one more task, or forgets its newest one.

    begin      checks; data/<task>/ and next.json, the config.json to be
    the steps  as of any task: .task_05_<task>.partial/, at its end task_05_<task>/
    settle     result.json; next.json becomes config.json: from now on the run knows the task
    drop       takes all of that back
    forget     forgetting.json until all is done; result.json and config.json without the newest task; its folders go

Until config.json is replaced every reader finds the run as it was, whole; what a kill leaves beside it is removed by
the next `begin` or `forget`. Nothing of a task depends on when it is learned: seeds come from (seed, index), and the
horizon of the thresholds stays the run's. So the result is that of an order which had the task from the start, with the
same `subspace.horizon`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gainlora.config import from_dict
from gainlora.data.own_tasks import take_task, task_name
from gainlora.data.sources import resolve_model
from gainlora.data.tasks import Task, limited
from gainlora.errors import Busy, GainLoRAError
from gainlora.learning.files import read_json, verify_checksums, write_json
from gainlora.learning.run_folder import FORGETTING, LEARNED, NEXT, OWN, data_entry, environment
from gainlora.learning.stream import Stream


def begin(folder: Path, source: Path | None) -> Stream:
    """Open a finished run to learn the task in `source`; the same one, begun before, goes on or is there already.

    Args:
        source: a task's folder, or one file (`gainlora.data.own_tasks.take_task`); None: no other task than those
            that the run lacks, after `repair` or where it was stopped.

    Returns:
        The run's Stream; its last step is the new task.

    Raises:
        GainLoRAError: the run is not finished, learns all tasks at once, knows such a task, or is in progress; the
            task, the base model or test examples of an earlier task are not there or not usable. The run is as it was.
    """
    stream = _opened(folder)
    if forgotten := _forgetting(stream):
        raise GainLoRAError(f"{folder}: is forgetting {forgotten[0]!r}; finish that: gainlora forget {folder} --last.")
    if source is None:
        _check_parts(stream)
        return stream
    name = task_name(source)
    going_on = _growing(stream)
    if going_on and stream.tasks[-1] != name:
        either = f"give that one again to finish it, or drop it first: gainlora forget {folder} --last"
        raise Busy(f"{folder}: is learning {stream.tasks[-1]!r}; {either}.")
    same = going_on or _learned(stream)[-1:] == [name]
    if not same:
        _check(stream, folder, name)
    with _copied(stream, source, name) as (task, copy):
        if not same:
            _install(stream, task, copy)
        elif task.sha256 != stream.recorded[name]["sha256"]:
            remedy = f"give it a new name, or take that one back first: gainlora forget {folder} --last"
            raise GainLoRAError(f"{source}: {folder} knows another task {name!r}; {remedy}.")
    return stream


def differences(stream: Stream) -> list[str]:
    """What learned the run and what is learning now, where they differ: code, versions, device."""
    then, now = read_json(stream.folder / "config.json", "code", "device", "versions"), environment()
    pairs = {key: (then[key], now[key]) for key in ("code", "device")}
    pairs |= {name: (then["versions"].get(name), version) for name, version in now["versions"].items()}
    return [f"{name} {str(old)[:12]} then, {str(new)[:12]} now" for name, (old, new) in pairs.items() if old != new]


def settle(stream: Stream) -> dict[str, Any]:
    """Make the learned task part of the run; the run's result."""
    result = stream.result()
    with contextlib.suppress(FileNotFoundError):  # settled before
        (stream.folder / NEXT).replace(stream.folder / "config.json")
    return result


def drop(stream: Stream) -> None:
    """Take back what `begin` and the steps after it made; nothing to do once it is settled."""
    if _growing(stream):
        (stream.folder / NEXT).unlink()
        _prune(stream)


def newest(folder: Path) -> tuple[str, str | None]:
    """The task that `forget` takes from a run: its name, and its folder's; None while it is only about to be learned.
    Where a `forget` was stopped, its task.

    Raises:
        GainLoRAError: the run is not finished, has one task, or learned all at once; or the last task that stays is
            damaged.
    """
    stream = _opened(folder)
    if forgotten := _forgetting(stream):
        return forgotten
    if _growing(stream):
        return stream.tasks[-1], None
    _check_sequence(stream, folder)
    last = len(stream.steps)
    if last == 1:
        raise GainLoRAError(f"{folder}: knows one task, and a run knows at least one; delete the folder.")
    verify_checksums(stream.task_folder(last - 1))
    return stream.tasks[-1], stream.task_folder(last).name


def forget(folder: Path, record: Callable[[], object] = lambda: None) -> str:
    """Take the newest task from a finished run, or the one that it is about to learn; the task's name.

    Args:
        record: what is to be done with the run as it is then. If it fails or the process ends before it has, the next
            `forget` does that and takes no other task.

    Raises:
        GainLoRAError: as `newest`.
    """
    (name, learned), stream = newest(folder), _opened(folder)
    if learned is None:
        drop(stream)
        return name
    if not _forgetting(stream):
        write_json(stream.folder / FORGETTING, {"task": name, "folder": learned})
    if name in stream.tasks:
        _check_sequence(stream, folder)
        write_json(stream.folder / NEXT, _shortened(stream))
        _finish_forgetting(stream)
    else:  # stopped when its folders were to go, or later
        _prune(stream)
    record()
    (stream.folder / FORGETTING).unlink()
    return name


def _opened(folder: Path) -> Stream:
    stream = Stream.open(folder)
    if (stream.folder / NEXT).exists() and not _growing(stream):  # a `forget` that was stopped
        _finish_forgetting(stream)
    return stream


def _growing(stream: Stream) -> bool:
    """Whether a task was begun that is not settled."""
    if not (stream.folder / NEXT).exists():
        return False
    known, to_be = (read_json(stream.folder / name, "tasks")["tasks"] for name in ("config.json", NEXT))
    return len(to_be) > len(known)


def _forgetting(stream: Stream) -> tuple[str, str] | None:
    """The task that a stopped `forget` took or was about to take, and its folder's name."""
    if not (stream.folder / FORGETTING).exists():
        return None
    task = read_json(stream.folder / FORGETTING, "task", "folder")
    return task["task"], task["folder"]


def _learned(stream: Stream) -> list[str]:
    """Tasks beyond the run's order."""
    return [entry["task"] for entry in read_json(stream.folder / "config.json").get(LEARNED, [])]


def _finish_forgetting(stream: Stream) -> None:
    stream.read()
    settle(stream)
    _prune(stream)


def _check(stream: Stream, folder: Path, name: str) -> None:
    """Refuse what could not be learned before anything is written."""
    _check_sequence(stream, folder)
    if name in stream.config.order.tasks:
        how = "left out" if name in stream.skipped else "learned"
        raise GainLoRAError(f"--task: {name!r}: was {how} by {folder}; give the task's folder or file a new name.")
    from_dict(_extended(stream, name)["config"])  # is it a name?
    _check_parts(stream)


def _check_parts(stream: Stream) -> None:
    """Refuse what a new task cannot be learned on."""
    if stream.finished:
        verify_checksums(stream.task_folder(stream.finished))
    resolve_model(stream.config.model.location, stream.root)
    _ = stream.data  # what earlier tasks are tested on


def _check_sequence(stream: Stream, folder: Path) -> None:
    if stream.config.rule.all_at_once:
        raise GainLoRAError(f"{folder}: {stream.config.method} learns all tasks at once, so none can come or go alone.")
    if stream.finished < len(stream.steps):
        raise GainLoRAError(
            f"{folder}: {stream.finished} of {len(stream.steps)} tasks are learned; finish the run first: "
            f"gainlora learn {folder}"
        )


def _install(stream: Stream, task: Task, copy: Path) -> None:
    """Put the task into the run folder, and say in next.json what is to be."""
    name, place = task.name, stream.folder / OWN / task.name
    entry = data_entry(limited(task, stream.config.data), f"runs/{stream.folder.name}/{OWN}/{name}", None)
    described = _extended(stream, name)
    try:
        _prune(stream)
        place.parent.mkdir(exist_ok=True)
        copy.rename(place)
        write_json(stream.folder / "data.json", {**stream.recorded, name: entry})
        write_json(stream.folder / NEXT, described)
    except BaseException:
        _prune(stream)
        raise
    stream.read()


def _extended(stream: Stream, name: str) -> dict[str, Any]:
    """config.json with one more task."""
    described = read_json(stream.folder / "config.json")
    config, now = described["config"], datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"task": name, "at": now, "horizon": config["subspace"]["horizon"], **environment()}
    config["subspace"]["horizon"] = stream.horizon
    for names in (config["order"]["tasks"], described["tasks"], described["steps"]):
        names.append(name)
    return {**described, LEARNED: [*described.get(LEARNED, []), entry]}


def _shortened(stream: Stream) -> dict[str, Any]:
    """config.json without the newest task."""
    described = read_json(stream.folder / "config.json")
    config, learned = described["config"], described.pop(LEARNED, [])
    for names in (config["order"]["tasks"], described["tasks"], described["steps"]):
        names.remove(stream.tasks[-1])
    # a task of the order itself: the horizon was made for it, too
    config["subspace"]["horizon"] = learned.pop()["horizon"] if learned else stream.horizon
    return {**described, **({LEARNED: learned} if learned else {})}


@contextlib.contextmanager
def _copied(stream: Stream, source: Path, name: str) -> Iterator[tuple[Task, Path]]:
    """The task, read from a copy inside the run folder; the copy goes unless it is moved to its place."""
    copy = stream.folder / ".taken" / name
    shutil.rmtree(copy.parent, ignore_errors=True)
    try:
        yield take_task(source, copy, stream.config.order.template, stream.config.order.metric), copy
    finally:
        shutil.rmtree(copy.parent, ignore_errors=True)


def _prune(stream: Stream) -> None:
    """Remove what belongs to no task of the run: of an addition that came to nothing, or of a forgotten task."""
    stream.read()
    folders = {stream.task_folder(t).name for t in range(1, len(stream.steps) + 1)}
    for folder in [*stream.folder.glob("task_*"), *stream.folder.glob(".task_*.partial")]:
        if folder.name.removeprefix(".").removesuffix(".partial") not in folders:
            hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.partial")
            if hidden != folder:
                shutil.rmtree(hidden, ignore_errors=True)
                folder.rename(hidden)  # no reader sees half of it
            shutil.rmtree(hidden)
    for folder in (stream.folder / OWN).glob("*"):
        if folder.name not in stream.tasks:
            shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        (stream.folder / OWN).rmdir()  # when it is empty
    if read_json(stream.folder / "data.json") != stream.recorded:
        write_json(stream.folder / "data.json", stream.recorded)
