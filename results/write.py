"""Writes what this repository says of its results, from the result files alone:

    python results/write.py

README.md here, report.md and figures/; the picture, its caption and the table of the main README.md. `templates/` holds
the words; each figure in them is a call of a method of `Figures`.
"""

import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.image import imread, imsave

from gainlora.report.frame import Frame, bounds, example_bounds, span, spread
from gainlora.report.one_run import run_figures
from gainlora.report.report import write_report
from gainlora.runs.records import Record, read_result_file
from gainlora.sections import ReportConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PICTURE = ROOT / "docs/images/forgetting.png"
PICTURED = {"seqlora": "Sequential LoRA", "gainlora-inflora": "GainLoRA"}


class Figures:
    """What templates can ask of the results. A method may carry a label: "inflora+lr3e-4"; seed: None is all seeds."""

    def __init__(self, records: list[Record]) -> None:
        self.records, self.frame = records, Frame(records)

    def runs(
        self, method: str, order: str = "long5", model: str = "smollm2-135m", seed: int | None = None
    ) -> list[Record]:
        """Finished runs, by seed."""
        wanted = [
            record
            for record in self.records
            if (record.method, record.config["order"], record.model) == (method, order, model)
            and seed in (None, record.config["seed"])
        ]
        return sorted(wanted, key=lambda record: int(record.config["seed"]))

    def value(self, measure: str, method: str, digits: int = 1, **where: Any) -> str:
        """The mean over seeds of AP, FT, LA, ..., or of a value after the last task ("top1", mean over tasks)."""
        return f"{self._values(measure, method, **where).mean():.{digits}f}"

    def cell(self, measure: str, method: str, **where: Any) -> str:
        """Mean and standard deviation over seeds; "-" without runs."""
        return spread(self._values(measure, method, **where), 1) if self.runs(method, **where) else "-"

    def _values(self, measure: str, method: str, **where: Any) -> pd.Series:
        runs = self.runs(method, **where)
        if not runs:
            raise LookupError(f"no finished run of {method} {where}")
        if measure in runs[0].result:
            return pd.Series([record.result[measure] for record in runs], dtype=float)
        return pd.Series([self._at_end(record, measure) for record in runs])

    def _at_end(self, record: Record, metric: str) -> float:
        rows = self.frame.values
        rows = rows[(rows["run_id"] == record.run_id) & (rows["metric"] == metric)]
        return float(rows.loc[rows["step"] == len(record.tasks), "value"].mean())

    def rise(self, method: str, **where: Any) -> str:
        """Rise of the loss on text outside the tasks, nats a token."""
        loss, base = (self._values(f"general.{kind}", method, **where) for kind in ("loss", "base_loss"))
        return f"{(loss - base).mean():.2f}"

    def gain(self, method: str, over: str, **where: Any) -> dict[str, str]:
        """AP of a method minus another's at the same seeds: mean, and 95 % intervals over seeds and over examples."""
        sides = [{record.config["seed"]: record for record in self.runs(name, **where)} for name in (method, over)]
        pairs = [tuple(side[seed] for side in sides) for seed in sorted(sides[0].keys() & sides[1].keys())]
        differences = pd.Series([one.result["AP"] - other.result["AP"] for one, other in pairs], dtype=float)
        return {
            "mean": f"{differences.mean():+.1f}",
            "size": f"{abs(differences.mean()):.1f}",
            "seeds": span(bounds(differences), 1) if len(pairs) > 1 else "one seed",
            "examples": span(example_bounds(pairs), 1),
        }

    def coefficients(self, role: str, *methods: str, digits: int = 2, **where: Any) -> str:
        """Mean coefficient of branches on their own, earlier or later tasks: "0.06 to 0.21" over runs."""
        means = [self._role(record, role) for method in methods for record in self.runs(method, **where)]
        ends = sorted({f"{end:.{digits}f}" for end in (min(means), max(means))})
        return " to ".join(ends)

    def _role(self, record: Record, role: str) -> float:
        one = Frame([record])
        return float(one.roles(one.groups.index[0])[role].mean())

    def own(self, branch: int, method: str, **where: Any) -> str:
        """Mean coefficient of branch 1, 2, ... on its own task, after the last one."""
        one = Frame(self.runs(method, **where))
        return f"{one.roles(one.groups.index[0])['own task'].iloc[branch - 1]:.2f}"

    def total(self, metric: str, method: str, **where: Any) -> str:
        """A count's sum over all steps of the first run."""
        rows = self.frame.values
        rows = rows[(rows["run_id"] == self.runs(method, **where)[0].run_id) & (rows["metric"] == metric)]
        assert len(rows), metric
        return f"{rows['value'].sum():.0f}"

    def zeros(self, method: str, **where: Any) -> int:
        """Number of tasks with a score of 0 after the last task, in the first run."""
        return self.runs(method, **where)[0].R[-1].count(0)

    def majority(self, task: str, method: str, **where: Any) -> str:
        """Score of the task's most frequent label."""
        rows = self.frame.values
        rows = rows[(rows["run_id"] == self.runs(method, **where)[0].run_id) & (rows["metric"] == "majority")]
        return f"{rows.loc[rows['task'] == task, 'value'].iloc[0]:.0f}"

    def score(self, task: str, method: str, step: int | None = None, **where: Any) -> str:
        """Score on a task after the last task, or after task `step` (from 1); mean over seeds."""
        runs = self.runs(method, **where)
        at = runs[0].tasks.index(task)
        rows = [record.R[-1 if step is None else step - 1] for record in runs]
        return f"{np.mean([row[at] for row in rows]):.0f}"


def texts(figures: Figures) -> dict[Path, str]:
    """Path -> content of every written text but the report."""
    words = Environment(
        loader=FileSystemLoader(HERE / "templates"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    words.globals["f"] = figures
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("caption", "table"):
        block = words.get_template(f"{name}.md.j2").render()
        begin, end = f"<!-- {name}: written by results/write.py -->\n", f"<!-- {name}: end -->"
        readme, found = re.subn(
            f"({begin}).*?({end})", lambda ends, block=block: ends[1] + block + ends[2], readme, flags=re.S
        )
        assert found == 1, f"README.md: no place for {name}"
    return {ROOT / "README.md": readme, HERE / "README.md": words.get_template("README.md.j2").render()}


def draw(figures: Figures, model: str) -> None:
    """The picture: R of two methods, seed 42, side by side."""
    images = []
    for method, title in PICTURED.items():
        record = figures.runs(method, model=model, seed=42)[0]
        figure, _ = run_figures(record, decimals=0)["accuracy_matrix"]
        average, forgetting = (record.result[name] for name in ("AP", "FT"))
        figure.suptitle(f"{title}: AP {average:.1f}, FT {forgetting:.1f}", fontsize=11, fontweight="bold")
        figure.set_size_inches(4.7, 3.6)
        png = BytesIO()
        figure.savefig(png, dpi=150)
        images.append(imread(BytesIO(png.getvalue())))
    imsave(PICTURE, np.hstack(images), metadata={"Software": None})


def main() -> None:
    records = [read_result_file(path) for path in sorted(HERE.glob("*/*.json"))]
    figures = Figures(records)
    for path, text in texts(figures).items():
        path.write_text(text, encoding="utf-8")
    write_report(records, HERE, ReportConfig())
    draw(figures, "gemma-3-270m")


if __name__ == "__main__":
    main()
