"""The report of runs: a verdict, comparisons of methods, then every run; sections of a page over one `Frame`."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from gainlora import rules
from gainlora.errors import GainLoRAError
from gainlora.report import plots
from gainlora.report.frame import CONSTRAINTS, GATE_OPTIONS, ROLES, SETTING, Frame, bounds, differs, named, span, spread
from gainlora.report.one_run import progress, run_heading, run_section
from gainlora.report.page import Page, number
from gainlora.runs.records import MEASURES, Record
from gainlora.sections import ReportConfig

DETAILED = 12
"""Limit on runs that a report shows one by one; with more it has only tables and comparisons."""
RANK = 4
"""Of the paper's SuperNI experiments, on every model."""
EXPLAINED = (
    "AP, average performance: the mean score (0 to 100) over all tasks after the last one; higher is better. "
    "FT, forgetting: how far the earlier tasks fell from their best score, on average; lower is better. "
    "Several seeds: mean ± sample standard deviation; unfinished runs do not count."
)


def write_report(records: Sequence[Record], out: Path, report: ReportConfig) -> list[Path]:
    """Write a report: index.html (self-contained), report.md and figures/.

    Args:
        records: finished or not; duplicates count once.
        out: the page's folder (created if missing), or its file if it ends in .html, with the rest beside it.
        report: params.yaml's section: decimals of tables, dpi of the PNG files.

    Returns:
        All files written, the page first.

    Raises:
        GainLoRAError: no runs.
    """
    if not records:
        raise GainLoRAError("report: no runs; make one first (`gainlora run embedded`), or name run folders.")
    path = out if out.suffix == ".html" else out / "index.html"
    return report_page(records, report.decimals).write(path, report.dpi)


def report_page(records: Sequence[Record], decimals: int) -> Page:
    """The report, not written."""
    frame, page = Frame(records), Page("GainLoRA: continual learning runs")
    plain = frame.without_variants((*GATE_OPTIONS, *CONSTRAINTS))
    _verdict(page, frame, decimals)
    _methods(page, frame, plain, decimals)
    _learning(page, frame, frame.groups, decimals)
    _sequence(page, frame, plain, decimals)
    _gates(page, frame)
    _variants(page, frame, decimals)
    _parameters(page, plain)
    _costs(page, frame, plain)
    _runs(page, frame, decimals)
    return page


def _verdict(page: Page, frame: Frame, decimals: int) -> None:
    """The best method of each order and model, and what gates change."""
    page.heading("Verdict")
    paired = frame.paired()
    for order, model, here in _settings(frame.groups[~frame.groups["is_bound"] & (frame.groups["finished"] > 0)]):
        AP, FT = ({group: frame.measured(group, key) for group in here.index} for key in ("AP", "FT"))
        best = max(here.index, key=lambda group: AP[group].mean())
        texts = [
            f"highest AP {spread(AP[best], decimals)} with FT {spread(FT[best], decimals)} by {here.at[best, 'name']} "
            f"(seeds: {len(AP[best])})"
        ]
        for pair in paired[(paired["order"] == order) & (paired["model"] == model)].itertuples():
            several = len(pair.difference) > 1
            shown = f"95 % over seeds {span(bounds(pair.difference), decimals)}" if several else "one seed"
            shown += f"; over examples {span(pair.examples, decimals)}"
            shown += "" if differs(pair.difference, pair.examples) else ": no difference shown"
            FTs = (f"{pair.both[name].mean():.{decimals}f}" for name in ("FT_equal", "FT"))
            texts.append(
                f"the gates of {pair.name} change AP by {_signed(pair.difference, decimals)} ({shown}), "
                f"FT from {' to '.join(FTs)}"
            )
        page.note(f"{order}, {model}: {'; '.join(texts)}.")


def _signed(differences: pd.Series, decimals: int) -> str:
    return f"{round(differences.mean(), decimals) + 0.0:+.{decimals}f}"  # not -0.0


