"""DVC, seen from a run: versions of the data, the published files of an order, `dvc commit`.

    python -m flows.publish ORDER          print the table of an order's published result

An outer `dvc repro` holds DVC's lock, so nothing here takes it inside one.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gainlora import io
from gainlora.runs.records import Record, read_run, train_records

STAGES = {"embedded": (".", "fetch", "embedded")} | {f"order{i}": ("paper", f"order{i}") for i in range(1, 5)}
"""Order -> folder of its DVC project, and stages whose outputs its published files are."""
Versions = dict[str, tuple[str, bool]]
"""DVC-tracked path -> (md5 of its present content, whether DVC recorded another one)."""


def in_project() -> bool:
    """Whether the current folder is a DVC project in a git repository; a copy without .git runs without DVC."""
    return Path(".dvc", "config").is_file() and Path(".git").exists()


def data_versions(*places: str) -> Versions:
    """Versions of the DVC-tracked folders that hold one of `places` or lie in it; none outside a DVC project."""
    folders = [Path(os.path.relpath(place)) for place in places if Path(place).exists()]
    if not (in_project() and folders):
        return {}
    from dvc.repo import Repo

    found = {}
    with Repo() as repo:
        for out in repo.index.outs:
            path = Path(os.path.relpath(out.fs_path))
            if out.exists and any(path.is_relative_to(folder) or folder.is_relative_to(path) for folder in folders):
                now = out.get_hash().value  # DVC remembers it by time and size: quick when nothing changed
                found[path.as_posix()] = (str(now), bool(out.hash_info) and out.hash_info.value != now)
    return found


def note_versions(run_folder: Path, versions: Versions) -> list[str]:
    """Write each task's DVC version (that of the tracked folder it lies in) into the run's data.json; what to say."""
    data = io.read_json(run_folder / "data.json")
    for entry in data.values():
        path = Path(entry["path"])
        held = [md5 for tracked, (md5, _) in versions.items() if path.is_relative_to(tracked)]
        entry["dvc"] = held[-1] if held else entry["dvc"]
    io.write_json(run_folder / "data.json", data)
    changed = [path for path, (_, differs) in versions.items() if differs]
    return [f"{path}: differs from what DVC recorded; the run notes its present hash" for path in changed]


def publish(order: str, run_folder: Path) -> list[str]:
    """Write metrics/<order>.json, plots/<order>/ and adapters/<order>/ (the finished model); DVC records them.

    Nothing is committed outside a DVC project, for an order without a stage, and inside a stage, where DVC itself
    records. Returns what to say: the command that remains to be given where `dvc commit` failed.
    """
    from gainlora.export.hub import write_release
    from gainlora.export.saved import open_saved

    io.write_json(Path("metrics", f"{order}.json"), io.read_json(run_folder / "result.json"))
    for name, rows in curves(read_run(run_folder)).items():
        io.write_json(Path("plots", order, f"{name}.json"), rows)
    with io.whole_folder(Path("adapters", order)) as part:
        write_release(open_saved(run_folder), part)
    if "DVC_STAGE" in os.environ or order not in STAGES:
        return []
    if not in_project():
        return ["no git repository here, so DVC does not record the result; `git init` and `dvc commit` would"]
    # waits for a `dvc repro` beside it, which gives up the lock while its stages run
    folder, *stages = STAGES[order]
    command = [sys.executable, "-m", "dvc", "--cd", folder, "--wait-for-lock", "commit", "--force", *stages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return []
    reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
    return [f"dvc commit failed ({' '.join(reason)}); run it by hand: dvc --cd {folder} commit -f {' '.join(stages)}"]


def curves(run: Record) -> dict[str, list[dict[str, Any]]]:
    """The data of `dvc plots`: R, AP and FT after each task, the training loss over all steps."""
    found: dict[str, list[dict[str, Any]]] = {"R": [], "accuracy": [], "loss": []}
    for step in run.steps:
        learned = f"{step.index} {step.task}"
        for task, score in zip(run.tasks, run.scores(step), strict=False):
            found["R"].append({"learned": learned, "evaluated": task, "score": score})
        found["accuracy"].append({"tasks": run.learned(step), **run.measures(step)})
        for record in train_records(step.folder):
            found["loss"].append({"step": len(found["loss"]) + 1, "loss": record["loss"], "task": learned})
    return found


def main(order: str) -> None:
    """Print R, AP, FT and BWT of metrics/<order>.json."""
    from rich.console import Console

    from gainlora.report.one_run import matrix_table

    Console().print(matrix_table([io.read_json(Path("metrics", f"{order}.json"))], decimals=1))


if __name__ == "__main__":
    main(sys.argv[1])
