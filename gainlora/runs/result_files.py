"""Writes result files: small records of finished runs for version control (`gainlora.runs.records` reads them)."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from gainlora.errors import GainLoRAError
from gainlora.io import write_text
from gainlora.runs.records import FILES, Record, flat_options, read_result_file, rounded


def write_result_file(record: Record, path: Path) -> None:
    """Write a finished run's result file, atomically.

    Raises:
        GainLoRAError: the run is not finished.
    """
    record.check_finished()
    described = {key: value for key, value in record.config.items() if key != "steps"}
    steps = []
    for step in record.steps:
        files = {kind: step.files[kind] for kind in FILES if kind in step.files}
        if examples := record.example_scores(step):
            files["examples"] = {task: [_short(score) for score in scores] for task, scores in examples.items()}
        steps.append({**rounded(step.files["scores"]), **files})
    content = {**record.result, "label": record.label, **described, "data": record.data, "steps": steps}
    write_text(path, _readable(content) + "\n")


def export(record: Record, out: Path, label: str = "") -> Path:
    """Write a run's result file to its place under `out`; never replaces the file of another run.

    Args:
        record: finished.
        label: distinguishes it from runs of the plain method, e.g. no-update; part of the name.

    Returns:
        The file.

    Raises:
        GainLoRAError: the run is unfinished, the label cannot be part of a file's name, or the file holds another run.
    """
    record = replace(record, label=label or record.label)
    config = record.config
    path = result_path(out, config["order"], config["method"], record.label, record.model, config["seed"])
    if is_there(path, config["config"]) and (other := read_result_file(path).run_id) != record.run_id:
        raise GainLoRAError(
            f"{path}: holds another run with the same options ({other}); move it away, or give this one a name of its "
            "own with a label (--label)."
        )
    write_result_file(record, path)
    return path


def is_there(path: Path, config: dict[str, Any]) -> bool:
    """Whether a result file of this configuration exists.

    Raises:
        GainLoRAError: the file belongs to a run with other options, or is not a result file.
    """
    if not path.exists():
        return False
    old, new = read_result_file(path).options, flat_options(json.loads(json.dumps(config)))
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            raise GainLoRAError(
                f"{path}: holds a run with other options ({name}: {old.get(name)} there, {new.get(name)} here); "
                "give this one a name of its own with a label (--label), e.g. no-update."
            )
    return True


def result_path(out: Path, order: str, method: str, label: str, model: str, seed: int) -> Path:
    """Where a run's result file belongs under `out`.

    Raises:
        GainLoRAError: the label cannot be part of a file's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.=-]*", label):
        raise GainLoRAError(f"--label: {label!r} becomes part of a file's name; use letters, digits, _ - . and =.")
    named = "+".join(filter(None, (method, label)))
    return out / order / f"{named}-{Path(model).name}-{seed}.json"


def _short(score: float) -> float:
    """A score with few digits: 100 for 100.0."""
    return int(score) if score == int(score) else round(score, 2)


def _readable(value: Any, indent: str = "") -> str:
    """JSON with each list or object of plain values on one line: a row of R, a branch's coefficients."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)) or not any(isinstance(item, (dict, list)) for item in inner):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + "  "
    opening, closing, names = "[", "]", [""] * len(inner)
    if isinstance(value, dict):
        opening, closing, names = "{", "}", [f"{json.dumps(key, ensure_ascii=False)}: " for key in value]
    lines = [f"{deeper}{name}{_readable(item, deeper)}" for name, item in zip(names, inner, strict=True)]
    return f"{opening}\n" + ",\n".join(lines) + f"\n{indent}{closing}"
