"""Runs as tables for the terminal, and as a report: one HTML page, the same in Markdown, and its figures as files.

Numbers are those of the runs' scores.json; several seeds of one configuration give mean and sample standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gainlora.errors import GainLoRAError
from gainlora.tracking import comparison, costs, figures, gates
from gainlora.tracking.document import Block, Heading, Note, Picture, Table, save_picture
from gainlora.tracking.folder import Run, example_coefficients
from gainlora.tracking.groups import CONSTRAINTS, GATE_OPTIONS, Group, group_runs, number, without_variants
from gainlora.tracking.markdown import markdown_page
from gainlora.tracking.page import html_page
from gainlora.tracking.published import other_setup

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

MEASURES = ("AP", "FT", "BWT")
TITLE = "GainLoRA: continual learning runs"
DETAILED = 12
"""Runs that a report may show one by one; of more it has the table and what compares them."""


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
    line = "   ".join(f"{key} {number(results[0][key], decimals)}" for key in MEASURES)
    return Lines(_matrix(results[0], decimals), Text(line, style="bold"))


def write_report(runs: Sequence[Run], out: Path, report: dict[str, Any]) -> list[Path]:
    """Write a report: index.html, which needs no other file, report.md and figures/.

    Args:
        runs: finished or not; one that is given twice counts once.
        out: the page's folder (made when missing), or its file if it ends in .html; the rest goes beside it.
        report: params.yaml's section: decimals of tables, dpi of the PNG files.

    Returns:
        All files written, the page first.

    Raises:
        GainLoRAError: no runs.
    """
    if not runs:
        raise GainLoRAError("report: no runs; make one first (`gainlora run embedded`), or name run folders.")
    path = out if out.suffix == ".html" else out / "index.html"
    blocks = report_blocks(list({run.run_id: run for run in reversed(runs)}.values())[::-1], report["decimals"])
    path.parent.mkdir(parents=True, exist_ok=True)
    drawings, written = {}, []
    for picture in (block for block in blocks if isinstance(block, Picture)):
        drawings[picture.name], saved = save_picture(picture, path.parent, report["dpi"])
        written += saved
    path.write_text(html_page(TITLE, blocks, drawings), encoding="utf-8")
    text = path.parent / "report.md"
    text.write_text(markdown_page(TITLE, blocks), encoding="utf-8")
    return [path, text, *written]


def report_blocks(runs: Sequence[Run], decimals: int) -> list[Block]:
    """Everything that a report shows of the runs, in order."""
    groups = group_runs(runs)
    plain = without_variants(groups, (*GATE_OPTIONS, *CONSTRAINTS))
    blocks = [*comparison.methods(plain, decimals), *comparison.curves(plain)]
    blocks += gates.gate_outputs(without_variants(groups, GATE_OPTIONS))
    blocks += [*comparison.ablation(groups, decimals), *comparison.gate_options(groups, decimals)]
    blocks += [*costs.parameters(plain), *costs.ledger(plain), *other_setup(groups)]
    detailed = len(runs) <= DETAILED
    blocks += [Heading("Runs"), _runs(groups, decimals, detailed)]
    if not detailed:
        return [*blocks, Note(f"With {DETAILED} runs or fewer (`gainlora report RUN ...`) each is shown in detail.")]
    return blocks + [block for group in groups for run in group.runs for block in _section(run, group, decimals)]


def run_figures(run: Run, decimals: int) -> dict[str, tuple[Figure, str]]:
    """File name (without suffix) -> figure of a run with at least one finished task, and how to read it."""
    last = run.steps[-1]
    rows = [run.R[run.learned(step) - 1] for step in run.steps]
    made = {
        "accuracy_matrix": (
            figures.accuracy_matrix(run.tasks, [step.task for step in run.steps], rows, decimals),
            "Accuracy matrix R. Read a column downwards: what becomes of one task while later ones are learned. "
            "A column that keeps its colour is a task that is not forgotten.",
        ),
    }
    if not run.at_once:
        made["accuracy_curves"] = (
            figures.accuracy_curves(run.tasks, run.R),
            "The same scores over the sequence, each task from the moment it is learned. A falling line is "
            "forgetting; the thick line is the mean over the tasks seen so far.",
        )
    if last.coefficients:
        made["gate_coefficients"] = (
            figures.gate_coefficients(run.tasks, {task: row["mean"] for task, row in last.coefficients.items()}),
            f"Mean integration coefficient of every branch (column) on the test examples of every task (row), after "
            f"{len(run.steps)} of {len(run.tasks)} tasks. Small values right of the diagonal: later branches stay out "
            "of earlier tasks' way.",
        )
    examples = example_coefficients(last)
    if examples:
        made["coefficient_violins"] = (
            figures.coefficient_violins(run.tasks, examples),
            "The same coefficients over single examples, one panel per task that is asked; the task's own branch is "
            "hatched. The thick line holds the middle half, its mark is the median, the thin one goes from 5 % to "
            "95 %.",
        )
    if last.subspace["gate"] or last.subspace["layers"]:
        made["basis_growth"] = (
            figures.basis_growth([step.task for step in run.steps], [step.subspace for step in run.steps]),
            "How full the memory is: the share of its input's directions that each stored basis keeps, and which task "
            "added how much. New tasks learn in what is left over; at 100 % nothing is.",
        )
    made["time_line"] = (
        figures.time_line([step.task for step in run.steps], [step.scores["seconds"] for step in run.steps]),
        "Time line of the stream, pauses left out. Evaluation grows with the tasks seen; training should not.",
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
        table.add_row(Text(name), *(number(score, decimals, missing="") for score in row))
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
        done = max(
            (t for t, row in enumerate(result["R"], start=1) if any(score is not None for score in row)), default=0
        )
        texts = [Text(str(result[key])) for key in ("order", "method", "model", "seed")]
        table.add_row(*texts, f"{done}/{len(result['tasks'])}", *(number(result[k], decimals) for k in MEASURES))
    return table


def _runs(groups: Sequence[Group], decimals: int, linked: bool) -> Table:
    rows, links = [], []
    for group in groups:
        for run in group.runs:
            result, config = run.result, run.config
            described = [group.order, group.model, str(config["seed"]), config["dtype"], _progress(run)]
            values = [number(result[key], decimals) for key in MEASURES]
            rows.append([group.label, *described, *values, config["code"][:8], run.run_id[-8:]])
            links.append(run.run_id)
    head = ["method", "order", "model", "seed", "dtype", "state", *MEASURES, "code", "run"]
    return Table(head, rows, numbers=3, links=links if linked else ())


def _section(run: Run, group: Group, decimals: int) -> list[Block]:
    """One run: what was learned from what, R, figures."""
    config = run.config
    skipped = f" Skipped, files missing: {', '.join(config['skipped'])}." if config["skipped"] else ""
    about = f"{run.run_id}: {_progress(run)}; {config['model']} in {config['dtype']} on {config['device']}."
    later = [f"{entry['task']} ({entry['at'][:10]})" for entry in config.get("learned", [])]
    skipped += f" Learned beyond the order: {', '.join(later)}." if later else ""
    title = f"{group.label} on {group.order}, seed {config['seed']}"
    blocks: list[Block] = [Heading(title, anchor=run.run_id), Note(about + skipped)]
    if run.steps:
        blocks += [Heading("Scores", 3), _scores(run, decimals)]
        blocks.append(Note("Row: after learning that task. Column: score on task 1, 2, ... (R), then the means."))
        for name, (drawn, caption) in run_figures(run, decimals).items():
            blocks.append(Picture(drawn, caption, f"figures/{run.run_id}/{name}"))
        blocks += [Heading("Tasks", 3), _tasks(run), _data(run)]
    return blocks


def _scores(run: Run, decimals: int) -> Table:
    numbers = [str(index) for index in range(1, len(run.tasks) + 1)]
    rows = []
    for step in run.steps:
        scores = [number(score, decimals, missing="") for score in run.R[run.learned(step) - 1]]
        rows.append([f"{step.index} {step.task}", *scores, *(number(step.scores[key], decimals) for key in MEASURES)])
    return Table(["after task", *numbers, *MEASURES], rows, numbers=1)


def _tasks(run: Run) -> Table:
    phases = ("prepare", "train", "update", "evaluate")
    rows = []
    for step in run.steps:
        seconds = [f"{step.scores['seconds'].get(phase, 0):.1f}" for phase in phases]
        counts = [step.scores["truncated"], step.scores["trainable_parameters"]]
        rows.append([f"{step.index} {step.task}", *(f"{n:,}" for n in counts), *seconds])
    head = ["learned", "truncated", "trainable parameters", *(f"{phase} (s)" for phase in phases)]
    return Table(head, rows, numbers=1)


def _data(run: Run) -> Table:
    rows = []
    for t, task in enumerate(run.tasks, start=1):
        data = run.data[task]
        rows.append([f"{t} {task}", f"{data['train']:,}", f"{data['test']:,}", (data["dvc"] or data["sha256"])[:12]])
    return Table(["task", "train", "test", "data"], rows, numbers=1)


def _progress(run: Run) -> str:
    return "finished" if run.complete else f"{len(run.steps)} of {len(run.config['steps'])} tasks"
