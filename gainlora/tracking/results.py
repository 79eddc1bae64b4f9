"""Result files: a finished run in one JSON file, small enough to keep in version control.

    results/<order>/<method>-<model>-<seed>.json            with a label: <method>+<label>-<model>-<seed>.json

    order, method, model, seed, tasks, R, AP, FT, BWT       those of result.json, first
    label                                                   what tells it from the plain method; "" mostly
    run_id, config, dtype, device, code, versions, skipped  config.json: every option, and what ran it
    data                                                    data.json: path, hashes and example counts per task
    steps                                                   per step: scores.json, coefficients (mean and standard
                                                            deviation), subspace (basis sizes), stored (parameters)

A run is read back from it whole, but for the answers and coefficients of single examples.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from gainlora.errors import GainLoRAError
from gainlora.tracking.folder import Run, Step, checked, options, read_json, read_run

DIGITS = 4
"""After the point of a score, as in result.json."""
OWN = ("label", "data", "R", "AP", "FT", "BWT", "steps")
"""Keys of a result file that are none of config.json."""


def write_result_file(run: Run, path: Path) -> None:
    """Write a finished run, in one step.

    Raises:
        GainLoRAError: it is not finished.
    """
    if not run.complete:
        done = f"{len(run.steps)} of {len(run.config['steps'])} tasks are learned"
        raise GainLoRAError(f"{run.folder or run.run_id}: {done}; run the same command again to finish it.")
    described = {key: value for key, value in run.config.items() if key != "steps"}
    steps = [
        {**_rounded(step.scores), "coefficients": step.coefficients, "subspace": step.subspace, "stored": step.stored}
        for step in run.steps
    ]
    content = {**_rounded(run.result), "label": run.label, **described, "data": run.data, "steps": steps}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(_readable(content) + "\n", encoding="utf-8")
    part.replace(path)


def read_result_file(path: Path) -> Run:
    """The run that `write_result_file` wrote.

    Raises:
        GainLoRAError: not there, or no such file.
    """
    content = read_json(path)
    try:
        steps = [_step(dict(step)) for step in content["steps"]]
        config = {key: value for key, value in content.items() if key not in OWN}
        config["steps"] = [step.task for step in steps]
        return checked(Run(config, content["data"], steps, content["label"]))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = f"{path}: no result file ({error} is missing); write it anew with `gainlora results RUN`."
        raise GainLoRAError(reason) from None


def read_any(path: Path) -> Run:
    """The run of a run folder or a result file.

    Raises:
        GainLoRAError: it is neither.
    """
    return read_run(path) if path.is_dir() or path.suffix != ".json" else read_result_file(path)


def export(run: Run, out: Path, label: str = "") -> Path:
    """Write a run's result file to its place under `out`.

    Args:
        run: finished.
        label: tells it from runs of the plain method, e.g. no-init; part of the name.

    Returns:
        The file.

    Raises:
        GainLoRAError: the run is unfinished, the label no part of a file's name, or the file holds a run with other
            options.
    """
    run = replace(run, label=label or run.label)
    config = run.config
    path = result_path(out, config["order"], config["method"], run.label, run.model, config["seed"])
    is_there(path, config["config"])
    write_result_file(run, path)
    return path


def is_there(path: Path, config: dict[str, Any]) -> bool:
    """Whether a result file of this configuration is there.

    Raises:
        GainLoRAError: it is one of a run with other options, or none at all.
    """
    if not path.exists():
        return False
    old, new = options(read_result_file(path).config["config"]), options(json.loads(json.dumps(config)))
    differing = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if differing:
        name = differing[0]
        raise GainLoRAError(
            f"{path}: holds a run with other options ({name}: {old.get(name)} there, {new.get(name)} here); "
            "give this one a name of its own with a label (--label), e.g. no-init."
        )
    return True


def result_path(out: Path, order: str, method: str, label: str, model: str, seed: int) -> Path:
    """Where a run's result file belongs under `out`.

    Raises:
        GainLoRAError: the label is no part of a file's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.=-]*", label):
        raise GainLoRAError(f"--label: {label!r} becomes part of a file's name; use letters, digits, _ - . and =.")
    named = "+".join(filter(None, (method, label)))
    return out / order / f"{named}-{Path(model).name}-{seed}.json"


def _step(content: dict[str, Any]) -> Step:
    coefficients, subspace, stored = (content.pop(key) for key in ("coefficients", "subspace", "stored"))
    return Step(content["index"], content["task"], content, coefficients, subspace, stored)


def _rounded(value: Any) -> Any:
    """Floats of plain values with DIGITS after the point."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def _readable(value: Any, indent: str = "") -> str:
    """JSON in which a list or object of plain values is one line: a row of R, a branch's coefficients."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)) or not any(isinstance(item, (dict, list)) for item in inner):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + "  "
    if isinstance(value, dict):
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {_readable(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(deeper + line for line in lines) + "\n" + indent + "}"
    return "[\n" + ",\n".join(deeper + _readable(item, deeper) for item in value) + "\n" + indent + "]"
