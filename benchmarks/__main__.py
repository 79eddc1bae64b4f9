"""Measure, print the table, write results.json and the tables in README.md.

    python -m benchmarks                        # everything but gpu, which is for a machine with one
    python -m benchmarks generation subspaces   # these; other rows stay as they were measured

A group is a module here with `run() -> list[Row]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, machine

GROUPS = ("training", "generation", "evaluation", "subspaces", "covariance", "orchestration", "gpu")
FOLDER = Path(__file__).parent
BEGIN, END = "<!-- made by python -m benchmarks: begin -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    groups = parser.parse_args().groups
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(GROUPS)}")
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft
    here = machine()
    for group in groups or (GROUPS if torch.cuda.is_available() else GROUPS[:-1]):
        started = time.perf_counter()
        rows = importlib.import_module(f"benchmarks.{group}").run()
        for row in rows:
            print(as_line(row.to_dict()), flush=True)
        print(f"-- {group}: {time.perf_counter() - started:.0f} s", flush=True)
        keep([dataclasses.replace(row, machine=here) for row in rows])


def keep(rows: list[Row], folder: Path = FOLDER) -> None:
    """Put rows in the place of those of the same name and machine, or at the end, in results.json and README.md."""
    path = folder / "results.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for new in map(Row.to_dict, rows):
        same = [i for i, old in enumerate(found) if (old["name"], old["machine"]) == (new["name"], new["machine"])]
        found[same[0] if same else len(found) :] = [new, *found[same[0] + 1 :]] if same else [new]
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    readme = folder / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(before + BEGIN + tables(found) + END + rest.partition(END)[2], encoding="utf-8")


def tables(rows: list[dict[str, Any]]) -> str:
    """A Markdown table per machine."""
    text = ""
    for named in [m for i, m in enumerate(r["machine"] for r in rows) if m not in [r["machine"] for r in rows[:i]]]:
        text += "\n\n" + ", ".join(
            f"{value} {key}" if key in ("cores", "threads") else str(value) for key, value in shown(named).items()
        )
        text += "\n\n| what | ratio | target | holds | measured |\n|---|---:|---|---|---|\n"
        for row in rows:
            if row["machine"] == named:
                text += f"| {row['name']} | {row['ratio']:g} | {row['target']} | {holds(row)} | {row['detail']} |\n"
    return text + "\n"


def shown(named: dict[str, Any]) -> dict[str, Any]:
    """A machine's entries with their units."""
    return {**named, "ram_gib": f"{named['ram_gib']} GiB", "torch": f"torch {named['torch']}"}


def holds(row: dict[str, Any]) -> str:
    """yes, no, or nothing where nothing is asked."""
    return {True: "yes", False: "**no**", None: ""}[row["holds"]]


def as_line(row: dict[str, Any]) -> str:
    """For the screen."""
    verdict = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
    return f"{row['ratio']:9.3f}  {row['target']:8} {verdict:7} {row['name']}  ({row['detail']})"


if __name__ == "__main__":
    main()
