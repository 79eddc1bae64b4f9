"""DVC, seen from a flow: hashes of the data, the files of record of an order, `dvc commit`.

DVC's lock is held by an outer `dvc repro`, so inside one nothing here takes it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Stages whose outputs a finished run of an order stands for.
STAGES = {"embedded": ["fetch", "embedded"]} | {f"order{i}": [f"paper/dvc.yaml:order@{i}"] for i in range(1, 5)}


def in_project() -> bool:
    """Whether the current folder is a DVC project."""
    return Path(".dvc", "config").is_file()


def data_hashes(data: Path) -> tuple[dict[str, str], list[str]]:
    """Hashes of the DVC-tracked folders that hold `data` or lie in it.

    Returns:
        {path: md5 of what is there now}, and the paths whose content is not what DVC recorded.
    """
    if not (in_project() and data.exists()):
        return {}, []
    from dvc.repo import Repo

    hashes, changed = {}, []
    with Repo() as repo:
        for out in repo.index.outs:
            path = Path(os.path.relpath(out.fs_path))
            related = path == data or path in data.parents or data in path.parents
            if not (related and out.exists):
                continue
            now = out.get_hash().value  # DVC remembers it by time and size: quick when nothing changed
            hashes[path.as_posix()] = str(now)
            if out.hash_info and out.hash_info.value != now:
                changed.append(path.as_posix())
    return hashes, changed


def note_hashes(folder: Path, hashes: dict[str, str]) -> None:
    """Put each task's DVC hash (that of the tracked folder it lies in) into the run's data.json."""
    file = folder / "data.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    for entry in data.values():
        path = Path(entry["path"])
        held = [h for p, h in hashes.items() if Path(p) == path or Path(p) in path.parents]
        if held:
            entry["dvc"] = held[-1]
    _replace(file, json.dumps(data, indent=2) + "\n")


def export(order: str, folder: Path) -> None:
    """metrics/<order>.json and adapters/<order>/ (the finished model), each by one rename."""
    from gainlora.handover.folder import open_learned
    from gainlora.handover.release import write_release

    result = folder / "result.json"
    metrics = Path("metrics", f"{order}.json")
    metrics.parent.mkdir(exist_ok=True)
    _replace(metrics, result.read_text(encoding="utf-8"))

    target = Path("adapters", order)
    new = target.with_name(f".{order}.new")
    shutil.rmtree(new, ignore_errors=True)
    write_release(open_learned(folder), new)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


def commit(order: str) -> str | None:
    """Let DVC record the order's outputs; what to do by hand where that failed, else None.

    Nothing to do outside a DVC project, for an order without a stage, and in a stage (DVC itself records).
    """
    if "DVC_STAGE" in os.environ or order not in STAGES or not in_project():
        return None
    # Waits for a `dvc repro` beside it, which gives up the lock while its stages run.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "commit", "--force", *STAGES[order]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
    return f"dvc commit failed ({' '.join(reason)}); do it by hand: dvc commit -f {' '.join(STAGES[order])}"


def _replace(file: Path, text: str) -> None:
    """Write by rename, so that a reader sees the old or the new content."""
    new = file.with_name(file.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)
