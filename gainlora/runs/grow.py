"""One task more, or one less: the runs that a finished run grows and shrinks to.

Both share the present steps, take over this run's lock and continue its lineage (`gainlora.runs.lineage`).
"""

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gainlora import io
from gainlora.config import RunConfig
from gainlora.data.checks import data_entry, data_notes
from gainlora.data.formats import Source
from gainlora.data.tasks import hold_out, take_task
from gainlora.errors import GainLoRAError
from gainlora.model.base import load_tokenizer
from gainlora.runs import identity, lineage
from gainlora.runs.loading import locate_base
from gainlora.runs.reuse import OWN, link_steps, make_folder
from gainlora.runs.run import Run


def extended(run: Run, source: Source | Path | str, epochs: int | None = None) -> Run:
    """Create or open the run of these tasks plus one more, which shares all present steps. `run` is closed, and stays
    locked until the longer one is closed.

    Args:
        run: finished, or interrupted while it learned this task.
        source: a task's folder, one file, or another source (`gainlora.data.formats.Source`).
        epochs: of the new task; None: the run's `train.epochs`.

    Raises:
        GainLoRAError: the run is not finished, learns all tasks at once, or knows such a task; or the task, the
            base model, or a finished step is unusable. Nothing is created then.
    """
    source = Source.of(source)
    name = source.name
    # `latest` is the longer run already where learning it was interrupted: the same command resumes
    interrupted = run.finished < len(run.steps) and "extends" in run.described and name == run.tasks[-1]
    if not interrupted:
        _check_sequence(run)
        io.verify_checksums(run.task_folder(len(run.steps)))
    lineage.collect(run.root)
    c, base = run.config, run.described["base"]
    location = locate_base(run)
    tokenizer = load_tokenizer(location, identity.revision(location, base))
    with tempfile.TemporaryDirectory(dir=run.folder.parent, prefix=".taken-") as scratch:
        copy = Path(scratch) / name
        task = hold_out(take_task(source, copy, c.order.template, c.order.metric), copy, c.data)
        if name in c.order.tasks:
            if name == run.tasks[-1] and task.sha256 == run.recorded[name]["sha256"]:
                had = c.train.task_epochs.get(name, c.train.epochs)
                if epochs not in (None, had):
                    raise GainLoRAError(
                        f"train.epochs: {epochs}: {run.folder.name} has {name!r} with {had}; take it back first: "
                        f"gainlora forget {run.folder.name} --last"
                    )
                return run
            how = "was left out by" if name in run.described["skipped"] else "is known to"
            raise GainLoRAError(f"{source.place}: {name!r} {how} {run.folder.name}; give the task a new name.")
        changes = {"order.tasks": (*c.order.tasks, name), "subspace.horizon": run.horizon}
        changes |= {"model.dtype": run.described["dtype"]}
        changes |= {} if epochs is None else {f"train.task_epochs.{name}": epochs}
        config = c.with_options(changes)
        entry = data_entry(task, config, "", None, tokenizer)
        data = {**run.recorded, name: entry}
        ids = identity.step_ids(config, data, base, run.ids)
        described = _derived(run, config, [*run.tasks, name], ids)
        described |= {"extends": run.folder.name, **identity.code_version(config.method)}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        described["learned"] = [*run.described.get("learned", []), {"task": name, "at": now}]
        longer = _hand_over(run, described, data, [run.folder / OWN, Path(scratch)])
        longer.notices += data_notes({name: entry})
        return longer


def shortened(run: Run, before_removal: Callable[[Run], object] | None = None) -> Run:
    """Create or open the run of these tasks without the newest. It becomes the lineage's head, then `run` is removed;
    steps that other runs share stay with them. An unfinished extension is only removed.

    Args:
        run: finished, or an unfinished extension.
        before_removal: called with the shorter run before the head moves. If it fails or the process ends, the next
            call repeats everything. If the process ends after the head moved, the next call completes the removal
            and forgets no other task.

    Raises:
        GainLoRAError: the run is not finished, has one task, or learns all at once; or the last remaining task is
            damaged.
    """
    if run.already_shortened:
        return run
    before = run.described.get("extends")
    if before and run.finished < len(run.steps):
        run.close()
        io.remove(run.folder)
        return Run.open(run.folder.parent / before, run.root)
    _check_sequence(run)
    if len(run.steps) == 1:
        raise GainLoRAError(f"{run.folder}: knows one task, and a run knows at least one; delete the folder.")
    io.verify_checksums(run.task_folder(len(run.steps) - 1))
    c, last = run.config, run.tasks[-1]
    tasks = tuple(name for name in c.order.tasks if name != last)
    config = c.with_options({"order.tasks": tasks, "subspace.horizon": run.horizon})
    described = _derived(run, config, run.tasks[:-1], run.ids[:-1])
    described["learned"] = [entry for entry in run.described.get("learned", []) if entry["task"] != last]
    data = {name: entry for name, entry in run.recorded.items() if name != last}
    shorter = _hand_over(run, described, data, [run.folder / OWN])
    try:
        shorter.result()
        if before_removal:
            before_removal(shorter)
        lineage.move(run.lineage, shorter.folder.name, run.root, forgets=run.folder.name)
        lineage.collect(run.root)
    except BaseException:
        shorter.close()
        raise
    return shorter


def _derived(run: Run, config: RunConfig, tasks: list[str], ids: list[str]) -> dict[str, Any]:
    """Content of config.json for a run that shares these steps."""
    changes = {"run_id": identity.run_name(config, ids), "tasks": tasks, "ids": ids, "config": config.learning()}
    described = {**run.described, **changes, "steps": tasks, "lineage": run.lineage}
    return {key: value for key, value in described.items() if key not in ("extends", "resumed")}


def _hand_over(run: Run, described: dict[str, Any], data: dict[str, Any], own: list[Path]) -> Run:
    """Create or open a run with these steps, close `run` and transfer its lock."""
    other = Run(make_folder(run.root, described, data, own), run.lineage)
    try:
        link_steps(other, held=run.folder)
    except BaseException:
        other.close()
        raise
    other.take_locks(run)
    return other


def _check_sequence(run: Run) -> None:
    if run.config.rule.all_at_once:
        raise GainLoRAError(
            f"{run.folder}: {run.config.method} learns all tasks at once, so none can come or go alone."
        )
    if run.finished < len(run.steps):
        raise GainLoRAError(
            f"{run.folder}: {run.finished} of {len(run.steps)} tasks are learned; finish the run first: "
            f"gainlora learn {run.folder}"
        )
