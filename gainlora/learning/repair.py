"""A run folder with damage: back to its last good task, from where the run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from gainlora.config import is_name
from gainlora.errors import GainLoRAError
from gainlora.learning.files import DAMAGED, read_json, verify_checksums
from gainlora.learning.run_folder import FORGETTING, NEXT, hold


def repair(folder: Path, from_task: int | None = None) -> tuple[int, list[str]]:
    """Remove task `from_task` (1-based) and all that was learned on top of it; None: from the first damaged one.

    Returns:
        Number of tasks that stay, and names of the task folders that went; none where nothing is damaged.

    Raises:
        GainLoRAError: no run folder, no such task in it, or another process works in it.
    """
    described = read_json(folder / "config.json")
    steps = described.get("steps") or described.get("tasks")  # folders of version 0.1.0 name tasks only
    if not isinstance(steps, list) or not all(isinstance(name, str) and is_name(name) for name in steps):
        raise GainLoRAError(f"{folder / 'config.json'}: names no tasks; {DAMAGED}.")
    with hold(folder):
        folders = [folder / f"task_{t:02d}_{name}" for t, name in enumerate(steps, start=1)]
        partial = {path: path.with_name(f".{path.name}.partial") for path in folders}
        there = [path for path in folders if path.is_dir() or partial[path].is_dir()]
        if from_task is None:
            from_task = next((t for t, path in enumerate(folders, start=1) if _damaged(path)), len(folders) + 1)
        elif not 1 <= from_task <= len(there):
            known = f"1 to {len(there)}" if there else "none"
            raise GainLoRAError(f"--from-task: {from_task}: this run has {known} of its {len(steps)} tasks.")
        gone = [path for path in folders[from_task - 1 :] if path in there]
        if gone:
            for name in ("result.json", NEXT, FORGETTING):
                (folder / name).unlink(missing_ok=True)
        for path in reversed(gone):  # the newest first: killed here, what is left is a run of fewer tasks
            shutil.rmtree(partial[path], ignore_errors=True)
            shutil.rmtree(path, ignore_errors=True)
        return sum(path.is_dir() for path in folders), [path.name for path in gone]


def _damaged(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        verify_checksums(folder)
    except GainLoRAError:
        return True
    return False
