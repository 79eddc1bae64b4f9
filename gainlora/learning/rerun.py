"""A run again, from its config.json alone: is the result the same?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gainlora.config import from_dict
from gainlora.learning.files import read_json
from gainlora.learning.run_folder import OWN, describe, make_run
from gainlora.learning.stream import Stream

STATE = ("adapter_model.safetensors", "gate.safetensors", "subspace.safetensors", "rule.safetensors")


def differences(folder: Path) -> list[str]:
    """What a run's config.json and data.json say and is not so here and now: code, base, versions, device, data.

    Raises:
        GainLoRAError: no run folder, or its data or model are not there.
    """
    keys = ("config", "code", "dtype", "device", "tasks", "versions")
    then, then_data = read_json(folder / "config.json", *keys), read_json(folder / "data.json")
    now, now_data = describe(from_dict(then["config"]), folder.resolve().parent.parent, folder / OWN)
    pairs: dict[str, tuple[Any, Any]] = {
        k: (then[k], now[k]) for k in ("code", "base", "dtype", "device", "tasks") if k in then
    }
    pairs |= {name: (version, now["versions"].get(name)) for name, version in then["versions"].items()}
    pairs |= {name: (entry["sha256"], now_data.get(name, {}).get("sha256")) for name, entry in then_data.items()}
    return [f"{name}: {_short(old)} then, {_short(new)} now" for name, (old, new) in pairs.items() if old != new]


def rerun(folder: Path) -> tuple[Path, list[str]]:
    """Learn a run's tasks again, beside it in <run>.rerun; a stopped rerun goes on.

    Returns:
        The new run folder, and what came out otherwise; nothing where every score and every tensor is the same.

    Raises:
        GainLoRAError: no run folder, or its data or model are not there.
    """
    folder = folder.resolve()
    config = from_dict(read_json(folder / "config.json", "config")["config"])
    stream = Stream.open(make_run(config, folder.parent.parent, f"{folder.name}.rerun", folder / OWN))
    for t in range(1, len(stream.steps) + 1):
        stream.finish(t)
    stream.result()
    return stream.folder, list(_otherwise(folder, stream))


def _otherwise(folder: Path, stream: Stream) -> Iterator[str]:
    for t in range(1, len(stream.steps) + 1):
        new = stream.task_folder(t)
        old = folder / new.name
        if not old.is_dir():
            yield f"{old.name}: not finished in {folder.name}"
            continue
        scores = [read_json(path / "scores.json")["scores"] for path in (old, new)]
        for task, score in scores[0].items():
            if score != scores[1][task]:
                yield f"after {old.name}, score on {task}: {score:.4f} then, {scores[1][task]:.4f} now"
        for name in STATE:
            contents = [path.read_bytes() if (path := where / name).exists() else b"" for where in (old, new)]
            if contents[0] != contents[1]:
                yield f"{old.name}/{name}: other bytes"


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a digest
