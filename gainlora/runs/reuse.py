"""Run folders and the steps that they share: equal step ids, equal files, by hard link."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from gainlora import io
from gainlora.config import RunConfig
from gainlora.errors import GainLoRAError
from gainlora.runs import identity, lineage

if TYPE_CHECKING:
    from gainlora.runs.run import Run

OWN = "data"
"""Subfolder of a run for the files of tasks that are not among its order's."""


def make_folder(root: Path, described: dict[str, Any], data: dict[str, Any], own: Sequence[Path]) -> Path:
    """Create a run folder atomically, or return the existing one.

    Args:
        own: folders that contain the tasks that are not among the order's files.

    Raises:
        GainLoRAError: another run has this folder.
    """
    name = described["run_id"]
    folder = root / "runs" / name
    with FileLock(root / "runs" / ".new.lock"):
        if (folder / "config.json").is_file():
            if io.read_json(folder / "config.json").get("ids") != described["ids"]:
                raise GainLoRAError(f"{folder}: is another run of the same name; move it away.")
            return folder
        with io.whole_folder(folder) as part:  # in place of a folder without config.json, which is no run
            for task in (task for place in own if place.is_dir() for task in place.iterdir() if task.name in data):
                shutil.copytree(task, part / OWN / task.name)
                data = {**data, task.name: {**data[task.name], "path": f"runs/{name}/{OWN}/{task.name}"}}
            io.write_json(part / "data.json", data)
            io.write_json(part / "config.json", described)
            if described["lineage"] == name:
                lineage.begin(name, root)
    return folder


def link_steps(run: Run, held: Path | None = None) -> None:
    """Link a run's next steps from other runs that finished them; `run.notices` says which.

    Args:
        held: run folder that this process has already locked.
    """
    if run.config.rule.all_at_once or run.finished == len(run.steps):
        return
    for common, lender in _lenders(run):
        first = run.finished + 1
        with suppress(GainLoRAError), nullcontext() if lender == held else io.lock(lender / ".lock", lender.name):
            while (t := run.finished + 1) <= common and (step := lender / run.task_folder(t).name).is_dir():
                io.link_folder(step, run.task_folder(t))
                shutil.rmtree(run.partial_folder(t), ignore_errors=True)
        if run.finished >= first:
            run.notices.append(f"steps {first} to {run.finished} are those of runs/{lender.name}")


def _lenders(run: Run) -> list[tuple[int, Path]]:
    """Other runs with more shared first steps than are finished here, and their number; most first."""
    found = []
    for file in run.folder.parent.glob("*/config.json"):
        if file.parent == run.folder or file.parent.name.endswith(lineage.RERUN):
            continue
        with suppress(GainLoRAError):
            described = io.read_json(file)
            common = identity.common_steps(run.ids, described.get("ids", []))
            found += [(common, file.parent)] if common > run.finished else []
            if not common:
                _note_horizon(run, described)
    return sorted(found, key=lambda item: (-item[0], item[1]))


def _note_horizon(run: Run, described: dict[str, Any]) -> None:
    """Note a run that learned the same tasks with another H, if this one's H was not set explicitly."""
    if run.config.subspace.horizon or "ids" not in described or not identity.uses_horizon(run.config):
        return
    other = identity.horizon(RunConfig.from_stored(described["config"]), len(described["tasks"]))
    config = run.config.with_options({"subspace.horizon": other})
    ids = identity.step_ids(config, run.recorded, run.described["base"])
    if common := identity.common_steps(ids, described["ids"]):
        run.notices.append(
            f"runs/{described['run_id']} has learned the first {common} of these tasks with H = {other}, and this "
            f"order has H = {run.horizon}; to take them from there, set subspace.horizon to {other}"
        )
