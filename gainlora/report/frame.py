"""Runs as one tidy frame, their groups, and every statistic of a report.

    values    a row per run, step and measured value: run_id, step, metric, task, branch, value
    runs      a row per run: order, model, method, rule, gated, seed, group, name
    options   a row per run, a column per option that decides its result, values as JSON text

A group holds runs that differ only in the seed; base weights, device and library versions separate groups like any
option, so no mean mixes them. The code version separates runs only where one seed was run twice, since most changes of
code affect no result; `provenance` names the means that mix it.
"""

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from gainlora import rules
from gainlora.runs.records import MEASURES, PHASES, Key, Record

GATE_OPTIONS = ("gate.hidden", "gate.depth", "gate.score", "gate.initial_direction")
CONSTRAINTS = {"gate.initial_key": '"orthogonal"', "gate.constrain_update": "true"}
"""Options that constrain the gate -> the constraining value; other values are ablations."""
REPEATS = ("code", "run_id")
"""What separates the runs of a group in which a seed occurs twice."""
SETTING = ["order", "model"]
ROLES = ("own task", "earlier tasks", "later tasks")
DRAWS = 2000
"""Of a bootstrap."""
PAPER_TASKS = 15
"""Number of tasks in each of the paper's orders."""


class Frame:
    """Runs and their statistics."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = {record.run_id: record for record in records}
        self.runs = pd.DataFrame(map(_described, self.records.values()), self.records)
        self.options = pd.DataFrame(map(_decisive, self.records.values()), self.records).fillna("null")
        self.values = pd.DataFrame(
            [
                (run_id, record.learned(step), *key, value)
                for run_id, record in self.records.items()
                for step in record.steps
                for key, value in [*step.values.items(), *((Key(k), v) for k, v in record.measures(step).items())]
                if value is not None
            ],
            columns=["run_id", "step", "metric", "task", "branch", "value"],
        )
        self.runs["group"] = _joined(pd.concat([self.runs[[*SETTING, "method"]], self.options], axis=1))
        for name in REPEATS:
            again = self.runs.duplicated(["group", "seed"]).groupby(self.runs["group"]).transform("any")
            self.options[name] = self.runs[name].where(again, "null")
            self.runs["group"] += "|" + self.options[name]
        methods = self.options.groupby([self.runs[key] for key in (*SETTING, "method")])
        rare = methods.transform(lambda column: 2 * column.map(column.value_counts()) <= len(column))
        rare[[*REPEATS]] &= self.options[[*REPEATS]] != "null"
        self.runs["differing"] = [
            {name: self.options.at[run, name] for name in sorted(rare) if rare.at[run, name]} for run in self.runs.index
        ]
        self.runs["name"] = [named(row.method, row.differing) for row in self.runs.itertuples()]
        self.runs = self.runs.sort_values([*SETTING, "rule", "gated", "name", "seed"], kind="stable")

    # ---- groups ---------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> pd.DataFrame:
        """A row per group, in order of appearance, with the number of its runs and of its finished runs."""
        grouped = self.runs.groupby("group", sort=False)
        made = grouped.first().assign(runs=grouped.size(), finished=grouped["complete"].sum())
        of = [f"{row.finished} of {row.runs}" for row in made.itertuples()]
        made["seeds"] = made["finished"].astype(str).where(made["finished"] == made["runs"], of)
        return made

    def options_of(self, groups: pd.DataFrame, *names: str) -> pd.DataFrame:
        """Options per group, as JSON text; all without `names`."""
        table = self.options.loc[groups["run_id"]].set_axis(groups.index)
        return table.reindex(columns=[*names], fill_value="null") if names else table

    def without_variants(self, of: Collection[str]) -> pd.DataFrame:
        """The groups, except those that only vary the options `of` of the plain method."""
        groups = self.groups
        plain = groups[groups["name"] == groups["plain"]].set_index([*SETTING, "plain"])["run_id"]

        def varies(row: Any) -> bool:
            base = plain.get((row.order, row.model, row.plain), row.run_id)
            differs = self.options.loc[row.run_id] != self.options.loc[base]
            changed = set(differs[differs].index) - {"code"}
            return bool(changed) and changed <= set(of)

        return groups[[not varies(row) for row in groups.itertuples()]]

    def families(self, varied: Collection[str]) -> list[pd.DataFrame]:
        """Sets of finished groups that differ only in the options `varied`, with these as columns."""
        groups = self.groups[self.groups["finished"] > 0]
        if groups.empty:
            return []
        fixed = self.options_of(groups).drop(columns=[*varied, *REPEATS], errors="ignore")
        key = _joined(pd.concat([groups[SETTING], fixed], axis=1))
        parts = [part.join(self.options_of(part, *varied)) for _, part in groups.groupby(key, sort=False)]
        return [part for part in parts if len(part[[*varied]].drop_duplicates()) > 1]

    # ---- statistics -----------------------------------------------------------------------------

    @cached_property
    def final(self) -> pd.DataFrame:
        """MEASURES (columns) of the finished runs, with their group, seed and run_id."""
        finished = self.runs.loc[self.runs["complete"], ["group", "seed", "run_id"]]
        results = {run_id: self.records[run_id].result for run_id in finished.index}
        measures = pd.DataFrame({key: {run: result[key] for run, result in results.items()} for key in MEASURES})
        return finished.join(measures.astype(float))

    def measured(self, group: str, metric: str) -> pd.Series:
        """One of MEASURES, of a group's finished runs that have it."""
        return self.final.loc[self.final["group"] == group, metric].dropna()

    def by_step(self, group: str, metric: str, task: str | None = None) -> pd.DataFrame:
        """Mean, lowest and highest value per step, up to the last step of the shortest run; finished runs if any."""
        runs = self.runs[self.runs["group"] == group]
        runs = runs[runs["complete"]] if runs["complete"].any() else runs
        rows = self.values[self.values["run_id"].isin(runs.index) & (self.values["metric"] == metric)]
        rows = rows if task is None else rows[rows["task"] == task]
        table = rows.groupby("step")["value"].agg(["mean", "min", "max", "count"])
        return table[table["count"] == rows["run_id"].nunique()]

    def paired(self) -> pd.DataFrame:
        """Gated against equal integration of one rule: the same data, model, options and seeds, constraints in place.

        Columns: order, model, rule, name, only (number of unpaired seeds), both (AP, FT,
        AP_equal, FT_equal per seed), difference (gated minus equal AP per seed), examples (`example_bounds`).
        """
        groups = self.groups.assign(budget=self._budgets()).reset_index()
        constrained = (self.options_of(self.groups, *CONSTRAINTS) == [*CONSTRAINTS.values()]).all(axis=1)
        gated = groups[groups["gated"] & constrained.array]
        equal = groups[groups["plain"] == groups["rule"]]
        pairs = gated.merge(equal, on=[*SETTING, "rule", "budget"], suffixes=("", "_equal"))
        rows = []
        for pair in pairs.itertuples():
            sides = (pair.group, pair.group_equal)
            ours, theirs = (self.final[self.final["group"] == group].set_index("seed") for group in sides)
            both = ours.merge(theirs, left_index=True, right_index=True, suffixes=("", "_equal"))
            if len(both):
                only = len(ours.index.symmetric_difference(theirs.index))
                runs = both[["run_id", "run_id_equal"]].itertuples(index=False)
                examples = example_bounds([tuple(map(self.records.__getitem__, pair)) for pair in runs])
                gains = both["AP"] - both["AP_equal"]
                rows.append((pair.order, pair.model, pair.rule, pair.name, only, both, gains, examples))
        return pd.DataFrame(rows, columns=[*SETTING, "rule", "name", "only", "both", "difference", "examples"])

    def _budgets(self) -> pd.Series:
        """Per group what it shares with groups that other methods may be compared with: all options but theirs."""
        options = self.options_of(self.groups)
        own = [name for name in options if name.startswith("gate.")]
        free = [*own, "method", "subspace.gate_threshold", *REPEATS]
        return _joined(pd.concat([self.groups[SETTING], options.drop(columns=free, errors="ignore")], axis=1))

    def intransigence(self, group: str) -> pd.Series:
        """mean_i (R_single[i][i] - R[i][i]) per seed, beside finished runs of `single` with the same data and options:
        what a method learns less well than one branch alone. Empty without such runs."""
        budgets, LA = self._budgets(), self.final.set_index("seed")["LA"]
        beside = self.groups[(self.groups["plain"] == "single") & (budgets == budgets[group])]
        if beside.empty:
            return pd.Series(dtype=float)
        of = self.final["group"].array
        return (LA[of == beside.index[0]] - LA[of == group]).dropna()

    def at_end(self, group: str, metric: str) -> pd.Series:
        """A value of a group's finished runs after their last step, the mean over tasks, by run."""
        return self._at_end(group, metric).groupby("run_id")["value"].mean()

    def _at_end(self, group: str, metric: str) -> pd.DataFrame:
        """The rows of `values` of a metric after the last step of a group's finished runs."""
        runs = self.runs[(self.runs["group"] == group) & self.runs["complete"]]
        rows = self.values[self.values["run_id"].isin(runs.index) & (self.values["metric"] == metric)]
        return rows[rows["step"] == rows["run_id"].map(runs["tasks"])]

    def roles(self, group: str) -> pd.DataFrame:
        """Mean coefficient of each branch (row, from 1) on its own, earlier and later tasks, after the last task."""
        rows = self._at_end(group, "coefficient")
        tasks = self.records[self.groups.at[group, "run_id"]].tasks
        at = rows["task"].map({task: t for t, task in enumerate(tasks, start=1)})
        role = (at - rows["branch"].astype(int)).clip(-1, 1).map({0: "own task", -1: "earlier tasks", 1: "later tasks"})
        table = rows.assign(role=role).pivot_table(index="branch", columns="role", values="value", aggfunc="mean")
        return table.reindex(columns=list(ROLES))

    def costs(self, group: str) -> pd.DataFrame:
        """Per step, means over the group's runs: parameters trained and stored, seconds per task and per answer."""
        rows = []
        for record in (self.records[run_id] for run_id in self.runs.index[self.runs["group"] == group]):
            for step in record.steps:
                tests = sum(record.data[task]["test"] for task in record.tasks[: record.learned(step)])
                seconds = {phase: step.total(f"seconds.{phase}") or 0 for phase in PHASES}
                row = {"step": record.learned(step), "trainable": step.total("trainable_parameters")}
                row |= {"stored": step.total("stored"), "train": seconds["train"]}
                row |= {"passes": seconds["prepare"] + seconds["update"], "answer": seconds["evaluate"] / tests}
                rows.append(row)
        return pd.DataFrame(rows, dtype=float).groupby("step").mean()

    # ---- comparability ----------------------------------------------------------------------------

    def unequal(self, groups: pd.DataFrame) -> list[str]:
        """One sentence per order and model whose methods differ in options that their names do not show."""
        sentences = []
        for (order, model), here in groups.groupby(SETTING, sort=False):
            parts = []
            for name in sorted(set(self.options) - {"method", *REPEATS}):
                of = here[here["gated"]] if name.startswith("gate.") else here
                of = of.loc[[name not in differing for differing in of["differing"]]]
                values = self.options_of(of, name)[name]
                if values.nunique() > 1:
                    held = [f"{_plain(v)} for {', '.join(part['name'])}" for v, part in of.groupby(values, sort=False)]
                    parts.append(f"{name}: {'; '.join(held)}")
            if parts:
                sentences.append(f"Not the same for all methods on {order}, {model}: {'. '.join(parts)}.")
        return sentences

    def provenance(self) -> list[str]:
        """A sentence on the code versions of the runs and the means that mix them; none with one version."""
        if (total := self.runs["code"].nunique()) < 2:
            return []
        mixed = []
        for _, part in self.runs[self.runs["complete"]].groupby("group", sort=False):
            if part["code"].nunique() > 1:
                seeds = [f"{v[:12]} for seed {', '.join(map(str, p['seed']))}" for v, p in part.groupby("code")]
                mixed.append(f"{part['name'].iloc[0]} on {part['order'].iloc[0]} ({'; '.join(seeds)})")
        means = f"means over seeds that mix them: {len(mixed)}" + (f": {'. '.join(mixed)}" if mixed else "")
        return [f"{len(self.runs)} runs of {total} code versions; {means}."]

    # ---- the paper's figures --------------------------------------------------------------------

    def published_beside(self, group: str) -> pd.Series | None:
        """The row of `published()` for a group with the same setup, else None.

        The same model and order, all of its tasks and examples, no differing options but the published ablations.
        """
        row = self.groups.loc[group]
        runs = self.runs[(self.runs["group"] == group) & self.runs["complete"]]
        if not any(_whole(self.records[run_id]) for run_id in runs.index) or set(row["differing"]) - {*CONSTRAINTS}:
            return None
        words = [row["plain"]]
        if row["gated"]:
            key, update = (json.loads(self.options.at[row["run_id"], name]) for name in CONSTRAINTS)
            if key == "open":
                return None  # not one of the paper's ablations
            words += ["no-init"] * (key == "random") + ["no-update"] * (not update)
        table = published()
        same = table[(table[["model", "order", "method"]] == [row["model"], row["order"], " ".join(words)]).all(axis=1)]
        return None if same.empty else same.iloc[0]