def _methods(page: Page, frame: Frame, groups: pd.DataFrame, decimals: int) -> None:
    """Methods as rows, AP and FT of each order as columns, a table per model; gated against equal integration."""
    page.heading("Methods")
    for model, here in groups.groupby("model", sort=False):
        page.heading(str(model), 3)
        beside = {group: frame.published_beside(group) for group in here.index}
        columns: dict[str, dict[str, str]] = {}
        for group, row in here.iterrows():
            shown = {key: spread(frame.measured(group, key), decimals) for key in ("AP", "FT")}
            shown["seeds"] = row["seeds"]
            if any(beside[other] is not None for other in here.index[here["order"] == row["order"]]):
                shown["published AP"], shown["published FT"] = _paper_cells(beside[group])
            for key, text in shown.items():
                columns.setdefault(f"{row['order']} {key}", {})[row["name"]] = text
        table = pd.DataFrame(columns, here["name"].unique()).fillna("-")
        page.table(["method", *table], [[name, *row] for name, row in zip(table.index, table.to_numpy(), strict=True)])
    page.note(EXPLAINED, *frame.provenance(), *frame.unequal(groups))
    rows = []
    for pair in frame.paired().itertuples():
        cells = [spread(pair.both[name], decimals) for name in ("AP_equal", "AP", "FT_equal", "FT")]
        counted = f"{len(pair.both)}" + (f" ({pair.only} of one side left out)" if pair.only else "")
        row = [pair.name, pair.order, pair.model, counted, *cells[:2], _signed(pair.difference, decimals)]
        intervals = span(bounds(pair.difference), decimals), span(pair.examples, decimals)
        rows.append([*row, *intervals, "yes" if differs(pair.difference, pair.examples) else "no", *cells[2:]])
    if rows:
        page.heading("Gated against equal integration", 3)
        head = ["gated method", *SETTING, "seeds", "AP, equal", "AP, gated", "difference"]
        head += ["95 % over seeds", "95 % over examples", "differ"]
        page.table([*head, "FT, equal", "FT, gated"], rows, numbers=3)
        page.note(
            "Gated against equal integration of the same rule with the same data, model, options and seeds: paired "
            "differences, with the t interval of their mean over seeds and a bootstrap interval over the test "
            "examples, the same for both methods. They differ where both intervals exclude 0; a single seed shows no "
            "difference."
        )


def _learning(page: Page, frame: Frame, groups: pd.DataFrame, decimals: int) -> None:
    """What was learned, passed on to later tasks and lost in general, and the gates as routers."""
    rows = []
    for group, row in groups[groups["finished"] > 0].iterrows():
        loss, base = (frame.at_end(group, f"general.{kind}") for kind in ("loss", "base_loss"))
        cells = [spread(frame.measured(group, key), decimals) for key in ("LA", "AIA", "FWT")]
        cells += [spread(frame.intransigence(group), decimals), spread(loss - base, 3)]
        others = (("general.kl", 3), ("top1", 2), ("auc", 2))
        cells += [spread(frame.at_end(group, key), digits) for key, digits in others]
        if set(cells) != {"-"}:
            rows.append([row["name"], row["order"], row["model"], *cells])
    if rows:
        page.heading("Learning, transfer and general ability")
        head = ["method", *SETTING, "LA", "AIA", "FWT", "intransigence", "general loss", "KL", "top-1", "AUC"]
        page.table(head, rows, numbers=3)
        page.note(
            "LA: mean score of each task just after it was learned. AIA: mean of AP after each task. FWT: what "
            "earlier tasks changed on a task before it was learned. Intransigence: LA of the method single minus LA, "
            "at the same seeds. General loss: rise over the base model on plain text that no task contains, nats a "
            "token; KL: divergence from the base model there. Top-1 and AUC: the coefficients as a router between "
            "tasks (share of prompts on which the task's own branch has the largest coefficient; 0.5 of AUC is "
            "chance)."
        )


def _sequence(page: Page, frame: Frame, groups: pd.DataFrame, decimals: int) -> None:
    """AP over the sequence, AP and FT at its end, and single tasks under seqlora and the best gated method."""
    started = groups[groups["run_id"].isin(frame.values["run_id"])]
    for order, model, here in _settings(started, page, "Over the sequence"):
        lines = {}
        for group, row in here.iterrows():
            curve = frame.by_step(group, "AP")
            level = curve.index.min() > 1 and row["tasks"] == curve.index.min()  # all tasks at once
            seeds = f" ({row['seeds']} seeds)" if row["finished"] > 1 else ""
            lines[row["name"] + seeds] = pd.concat([curve.set_axis([1]), curve]) if level else curve
        page.picture(
            plots.curves({"AP over the tasks seen": lines}, "tasks learned", "AP"),
            f"{order}, {model}: average performance over the tasks seen so far. The higher a line stays, the less is "
            "lost. Solid: gated. Bands span the seeds; a level line learns all tasks at once.",
            f"{order}-{model}-curves",
        )
        ends = {}
        for key, title in (("AP", "AP (higher is better)"), ("FT", "FT, forgetting (lower is better)")):
            moments = {row["name"]: frame.measured(group, key).agg(["mean", "std"]) for group, row in here.iterrows()}
            ends[title] = pd.DataFrame(moments).T
        if any(table["mean"].notna().any() for table in ends.values()):
            caption = f"{order}, {model}: AP and FT after the last task; error bars: standard deviation over the seeds."
            page.picture(plots.bars(ends, decimals), caption, f"{order}-{model}-forgetting")
        _single_tasks(page, frame, here)


