"""Reproduces a run from its config.json and compares the results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gainlora.config import RunConfig
from gainlora.data.sources import resolve_model
from gainlora.data.tasks import load_order
from gainlora.io import read_json
from gainlora.runs import identity
from gainlora.runs.records import STATE
from gainlora.runs.reuse import OWN
from gainlora.runs.run import Run


def differences(folder: Path) -> list[str]:
    """Differences between a run's recorded environment and the present one: code, base, versions, device, data.

    Raises:
        GainLoRAError: no run folder, or its data or model are missing.
    """
    folder = folder.resolve()
    root, then = folder.parent.parent, read_json(folder / "config.json", "config", "dtype", "tasks")
    config = RunConfig.from_stored(then["config"])
    now = identity.environment(config.method)
    location = resolve_model(config.model.location, root)
    now |= {"base": identity.base_fingerprint(location, root), "dtype": identity.dtype_name(config)}
    keys = [key for key in ("learning_version", "base", "dtype", "device") if key in then]
    pairs: dict[str, tuple[Any, Any]] = {key: (then[key], now[key]) for key in keys}
    pairs |= {name: (version, now["versions"].get(name)) for name, version in then.get("versions", {}).items()}
    data = {task.name: task.sha256 for task in load_order(config.order, config.data, root, folder / OWN)[0]}
    recorded = read_json(folder / "data.json", *then["tasks"])
    pairs |= {name: (recorded[name]["sha256"], data.get(name)) for name in then["tasks"]}
    return [f"{name}: {_short(old)} then, {_short(new)} now" for name, (old, new) in pairs.items() if old != new]


def rerun(folder: Path) -> tuple[Path, list[str]]:
    """Learn a run's tasks again, beside it in <run>.rerun; a stopped rerun continues.

    Returns:
        The new run folder, and the differences; none if every score and tensor is equal.

    Raises:
        GainLoRAError: no run folder, or its data or model are missing.
    """
    folder = folder.resolve()
    config = RunConfig.from_stored(read_json(folder / "config.json", "config")["config"])
    with Run.create(config, folder.parent.parent, repeats=folder) as run:
        run.learn()
        return run.folder, list(_otherwise(folder, run))


def _otherwise(folder: Path, run: Run) -> Iterator[str]:
    for t in range(1, len(run.steps) + 1):
        new = run.task_folder(t)
        old = folder / new.name
        if not old.is_dir():
            yield f"{old.name}: not finished in {folder.name}"
            continue
        scores = [read_json(path / "scores.json")["scores"] for path in (old, new)]
        for task, score in scores[0].items():
            if score != scores[1][task]:
                yield f"after {old.name}, score on {task}: {score:.4f} then, {scores[1][task]:.4f} now"
        for name in (f"{state}.safetensors" for state in STATE.values()):
            contents = [path.read_bytes() if (path := where / name).exists() else b"" for where in (old, new)]
            if contents[0] != contents[1]:
                yield f"{old.name}/{name}: other bytes"


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a digest
