"""One run: R for the terminal and for Markdown, its figures, its part of a report."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from gainlora.errors import printable
from gainlora.report import plots
from gainlora.report.page import Page, console_table, markdown_table, number
from gainlora.runs.records import MEASURES, PHASES, Key, Record


def matrix_table(results: Sequence[dict[str, Any]], decimals: int) -> RenderableType:
    """The content of one result.json as R for the terminal, or of several as a comparison.

    Returns:
        A rich renderable.
    """
    if len(results) != 1:
        rows = []
        for result in results:
            done = max((t for t, row in enumerate(result["R"], start=1) if row != [None] * len(row)), default=0)
            about = [str(result[key]) for key in ("order", "method", "model", "seed")]
            measures = [number(result[key], decimals) for key in MEASURES]
            rows.append([*about, f"{done}/{len(result['tasks'])}", *measures])
        caption = "AP: higher is better. FT: lower is better. BWT: below 0 is forgetting."
        head = ["order", "method", "model", "seed", "tasks", *MEASURES]
        return console_table(head, rows, 3, title="Runs", caption=caption, padding=(0, 1), collapse_padding=True)
    (result,) = results
    wide = len(result["tasks"]) > 8  # names would push the scores beyond 80 columns
    names = [f"{t} {name}" for t, name in enumerate(result["tasks"], start=1)]
    head = ["task" if wide else "after task", *map(str, range(1, len(names) + 1))]
    rows = [
        [name.split()[0] if wide else name, *(number(score, decimals, missing="").rjust(4) for score in row)]
        for name, row in zip(names, result["R"], strict=True)
    ]
    title = "{order}, {method}, {model}, seed {seed}".format_map(result)
    explained = Text("R: score on each task (column) after learning each task (row)", style="dim")
    line = Text("   ".join(f"{key} {number(result[key], decimals)}" for key in MEASURES), style="bold")
    listed = [Text(printable(name), style="dim") for name in names] if wide else []
    return Group(Text(printable(title)), *listed, console_table(head, rows, padding=0), explained, line)


def matrix_markdown(record: Record, decimals: int) -> str:
    """R and AP of the finished steps, as a Markdown table."""
    rows = [
        [step.task, *(number(score, decimals, missing="") for score in (*row, record.measures(step)["AP"]))]
        for step, row in zip(record.steps, record.R[-len(record.config["steps"]) :], strict=False)
    ]
    return markdown_table(["after", *record.tasks, "AP"], rows)


def run_heading(record: Record, name: str) -> str:
    """The heading of a run's section."""
    return f"{name} on {record.config['order']}, seed {record.config['seed']} ({record.run_id[-8:]})"


def progress(record: Record) -> str:
    """Whether the run is finished, or how far it is."""
    return "finished" if record.complete else f"{len(record.steps)} of {len(record.config['steps'])} tasks"


def run_section(page: Page, record: Record, name: str, decimals: int) -> None:
    """A run: its tasks and data, R, figures."""
    config = record.config
    about = f"{record.run_id}: {progress(record)}; {config['model']} in {config['dtype']} on {config['device']}."
    about += f" Skipped, files missing: {', '.join(config['skipped'])}." if config["skipped"] else ""
    about += f" {note[0].upper()}{note[1:]}." if (note := config.get("note")) else ""
    later = [entry["task"] for entry in config.get("learned", [])]
    about += f" Learned beyond the order: {', '.join(later)}." if later else ""
    page.heading(run_heading(record, name))
    page.note(about)
    if not record.steps:
        return
    rows, tasks = [], []
    for step in record.steps:
        scores = [number(score, decimals, missing="") for score in record.R[record.learned(step) - 1]]
        measures = record.measures(step)
        rows.append([f"{step.index} {step.task}", *scores, *(number(measures[key], decimals) for key in MEASURES)])
        counts = [f"{step.total(kind) or 0:,.0f}" for kind in ("truncated", "zero_rows", "trainable_parameters")]
        tasks.append([f"{step.index} {step.task}", *counts, *(number(step.total(f"seconds.{p}"), 1) for p in PHASES)])
    page.table(["after task", *map(str, range(1, len(record.tasks) + 1)), *MEASURES], rows)
    page.note("Row: after learning that task. Column: score on task 1, 2, ... (R), then the means.")
    for file, (drawn, caption) in run_figures(record, decimals).items():
        page.picture(drawn, caption, record.run_id, file)
    counted = ["learned", "truncated", "zero rows of A", "trainable parameters"]
    page.table([*counted, *(f"{phase} (s)" for phase in PHASES)], tasks)
    data = [(f"{t} {task}", record.data[task]) for t, task in enumerate(record.tasks, start=1)]
    data_rows = [[n, f"{d['train']:,}", f"{d['test']:,}", (d["dvc"] or d["sha256"])[:12]] for n, d in data]
    page.table(["task", "train", "test", "data"], data_rows)