def _single_tasks(page: Page, frame: Frame, groups: pd.DataFrame) -> None:
    means = groups.assign(AP=[frame.measured(group, "AP").mean() for group in groups.index]).dropna(subset="AP")
    gated, plain = means[means["gated"]], means[means["name"] == "seqlora"]
    if gated.empty or plain.empty:
        return
    best = gated.loc[gated["AP"].idxmax()]
    panels = {
        f"{t} {task}": {row["name"]: frame.by_step(str(row.name), "score", task) for row in (plain.iloc[0], best)}
        for t, task in enumerate(frame.records[best["run_id"]].tasks, start=1)
    }
    page.picture(
        plots.curves(panels, "tasks learned", "score", columns=3),
        f"{best['order']}, {best['model']}: score on each task from when it is learned to the end, under one branch "
        "for all tasks (seqlora) and under the gated method with the highest AP. A falling line is forgetting.",
        f"{best['order']}-{best['model']}-tasks",
    )


def _gates(page: Page, frame: Frame) -> None:
    """Coefficients of every branch on its own, earlier and later tasks, for all finished groups with gates."""
    groups = frame.without_variants(GATE_OPTIONS)
    groups = groups[groups["gated"] & (groups["finished"] > 0)]
    for order, model, here in _settings(groups, page, "Gates on old and new tasks"):
        roles = {row["name"]: frame.roles(group) for group, row in here.iterrows()}
        branches = range(1, 1 + max(map(len, roles.values())))
        rows = []
        for name, role in itertools.product(roles, ROLES):
            values = roles[name][role].reindex(branches)
            rows.append([name, role, *(number(value, 2) for value in (*values, values.mean()))])
        panels = {role: pd.DataFrame({"mean": {name: roles[name][role].mean() for name in roles}}) for role in ROLES}
        page.picture(
            plots.bars(panels, 2),
            f"{order}, {model}: mean coefficient of the branches after all tasks. High on its own task: it is used "
            "where it was learned. Low on earlier tasks: it leaves them as they were, which is what the constraints on "
            "the gate are for. Nothing constrains it on later tasks.",
            f"{order}-{model}-gates",
        )
        page.table(["method", "coefficient on", *map(str, branches), "mean"], rows, numbers=2)
    if not groups.empty:
        page.note("A column per branch. Coefficients lie in [0, 1); means over test examples, tasks and seeds.")


def _variants(page: Page, frame: Frame, decimals: int) -> None:
    """Runs that differ only in the gate's constraints, or in one other option."""
    single = [(name,) for name in (*GATE_OPTIONS, "train.learning_rate", "data.instruction")]
    tables = [(names, frame.families(names)) for names in (tuple(CONSTRAINTS), *single)]
    tables = [
        (names, [family for family in found if family["gated"].iloc[0] or not names[0].startswith("gate.")])
        for names, found in tables
    ]
    if not any(found for _, found in tables):
        return
    page.heading("Variants")
    page.note("Runs in one table differ in nothing but the options in its columns.")
    for varied, found in (table for table in tables if table[1]):
        known = any(frame.published_beside(group) is not None for family in found for group in family.index)
        rows = []
        for family in found:
            for group, row in sorted(family.iterrows(), key=lambda item: _natural(item[1][[*varied]])):
                cells = [named(row["plain"], row["differing"], *varied), row["order"], row["model"]]
                cells += [*(row[name].strip('"') for name in varied), row["seeds"]]
                cells += [spread(frame.measured(group, key), decimals) for key in ("AP", "FT", "LA")]
                rows.append(cells + (_paper_cells(frame.published_beside(group)) if known else []))
        beside = ["published AP", "published FT"] if known else []
        head = ["method", *SETTING, *varied, "seeds", "AP", "FT", "LA", *beside]
        page.heading("Constraints of the gate" if len(varied) > 1 else varied[0], 3)
        page.table(head, rows, numbers=3)


def _parameters(page: Page, groups: pd.DataFrame) -> None:
    """Trainable parameters per task, for the runs' methods on every model with known shapes."""
    from gainlora.model.shapes import MODELS, trainable_parameters  # imports torch

    known: dict[tuple[int, ...], list[str]] = {}
    for method in groups["plain"].unique():
        if method in rules.methods():
            known.setdefault(tuple(trainable_parameters(model, method, RANK) for model in MODELS), []).append(method)
    if known:
        page.heading("Trainable parameters")
        rows = [[", ".join(names), *(f"{count:,}" for count in counts)] for counts, names in known.items()]
        page.table(["method", *MODELS], rows)
        page.note(
            "Parameters that train while a task is learned: its branch and, with gates, its gate. Counted on the "
            f"models' shapes, with the paper's settings for SuperNI: rank {RANK}, gates 100 (T5) or 50 (Llama) wide."
        )


