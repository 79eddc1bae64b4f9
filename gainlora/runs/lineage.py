"""Lineages: runs that follow from each other by learning one more task or forgetting the newest.

    runs/lineages/<name>.json    {"head": run, "forgotten": [runs to be removed]}

Each new run begins a lineage of its own name. `gainlora learn` and `gainlora forget` create another run and then move
the head, in one atomic write; inboxes, deployments and the registry name the lineage.
"""

import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from gainlora import io
from gainlora.errors import GainLoRAError
from gainlora.io import read_json, write_json

FOLDER = "lineages"
RERUN = ".rerun"
"""Suffix of the name of a run that repeats another; such runs share no steps."""


def resolve(name: str | Path, root: Path = Path(".")) -> Path:
    """The run folder for a name.

    Args:
        name: a run folder; `latest`, the run that was begun or made a head last; a lineage, for its head; a run's name
            or a unique prefix of it.

    Raises:
        GainLoRAError: no match, or several.
    """
    runs, text = root / "runs", str(name)
    if (Path(name) / "config.json").is_file():
        return Path(name)
    found = sorted(path.parent for path in runs.glob("*/config.json"))
    if text == "latest" and found:
        runs_alone = [folder for folder in found if folder.suffix != RERUN] or found
        return max(runs_alone, key=lambda folder: (folder / "config.json").stat().st_mtime_ns)
    if exists(text, root):
        return runs / head(text, root)
    fitting = [folder for folder in found if folder.name == text] or [f for f in found if f.name.startswith(text)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise GainLoRAError(f"{text}: begins the names of {len(fitting)} runs; give more of {fitting[0].name}.")
    raise GainLoRAError(f"{text}: no such run; give a folder under runs/, the beginning of its name, or `latest`.")


def head(name: str, root: Path = Path(".")) -> str:
    """The name of a lineage's newest run."""
    return str(_read(root, name)["head"])


def is_name(name: str | Path) -> bool:
    """Whether this is the name of a run or lineage, not a folder."""
    return not (Path(name) / "config.json").is_file() and len(Path(name).parts) == 1


def exists(name: str, root: Path = Path(".")) -> bool:
    """Whether a lineage has this name."""
    return _file(root, name).is_file()


def begin(name: str, root: Path) -> None:
    """Begin the lineage of a new run's name, or restart it if that run was forgotten."""
    write_json(_file(root, name), {"head": name, "forgotten": []})


def remove(name: str, root: Path) -> None:
    """Undo `begin`."""
    _file(root, name).unlink(missing_ok=True)


def move(name: str, run: str, root: Path, forgets: str | None = None) -> None:
    """Make `run` the head; `forgets` names a run to be removed later (`collect`)."""
    with FileLock(root / "runs" / FOLDER / ".lock"):
        forgotten = sorted({*_read(root, name)["forgotten"], *filter(None, [forgets])})
        write_json(_file(root, name), {"head": run, "forgotten": forgotten})
        os.utime(root / "runs" / run / "config.json")  # `latest` is this run, also where it existed before


def collect(root: Path) -> dict[str, str]:
    """Remove forgotten runs that are not the head of a lineage; returns forgotten run -> its lineage's head."""
    files = sorted((root / "runs" / FOLDER).glob("*.json"))
    if not any(read_json(file).get("forgotten") for file in files):
        return {}
    gone = {}
    with FileLock(root / "runs" / FOLDER / ".lock"):
        lineages = {file: read_json(file, "head", "forgotten") for file in files}
        heads = {lineage["head"] for lineage in lineages.values()}
        for file, lineage in lineages.items():
            for run in lineage["forgotten"]:
                gone[run] = lineage["head"]
                if run not in heads:
                    io.remove(root / "runs" / run)
            if lineage["forgotten"]:
                write_json(file, {**lineage, "forgotten": []})
    return gone


def _read(root: Path, name: str) -> dict[str, Any]:
    if not exists(name, root):  # a run folder that was copied here
        return {"head": name, "forgotten": []}
    return read_json(_file(root, name), "head", "forgotten")


def _file(root: Path, name: str) -> Path:
    return root / "runs" / FOLDER / f"{name}.json"