def run_figures(record: Record, decimals: int) -> dict[str, tuple[Figure, str]]:
    """File name (without suffix) -> figure of a run with at least one finished task, and its caption."""
    tasks = record.tasks
    labels = [f"{t} {task}" for t, task in enumerate(tasks, start=1)]
    learned = pd.Index([f"{step.index} {step.task}" for step in record.steps], name="after learning task")
    R = pd.DataFrame(record.R, range(1, len(tasks) + 1), pd.Index(labels, name="score on task"), dtype=float)
    shown = R.loc[[record.learned(step) for step in record.steps]].set_axis(learned)
    made = {
        "accuracy_matrix": (
            plots.heat_map(shown, 100, decimals, "score"),
            "Accuracy matrix R. Read a column downwards: the score on one task while later ones are learned. A column "
            "that keeps its colour is a task that is not forgotten.",
        )
    }
    if not record.at_once:
        average = pd.DataFrame({"mean": {record.learned(s): record.measures(s)["AP"] for s in record.steps}})
        lines = {label: R[label].dropna().to_frame("mean") for label in labels if R[label].notna().any()}
        made["accuracy_curves"] = (
            plots.curves({"": {"AP (mean of seen)": average, **lines}}, "tasks learned", "score"),
            "The same scores over the sequence, each task from when it is learned. A falling line is forgetting.",
        )
    means, deviations = (_coefficients(record, metric) for metric in ("coefficient", "coefficient_sd"))
    if not means.empty:
        made["gate_coefficients"] = (
            plots.heat_map(means, 1, 2, "mean coefficient", deviations),
            f"Mean integration coefficient of every branch (column) on the test examples of every task (row), after "
            f"{len(record.steps)} of {len(tasks)} tasks; ±: standard deviation over the examples. Small values "
            "right of the diagonal: later branches stay off on earlier tasks.",
        )
    steps = {record.learned(step): {key.metric: v for key, v in step.values.items()} for step in record.steps}
    over = pd.DataFrame.from_dict(steps, orient="index").sort_index()
    memory = (
        "How full the memory is: the share of its input's directions that each stored basis keeps. New tasks learn in "
        "the rest; at 100 % none is left."
    )
    work = "Seconds of work per task, pauses left out. Evaluation grows with the tasks seen; training should not."
    for file, prefix, unit, caption in (
        ("basis_growth", "subspace_percent.", "% of d in the basis", memory),
        ("seconds", "seconds.", "seconds", work),
    ):
        names = [name for name in over if name.startswith(prefix)]
        lines = {n.removeprefix(prefix).replace(".", " "): over[n].dropna().to_frame("mean") for n in names}
        if lines:
            made[file] = plots.curves({"": lines}, "tasks learned", unit, bottom=0), caption
    scores = {f"{s.index} {s.task}": {row["step"]: row["score"] for row in s.validation} for s in record.steps}
    if curves := {label: pd.DataFrame({"mean": points}) for label, points in scores.items() if points}:
        caption = "Score on the validation split during training, a line per task."
        made["validation"] = plots.curves({"": curves}, "optimizer step", "validation score"), caption
    return made


def _coefficients(record: Record, metric: str) -> pd.DataFrame:
    """Coefficients after the last finished task: a row per evaluated task, a column per branch."""
    values, tasks = record.steps[-1].values, record.tasks
    seen = [t for t, task in enumerate(tasks, start=1) if Key(metric, task, 1) in values]
    rows = [[values.get(Key(metric, tasks[t - 1], b)) for b in range(1, len(seen) + 1)] for t in seen]
    index = pd.Index([f"{t} {tasks[t - 1]}" for t in seen], name="test examples of task")
    return pd.DataFrame(rows, index, pd.Index(index, name="branch learned on task"), dtype=float)
