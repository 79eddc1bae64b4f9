"""Repairs a damaged run: restores damaged steps from other runs that share them, else drops to the last good step."""

import shutil
from pathlib import Path
from typing import NamedTuple

from gainlora.errors import GainLoRAError
from gainlora.io import is_whole, link_folder, lock, read_json, remove
from gainlora.sections import is_name

DAMAGED = "restore it from a copy, or remove the folder and run the order again"


class Repaired(NamedTuple):
    """Outcome of `repair`; names of step folders."""

    kept: int
    """Number of good steps now."""
    dropped: list[str]
    """Removed steps, to be learned again."""
    mended: list[str]
    """Steps replaced by another run's copy."""


def repair(folder: Path, from_task: int | None = None) -> Repaired:
    """Replace damaged steps by intact copies of the same steps (equal ids) in other runs; without a copy, remove the
    step and all later ones. Files that other runs share are never written to.

    Args:
        from_task: remove this step (1-based) and all later ones, damaged or not.

    Raises:
        GainLoRAError: no run folder, no such step in it, or another process uses it.
    """
    described = read_json(folder / "config.json")
    steps = described.get("steps") or described.get("tasks")  # folders of version 0.1.0 name tasks only
    if not isinstance(steps, list) or not all(isinstance(name, str) and is_name(name) for name in steps):
        raise GainLoRAError(f"{folder / 'config.json'}: names no tasks; {DAMAGED}.")
    with lock(folder / ".lock", f"runs/{folder.name}: this run"):
        folders = [folder / f"task_{t:02d}_{name}" for t, name in enumerate(steps, start=1)]
        partial = {path: path.with_name(f".{path.name}.partial") for path in folders}
        there = [path for path in folders if path.is_dir() or partial[path].is_dir()]
        mended: list[Path] = []
        if from_task is None:
            damaged = [path for path in folders if path.is_dir() and not is_whole(path)]
            mended = [path for path in damaged if _mend(path, described)]
            left = [t for t, path in enumerate(folders, start=1) if path in damaged and path not in mended]
            from_task = min(left, default=len(folders) + 1)
        elif not 1 <= from_task <= len(there):
            known = f"1 to {len(there)}" if there else "none"
            raise GainLoRAError(f"--from-task: {from_task}: this run has {known} of its {len(steps)} tasks.")
        gone = [path for path in folders[from_task - 1 :] if path in there]
        if gone:
            (folder / "result.json").unlink(missing_ok=True)
        for path in reversed(gone):  # newest first: if killed here, the rest is a valid run of fewer tasks
            shutil.rmtree(partial[path], ignore_errors=True)
            remove(path)
        kept = sum(path.is_dir() for path in folders)
        return Repaired(kept, [path.name for path in gone], [path.name for path in mended])


def _mend(path: Path, described: dict[str, object]) -> bool:
    """Replace a step by another run's intact copy; False if there is none."""
    step, ids = int(path.name.split("_")[1]), described.get("ids")
    if not isinstance(ids, list):
        return False
    for other in sorted(path.parent.parent.glob(f"*/{path.name}")):
        same = read_json(other.parent / "config.json").get("ids", [])[:step] == ids[:step]
        if same and is_whole(other):  # the damaged one is not
            remove(path)
            link_folder(other, path)
            return True
    return False
