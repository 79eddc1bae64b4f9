"""Commands that show what was learned: report, results."""

from __future__ import annotations

import argparse
from pathlib import Path

from gainlora.cli.parser import Commands


def add(commands: Commands) -> None:
    """Their parsers."""
    report = commands.add_parser("report", help="tables and figures of runs: index.html, report.md, figures/")
    report.add_argument("runs", nargs="*", type=Path, help="run folders and result files; none: all runs in MLflow")
    report.add_argument("--out", type=Path, default=Path("report"), help="folder of the page (default: report)")
    report.set_defaults(command=_report)

    results = commands.add_parser("results", help="finished runs as small JSON files, to keep in version control")
    results.add_argument("runs", nargs="+", type=Path, help="run folders")
    results.add_argument("--out", type=Path, default=Path("results"), help="folder of the files (default: results)")
    results.add_argument("--label", default="", help="names what differs from the plain method, e.g. no-init")
    results.set_defaults(command=_results)


def _report(options: argparse.Namespace) -> int:
    from gainlora.params import side_section
    from gainlora.tracking.report import write_report
    from gainlora.tracking.results import read_any

    section = side_section("report")
    if options.runs:
        print(write_report([read_any(path) for path in options.runs], options.out, section)[0])
        return 0
    from gainlora.tracking.mlflow_runs import report_tracked

    print(report_tracked(options.out, side_section("tracking"), section)[0])
    return 0


def _results(options: argparse.Namespace) -> int:
    from gainlora.tracking.folder import read_run
    from gainlora.tracking.results import export

    for run in [read_run(folder) for folder in options.runs]:
        print(export(run, options.out, options.label))
    return 0
