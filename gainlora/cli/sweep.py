"""The command that learns many runs: sweep."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from gainlora.cli.parser import Commands
from gainlora.cli.runs import check_run, set_option
from gainlora.errors import GainLoRAError


def add(commands: Commands) -> None:
    """Its parser."""
    sweep = commands.add_parser("sweep", help="run orders x methods x seeds side by side; continues a stopped sweep")
    sweep.add_argument("orders", nargs="*", metavar="ORDER", help="with --plan: only these of it")
    sweep.add_argument("--methods", type=_names, metavar="A,B,...", help="default: params.yaml's method")
    sweep.add_argument("--seeds", type=_seeds, metavar="1,2,...", help="default: params.yaml's seed")
    sweep.add_argument(
        "--set", dest="options", action="append", default=[], metavar="OPTION=VALUE", type=set_option,
        help="of every run, e.g. --set model.name=t5-large",
    )  # fmt: skip
    sweep.add_argument("--plan", metavar="FILE", help="a YAML file that says all of this, e.g. results/plan.yaml")
    sweep.add_argument(
        "--results", metavar="DIR", help="write result files; runs whose file is there are not run again"
    )
    sweep.add_argument(
        "--jobs", type=int, metavar="N", help="runs side by side (default: 1, or as `make serve` was told)"
    )
    sweep.add_argument("--list", action="store_true", help="print the command of each run and end")
    sweep.set_defaults(command=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    from flows.plan import experiments

    if options.jobs is not None and options.jobs < 1:
        raise GainLoRAError(f"--jobs: {options.jobs} is too few; give 1 or more.")
    overrides = dict(options.options)
    chosen = experiments(options.orders, options.methods, options.seeds, overrides, options.plan)
    there = [bool(options.results) and e.there(Path(options.results)) for e in chosen]
    if options.list:
        for e, done in zip(chosen, there, strict=True):
            where = f"  # {'there' if done else 'to do'}: {e.file(Path(options.results))}" if options.results else ""
            print(f"gainlora {shlex.join(e.command)}{where}")
        return 0
    for config in {
        (e.order, str(e.options)): e.config for e, done in zip(chosen, there, strict=True) if not done
    }.values():
        check_run(config)
    from flows import server
    from flows.supervise import run_flow

    given = {"orders": options.orders, "methods": options.methods, "seeds": options.seeds}
    parameters = {**given, "overrides": overrides, "plan": options.plan, "results": options.results}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is started here is ended here
    own = server.find_server() is None
    try:
        if own or options.jobs:
            server.start(options.jobs)
        return run_flow(parameters, "sweep")
    finally:
        if own:
            server.stop()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers") from None