def _costs(page: Page, frame: Frame, groups: pd.DataFrame) -> None:
    """Parameters and seconds, after the first and the last task."""
    started = groups[groups["run_id"].isin(frame.values["run_id"])]
    for order, model, here in _settings(started, page, "Costs"):
        costs = {row["name"]: frame.costs(group) for group, row in here.iterrows()}
        rows = []
        for name, table in costs.items():
            first, last = table.iloc[0], table.iloc[-1]
            kept = ["-" if pd.isna(count) else f"{count:,.0f}" for count in (last.trainable, first.stored, last.stored)]
            seconds = [f"{mean:.1f}" for mean in (table.train.mean(), table.passes.mean())]
            seconds += [f"{answer:.3f}" for answer in (first.answer, last.answer)]
            rows.append([name, f"{table.index[0]:.0f}, {table.index[-1]:.0f}", *kept, *seconds])
        head = [
            f"{order}, method", "after tasks", "trainable parameters", "stored, first", "stored, last",
            "train (s per task)", "passes (s per task)", "answer (s), first", "answer (s), last",
        ]  # fmt: skip
        ends = {
            "stored parameters": {name: table.stored.iloc[-1] for name, table in costs.items()},
            "learning a task (s)": {name: (table.train + table.passes).mean() for name, table in costs.items()},
            "answering an example (s)": {name: table.answer.iloc[-1] for name, table in costs.items()},
        }
        made = [frame.records[run].config for run in frame.runs.index[frame.runs["group"].isin(here.index)]]
        devices = "; ".join(sorted({f"{config['device']}, {config['dtype']}" for config in made}))
        caption = f"{order}, {model}: costs after the last task. Measured on: {devices}."
        page.table(head, rows)
        bars = plots.bars({title: pd.DataFrame({"mean": of}) for title, of in ends.items()}, 3)
        page.picture(bars, caption, f"{order}-{model}-costs")
    if not started.empty:
        page.note(
            "Stored: all branches, gates and bases, and what a rule keeps. Passes: the covariance passes before and "
            "after training. The base model is not counted. Seconds are as measured, on a machine that may have had "
            "other work."
        )


def _runs(page: Page, frame: Frame, decimals: int) -> None:
    """A row per run; if they are few, each in detail."""
    page.heading("Runs")
    few, rows = len(frame.runs) <= DETAILED, []
    for run_id, row in frame.runs.iterrows():
        record = frame.records[run_id]
        about = [row["name"], row["order"], row["model"], str(row["seed"]), record.config["dtype"], progress(record)]
        values = [number(record.result[key], decimals) for key in MEASURES]
        date = record.config.get("created", "-")[:10]
        rows.append([*about, *values, row["code"][:8], date, run_id[-8:]])
    headings = [run_heading(frame.records[run_id], row["name"]) for run_id, row in frame.runs.iterrows()]
    head = ["method", *SETTING, "seed", "dtype", "state", *MEASURES, "code", "begun", "run"]
    page.table(head, rows, numbers=3, links=headings if few else ())
    for run_id, row in frame.runs.iterrows() if few else ():
        run_section(page, frame.records[run_id], row["name"], decimals)
    if not few:
        page.note(f"With {DETAILED} runs or fewer (gainlora report RUN ...) each is shown in detail.")


def _settings(
    groups: pd.DataFrame, page: Page | None = None, heading: str = ""
) -> Iterable[tuple[str, str, pd.DataFrame]]:
    """The groups of each order and model, which one table or figure compares; if there are any, after a heading."""
    if page and not groups.empty:
        page.heading(heading)
    for (order, model), here in groups.groupby(SETTING, sort=False):
        yield str(order), str(model), here


def _paper_cells(row: pd.Series | None) -> list[str]:
    """AP and FT as published; "-" without values."""
    return ["-", "-"] if row is None else [f"{row[key]:.2f}" for key in ("AP", "FT")]


def _natural(options: pd.Series) -> list[tuple[bool, float, str]]:
    """Sort key: constraining values first, then numbers by size, then words."""
    numbers = pd.to_numeric(options, errors="coerce").fillna(float("inf"))
    return [(text != CONSTRAINTS.get(name), numbers[name], text.strip('"')) for name, text in options.items()]