@cache
def published() -> pd.DataFrame:
    """The paper's figures: model, method (with " no-init", " no-update"), order, AP, FT in percent."""
    with files("gainlora.report").joinpath("published.csv").open(encoding="utf-8") as lines:
        return pd.read_csv(lines, comment="#")


def spread(values: Any, decimals: int) -> str:
    """Mean, and sample standard deviation of two values or more: "84.7 ± 1.0"; "-" without values."""
    known = pd.Series(values, dtype=float).dropna()
    if known.empty:
        return "-"
    mean = f"{known.mean():.{decimals}f}"
    return mean if len(known) == 1 else f"{mean} ± {known.std():.{decimals}f}"


def bounds(differences: pd.Series) -> tuple[float, float]:
    """95 % t interval of the mean of paired differences; NaN for fewer than two pairs."""
    from scipy.stats import t

    half = t.ppf(0.975, len(differences) - 1) * differences.std() / len(differences) ** 0.5
    return differences.mean() - half, differences.mean() + half


def example_bounds(pairs: Sequence[tuple[Record, ...]]) -> tuple[float, float]:
    """95 % bootstrap interval over test examples of the difference of two methods' AP.

    Each draw takes every task's examples anew, the same ones for both methods and all seeds.

    Args:
        pairs: finished runs of the two methods with the same seed.

    Returns:
        NaN where a run does not record its examples' scores, or they are not the same examples.
    """
    found = [[record.example_scores(record.steps[-1]) for record in pair] for pair in pairs]
    sizes = {tuple((task, len(scores)) for task, scores in one.items()) for pair in found for one in pair}
    if len(sizes) != 1 or () in sizes:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    means = np.zeros(DRAWS)
    for task, n in (tasks := next(iter(sizes))):
        gains = np.mean([np.subtract(ours[task], theirs[task]) for ours, theirs in found], axis=0)  # (n,)
        means += gains[generator.integers(n, size=(DRAWS, n))].mean(1) / len(tasks)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def differs(differences: pd.Series, examples: tuple[float, float]) -> bool:
    """Whether two methods differ: both intervals, over seeds and over examples, exclude 0 on the same side."""
    low, high = bounds(differences)
    return (low > 0 and examples[0] > 0) or (high < 0 and examples[1] < 0)


