"""Measure, print the table, write results.json and the tables in README.md.

    python -m benchmarks                        # everything but gpu, which is for a machine with one
    python -m benchmarks generation subspaces   # these; other rows stay as they were measured

A group is a module here with `run() -> Iterable[Row]`.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, machine

GROUPS = ("training", "compiled", "generation", "evaluation", "subspaces", "covariance", "orchestration", "gpu")
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
        rows = []
        try:
            for row in importlib.import_module(f"benchmarks.{group}").run():
                rows.append(row)
                print(as_line(row.to_dict()), flush=True)
        finally:  # cut short, it keeps what it has
            print(f"-- {group}: {time.perf_counter() - started:.0f} s", flush=True)
            if rows:
                keep(group, [dataclasses.replace(row, machine=here) for row in rows])


def keep(group: str, rows: list[Row], folder: Path = FOLDER) -> None:
    """Put a group's rows in the place of its earlier ones, in results.json and README.md.

    Rows measured with a GPU and without one stand beside each other.
    """

    def place(row: dict[str, Any]) -> tuple[bool, int]:
        return "gpu" in row["machine"], GROUPS.index(row["group"])

    path, readme = folder / "results.json", folder / "README.md"
    new = [{"group": group, **row.to_dict()} for row in rows]
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = sorted([row for row in found if place(row) not in map(place, new)] + new, key=place)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(before + BEGIN + tables(found) + END + rest.partition(END)[2], encoding="utf-8")


def tables(rows: list[dict[str, Any]]) -> str:
    """A Markdown table per machine."""
    text = "\n"

    def named(row: dict[str, Any]) -> str:
        return as_text(row["machine"])

    for machine_text, of_machine in itertools.groupby(sorted(rows, key=named), named):
        text += f"\n{machine_text}:\n\n| what | ratio | target | holds | measured |\n|---|---:|---|---|---|\n"
        for row in of_machine:
            holds = {True: "yes", False: "**no**", None: ""}[row["holds"]]
            text += f"| {row['name']} | {row['ratio']:g} | {row['target']} | {holds} | {row['detail']} |\n"
    return text + "\n"


def as_text(named: dict[str, Any]) -> str:
    """A machine in words."""
    gpu = f"{named['gpu']}; " if "gpu" in named else ""
    return (
        f"{gpu}{named['cpu']}, {named['cores']} cores, {named['ram_gib']} GiB of RAM; torch {named['torch']} with "
        f"{named['threads']} threads, {named['dtype']}"
    )


def as_line(row: dict[str, Any]) -> str:
    """For the screen."""
    verdict = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
    return f"{row['ratio']:9.3f}  {row['target']:8} {verdict:7} {row['name']}  ({row['detail']})"


if __name__ == "__main__":
    main()
