"""Runs as tables for the terminal and as one HTML page that needs no network.

The page holds its style and its figures (inline SVG, drawn in the page's text colour, so that they
suit light, dark and paper); the figures stand beside it as PNG files too. Numbers are those of the
run folders' scores.json; several seeds of one configuration give mean and sample standard deviation.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gainlora.errors import GainLoRAError
from gainlora.tracking import figures, page
from gainlora.tracking.folder import Run, example_coefficients, options, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

MEASURES = ("AP", "FT", "BWT")
EXPLAINED = (
    "AP, average performance: the mean score (0 to 100) over all tasks after the last one; higher is better. "
    "FT, forgetting: how far the earlier tasks fell from their best score, on average; lower is better. "
    "BWT, backward transfer: how much later tasks changed the earlier ones' scores; below 0 is forgetting. "
)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    order: str
    label: str
    runs: list[Run]


def matrix_table(results: list[dict[str, Any]], decimals: int) -> RenderableType:
    """Tables for the terminal.

    Args:
        results: result.json's contents; one gives its R, several a comparison.
        decimals: digits after the point.

    Returns:
        Something that rich prints.
    """
    from rich.console import Group as Lines
    from rich.text import Text

    if len(results) != 1:
        return _comparison(results, decimals)
    line = "   ".join(f"{key} {_number(results[0][key], decimals)}" for key in MEASURES)
    return Lines(_matrix(results[0], decimals), Text(line, style="bold"))


def write_report(runs: list[Path], out: Path, report: dict[str, Any]) -> Path:
    """Write the page and its PNG figures.

    Args:
        runs: run folders, finished or not.
        out: the page's folder (made when missing), or its file if it ends in .html; the figures go beside it.
        report: params.yaml's section: decimals of tables, dpi of the PNG files.

    Returns:
        The page.

    Raises:
        GainLoRAError: no runs given, or one of them is no run folder.
    """
    if not runs:
        raise GainLoRAError("report: no runs given; make one first (`gainlora run embedded`).")
    path = out if out.suffix == ".html" else out / "index.html"
    read = [read_run(folder) for folder in dict.fromkeys(folder.resolve() for folder in runs)]
    groups = _groups(read)
    decimals, dpi = report["decimals"], report["dpi"]
    parts = [page.heading("Methods"), _methods(groups, decimals)]
    parts.append(page.note(EXPLAINED + "Several seeds: mean ± standard deviation; unfinished runs do not count."))
    for order in dict.fromkeys(group.order for group in groups):
        curves = {g.label: [run.R for run in g.runs if run.steps] for g in groups if g.order == order}
        curves = {label: matrices for label, matrices in curves.items() if matrices}
        if curves:
            caption = (
                f"Order {order}: average performance over the tasks seen so far. Every method starts from the same "
                "first task; the higher a line stays, the less is lost. Bands span the seeds."
            )
            drawn = figures.performance_curves(curves)
            parts.append(page.figure(drawn, caption, path.parent / f"{order}-average_performance.png", dpi))
    parts += [page.heading("Runs"), _runs(groups, decimals)]
    for run in (run for group in groups for run in group.runs):
        parts += _section(run, path.parent / run.folder.name, decimals, dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.page("GainLoRA: continual learning runs", parts), encoding="utf-8")
    return path


def run_figures(run: Run, decimals: int) -> dict[str, tuple[Figure, str]]:
    """File name (without suffix) -> figure of a run with at least one finished task, and how to read it."""
    R = run.R[: len(run.steps)]
    last = run.steps[-1]
    made = {
        "accuracy_matrix": (
            figures.accuracy_matrix(run.tasks, R, decimals),
            "Accuracy matrix R. Read a column downwards: what becomes of one task while later ones are learned. "
            "A column that keeps its colour is a task that is not forgotten.",
        ),
        "accuracy_curves": (
            figures.accuracy_curves(run.tasks, R),
            "The same scores over the sequence, each task from the moment it is learned. A falling line is "
            "forgetting; the thick line is the mean over the tasks seen so far.",
        ),
    }
    if last.coefficients:
        made["gate_coefficients"] = (
            figures.gate_coefficients(run.tasks, {task: row["mean"] for task, row in last.coefficients.items()}),
            f"Mean integration coefficient of every branch (column) on the test examples of every task (row), after "
            f"{len(run.steps)} of {len(run.tasks)} tasks. Small values right of the diagonal: later branches stay out "
            "of earlier tasks' way.",
        )
    examples = example_coefficients(last)
    if examples:
        made["coefficient_spread"] = (
            figures.coefficient_spread(run.tasks, examples),
            "The same coefficients, example by example: a box holds the middle half, its line is the median, dots are "
            "outliers. One panel per task that is asked; the task's own branch is orange.",
        )
    if last.subspace["gate"] or last.subspace["layers"]:
        made["basis_growth"] = (
            figures.basis_growth([step.subspace for step in run.steps]),
            "Directions of its input that each stored basis holds, as a share of all. New tasks learn in what is "
            "left over; at 100 % nothing is.",
        )
    return made


def _matrix(result: dict[str, Any], decimals: int) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group as Lines
    from rich.table import Table
    from rich.text import Text

    tasks = result["tasks"]
    title = Text(f"{result['order']}, {result['method']}, {result['model']}, seed {result['seed']}")
    caption = Text("R: score on each task (column) after learning each task (row)", style="dim")
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("task" if len(tasks) > 8 else "after task")
    for index in range(1, len(tasks) + 1):
        table.add_column(str(index), justify="right", min_width=4 + decimals - 1)
    wide = len(tasks) > 8  # then names would push the scores out of 80 columns
    for t, row in enumerate(result["R"]):
        name = str(t + 1) if wide else f"{t + 1} {tasks[t]}"
        table.add_row(Text(name), *(_number(score, decimals, missing="") for score in row))
    names = Text("\n".join(f"{t:>3} {name}" for t, name in enumerate(tasks, start=1)), style="dim")
    return Lines(title, *([names] if wide else []), table, caption)  # beside the table they would wrap to its width


def _comparison(results: Sequence[dict[str, Any]], decimals: int) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="Runs",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        caption="AP: higher is better. FT: lower is better. BWT: below 0 is forgetting.",
    )
    for column in ("order", "method", "model", "seed", "tasks", *MEASURES):
        table.add_column(column, justify="left" if column in ("order", "method", "model") else "right")
    for result in results:
        done = sum(any(score is not None for score in row) for row in result["R"])
        texts = [Text(str(result[key])) for key in ("order", "method", "model", "seed")]
        table.add_row(*texts, f"{done}/{len(result['tasks'])}", *(_number(result[k], decimals) for k in MEASURES))
    return table


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration; the label names the method and the options in which its order's runs differ."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        alike = {name: value for name, value in _options(run).items() if name != "seed"}
        members.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    groups = []
    for group in members.values():
        flat = _options(group[0])
        others = [_options(run) for run in runs if run.config["order"] == group[0].config["order"]]
        differing = [name for name in flat if len({json.dumps(other.get(name)) for other in others}) > 1]
        named = [f"{name}={flat[name]}" for name in differing if name not in ("method", "seed")]
        groups.append(Group(group[0].config["order"], ", ".join([group[0].config["method"], *named]), group))
    return groups


def _options(run: Run) -> dict[str, Any]:
    """All that may tell two runs apart."""
    seen = {"dtype": run.config["dtype"], "tasks": run.tasks, "code": run.config["code"][:8]}
    data = "".join(entry["sha256"] for entry in run.data.values())
    return {**options(run.config["config"]), **seen, "data": hashlib.sha256(data.encode()).hexdigest()[:8]}


def _methods(groups: Sequence[Group], decimals: int) -> str:
    rows = []
    for group in groups:
        finished = [run.result for run in group.runs if run.complete]
        cells = [_spread([result[key] for result in finished], decimals) for key in MEASURES]
        seeds = f"{len(finished)} of {len(group.runs)}"
        rows.append([group.label, group.order, group.runs[0].config["model"], seeds, *cells])
    return page.table(["method", "order", "model", "runs finished", *MEASURES], rows, numbers=3)


def _runs(groups: Sequence[Group], decimals: int) -> str:
    rows, links = [], []
    for group in groups:
        for run in group.runs:
            cells = [_number(run.result[key], decimals) for key in MEASURES]
            shown = [str(run.config["seed"]), run.config["dtype"], _progress(run), *cells, run.folder.name[-8:]]
            rows.append([group.label, group.order, *shown])
            links.append(run.folder.name)
    head = ["method", "order", "seed", "dtype", "state", *MEASURES, "run"]
    return page.table(head, rows, numbers=2, links=links)


def _section(run: Run, beside: Path, decimals: int, dpi: int) -> list[str]:
    """One run: what was learned from what, R, figures."""
    config = run.config
    title = f"{config['method']} on {config['order']}, seed {config['seed']}"
    parts = ['<section class="run">', page.heading(title, anchor=run.folder.name)]
    skipped = f" Skipped, files missing: {', '.join(config['skipped'])}." if config["skipped"] else ""
    about = f"{run.folder.name}: {_progress(run)}; {config['model']} in {config['dtype']} on {config['device']}."
    parts.append(page.note(about + skipped))
    if run.steps:
        parts += [page.heading("Scores", 3), _scores(run, decimals)]
        parts.append(page.note("Row: after learning that task. Column: score on task 1, 2, ... (R), then the means."))
        for name, (drawn, caption) in run_figures(run, decimals).items():
            parts.append(page.figure(drawn, caption, beside / f"{name}.png", dpi))
        parts += [page.heading("Tasks", 3), _tasks(run)]
    return [*parts, "</section>"]


def _scores(run: Run, decimals: int) -> str:
    numbers = [str(index) for index in range(1, len(run.tasks) + 1)]
    rows = []
    for step, row in zip(run.steps, run.R, strict=False):
        scores = [_number(score, decimals, missing="") for score in row]
        rows.append([f"{step.index} {step.task}", *scores, *(_number(step.scores[key], decimals) for key in MEASURES)])
    return page.table(["after task", *numbers, *MEASURES], rows, numbers=1)


def _tasks(run: Run) -> str:
    phases = ("prepare", "train", "update", "evaluate")
    rows = []
    for step in run.steps:
        data, scores = run.data[step.task], step.scores
        seconds = [f"{scores['seconds'].get(phase, 0):.1f}" for phase in phases]
        counts = [data["train"], data["test"], scores["truncated"], scores["trainable_parameters"]]
        digest = (data["dvc"] or data["sha256"])[:12]
        rows.append([f"{step.index} {step.task}", *(f"{n:,}" for n in counts), *seconds, digest])
    head = ["task", "train", "test", "truncated", "trainable parameters", *(f"{phase} (s)" for phase in phases), "data"]
    return page.table(head, rows, numbers=1)


def _progress(run: Run) -> str:
    return "finished" if run.complete else f"{len(run.steps)} of {len(run.tasks)} tasks"


def _number(value: float | None, decimals: int, missing: str = "-") -> str:
    return missing if value is None else f"{value:.{decimals}f}"


def _spread(values: Iterable[float | None], decimals: int) -> str:
    """Mean, and sample standard deviation of two values or more."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{decimals}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{decimals}f}"