def span(interval: tuple[float, float], decimals: int) -> str:
    """The ends of an interval as text; "-" for one of NaN."""
    return "-" if math.isnan(interval[0]) else f"{{:.{decimals}f}} to {{:.{decimals}f}}".format(*interval)


def named(method: str, differing: dict[str, str], *hidden: str) -> str:
    """The method and the differing options, except `hidden`."""
    shown = {name: _plain(v)[:8] if name in ("base", "code") else _plain(v) for name, v in differing.items()}
    shown = {name: v[-8:] if name == "run_id" else v for name, v in shown.items() if name not in hidden}
    return ", ".join([method, *(f"{name}={v}" for name, v in shown.items())])


def _plain(text: str) -> str:
    """A JSON text's value as params.yaml writes it."""
    return text[1:-1] if text.startswith('"') and text.endswith('"') else text


def _described(record: Record) -> dict[str, Any]:
    config = record.config
    plain = str(config["method"])
    row = {"run_id": record.run_id, "order": config["order"], "model": record.model, "method": record.method}
    row |= {"plain": plain, "rule": rules.bare(plain), "gated": plain.startswith(rules.GATED), "seed": config["seed"]}
    row |= {"tasks": len(record.tasks), "complete": record.complete, "code": config["code"]}
    return {**row, "is_bound": record.is_bound}


def _decisive(record: Record) -> dict[str, str]:
    """Everything that decides a run's result besides seed and code. Options without a value count as absent."""
    config, data = record.config, [[task, record.data[task]["sha256"]] for task in record.tasks]
    flat = {**record.options, "dtype": config["dtype"], "base": config.get("base"), "device": config["device"]}
    flat |= {f"version.{name}": found for name, found in config["versions"].items() if name != "gainlora"}
    flat["data"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:8]
    return {k: json.dumps(v, sort_keys=True) for k, v in flat.items() if k not in ("seed", "order.tasks")}


def _joined(frame: pd.DataFrame) -> pd.Series:
    return frame.astype(str).agg("|".join, axis=1)


def _whole(record: Record) -> bool:
    """Whether the run covers one of the paper's orders with every task and example."""
    limits = [record.options.get(f"data.{name}") for name in ("train_limit", "test_limit")]
    return limits == [None, None] and not record.config["skipped"] and len(record.tasks) == PAPER_TASKS
