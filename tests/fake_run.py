"""A run folder with made-up numbers, in the layout that Run writes: no model, no training."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gainlora.config import RunConfig
from gainlora.runs.records import Record, read_run
from gainlora.sections import OrderConfig

BASE, MAJORITY, BEFORE = 10.0, 25.0, 14.0
"""Scores on a new task of a fake run's base model, of the most frequent label, and of the model before the task."""
TASKS = ("movie_sentiment", "news_topic", "text_source", "review_or_plot")
THREE = TASKS[:3]
# AP = (82 + 87 + 71) / 3 = 80; FT = ((84 - 82) + (88 - 87)) / 2 = 1.5; BWT = -1.5
R = [[84.0], [81.0, 88.0], [82.0, 87.0, 71.0]]
# AP = (22 + 47 + 51) / 3 = 40; FT = ((80 - 22) + (85 - 47)) / 2 = 48
FORGETS = [[80.0], [30.0, 85.0], [22.0, 47.0, 51.0]]


def run_of(root: Path, matrix: Sequence[Sequence[float]], method: str = "gainlora-inflora", **how: Any) -> Record:
    """A run of the first three tasks, read."""
    return read_run(write_run(root, matrix, method, tasks=THREE, **how))


def write_run(
    root: Path,
    R: Sequence[Sequence[float]],
    method: str = "gainlora-inflora",
    seed: int = 42,
    tasks: Sequence[str] = TASKS,
    order: str = "embedded",
    examples: int = 20,
    steps: int = 12,
    at_once: bool = False,
    code: str = "c0de",
    model: str = "smollm2-135m",
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write runs/<run_id> with one finished step per row of R (row t: t scores). Returns the folder.

    Args:
        examples: test examples per task. steps: optimizer steps per task.
        at_once: all tasks are learned in one step, "all_tasks"; R has one row of T scores, or none.
        code: start of the learning code's digest.
        options: dotted option -> value, laid over the defaults; nothing is checked.
    """
    order_config = OrderConfig(
        name=order, data=f"data/{order}", template="long_sequence", metric="exact_match", tasks=tuple(tasks)
    )
    config = RunConfig(order=order_config, method="seqlora", seed=seed).learning() | {"method": method}
    for option, value in {"model.name": model, **(options or {})}.items():
        section, name = option.split(".")
        config[section][name] = value
    digest = hashlib.sha256(json.dumps([config, code], sort_keys=True).encode()).hexdigest()[:8]
    folder = root / "runs" / f"{order}-{method}-{model}-{seed}-{digest}"
    folder.mkdir(parents=True)
    named = {"order": order, "method": method, "model": model, "seed": seed}
    names = ["all_tasks"] if at_once else list(tasks)
    described = {"run_id": folder.name, **named, "tasks": list(tasks), "steps": names, "skipped": [], "config": config}
    described |= {"dtype": "bfloat16", "device": "cpu", "versions": {"torch": "2.13.0"}, "code": code + "0" * 60}
    _write(folder / "config.json", described)
    _write(folder / "data.json", {name: _data(order, name, examples) for name in tasks})
    for t in range(1, len(R) + 1):
        _write_task(folder, names, tasks, R[:t], examples, steps)
    if len(R) == len(names):
        rows = [[None] * len(tasks)] * (len(tasks) - len(R)) + _padded(R, len(tasks))
        _write(folder / "result.json", {**named, "tasks": list(tasks), "R": rows, **measures(R)})
    return folder


def measures(R: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """All measures after the last row of R."""
    T, at_once = len(R), len(R[0]) > 1
    means = [sum(row) / len(row) for row in R]
    LA = None if at_once else round(sum(row[-1] for row in R) / T, 4)
    found = {"AP": means[-1], "FT": None, "BWT": None, "LA": LA, "AIA": None if at_once else round(sum(means) / T, 4)}
    if T == 1:
        return {**found, "FWT": None}
    FT = sum(max(R[t][i] for t in range(i, T)) - R[-1][i] for i in range(T - 1)) / (T - 1)
    BWT = sum(R[-1][i] - R[i][i] for i in range(T - 1)) / (T - 1)
    return {**found, "FT": FT, "BWT": BWT, "FWT": BEFORE - BASE}


def mean_coefficients(t: int, i: int) -> list[float]:
    """What the fake gates answer on task i after task t: high on their own task, rising a little with age."""
    return [0.9 if b == i else round(0.08 + 0.05 * abs(b - i), 2) for b in range(1, t + 1)]


def stored(t: int, gated: bool) -> dict[str, int]:
    """Parameters that a fake run keeps after task t."""
    return {"adapter": 600 * t, **({"gate": 70 * t} if gated else {}), "subspace": 12}


def _write_task(
    run: Path, names: Sequence[str], tasks: Sequence[str], R: Sequence[Sequence[float]], examples: int, steps: int
) -> None:
    t = len(R)
    seen = tasks[: len(R[-1])]
    gated = "gainlora-" in run.name
    folder = run / f"task_{t:02d}_{names[t - 1]}"
    (folder / "predictions").mkdir(parents=True)
    rng = random.Random(t)
    for kind, count in stored(t, gated).items():
        name = "adapter_model" if kind == "adapter" else kind
        save_file({"w": np.zeros(count, np.float32)}, folder / f"{name}.safetensors")
    _write(folder / "adapter_config.json", {"r": 8})
    train = [
        {"step": n, "loss": 2.0 / n + rng.random() / 9, "learning_rate": 1e-3, "examples": 8, "seconds": 0.5}
        for n in range(1, steps + 1)
    ]
    _write_lines(folder / "train.jsonl", train)
    for i, (name, score) in enumerate(zip(seen, R[-1], strict=True), start=1):
        means = mean_coefficients(t, i)
        rows: list[dict[str, Any]] = []
        for n in range(examples):
            spread = [min(0.96, max(0.0, a + rng.gauss(0, 0.07))) for a in means]
            right = 100.0 if n < score * examples / 100 else 0.0
            answer = {"prediction": "good", "references": ["good"], "score": right}
            rows.append({**answer, "coefficients": spread if gated else None})
        _write_lines(folder / "predictions" / f"{name}.jsonl", rows)
    seconds = {"prepare": 1.0, "train": 6.0, "update": 0.5, "evaluate": 2.5}
    counts = {"truncated": 1, "trainable_parameters": 460_800, "num_processes": 1}
    scores = {"task": names[t - 1], "index": t, "scores": dict(zip(seen, R[-1], strict=True))}
    new = seen if len(names) < len(tasks) else seen[-1:]
    scores |= {"base": dict.fromkeys(new, BASE), "majority": dict.fromkeys(new, MAJORITY)}
    scores |= {"before": dict.fromkeys(new, BEFORE)} if t > 1 else {}
    scores |= {"general": {"loss": 3.25, "base_loss": 3.0, "kl": 0.125, "text": "abc"}}
    _write(folder / "scores.json", {**scores, **measures(R), "seconds": seconds, **counts})
    if gated:
        means = {name: mean_coefficients(t, i) for i, name in enumerate(seen, start=1)}
        _write(folder / "coefficients.json", {n: {"mean": a, "std": [0.07] * t} for n, a in means.items()})
    gate = {str(layer): 2 * layer + 3 * t for layer in (1, 2, 3)} if gated else {}
    layers = {f"layers.{n}.self_attn": 5 * t + n for n in range(30)} if "inflora" in run.name else {}
    widths = {"gate_width": {k: 50 if k == "2" else 576 for k in gate}, "layers_width": dict.fromkeys(layers, 576)}
    _write(folder / "subspace.json", {"gate": gate, "layers": layers, **widths})
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    _write(folder / "checksums.json", sums)


def _data(order: str, name: str, examples: int) -> dict[str, Any]:
    digest = hashlib.md5(name.encode()).hexdigest() + ".dir"
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return {"path": f"data/{order}/{name}", "dvc": digest, "sha256": sha256, "train": 96, "test": examples}


def _padded(R: Sequence[Sequence[float]], width: int) -> list[list[float | None]]:
    return [[*row, *[None] * (width - len(row))] for row in R]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
