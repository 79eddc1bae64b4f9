"""Commands that change what a finished run knows: learn, forget, rollback."""

from __future__ import annotations

import argparse
from pathlib import Path

from gainlora.cli.parser import Commands


def add(commands: Commands) -> None:
    """Their parsers."""
    learn = commands.add_parser("learn", help="teach a finished run one more task")
    learn.add_argument("run", type=Path, metavar="RUN", help="a folder under runs/")
    learn.add_argument(
        "--task", type=Path,
        help="a folder with train.json and test.json, or one such file, of which a fifth is held out to test; without "
        "it the run learns those of its tasks that it lacks, as after `gainlora repair`",
    )  # fmt: skip
    learn.set_defaults(command=_learn)

    forget = commands.add_parser("forget", help="take a finished run's newest task back, as if it had never been")
    forget.add_argument("run", type=Path, metavar="RUN", help="a folder under runs/")
    forget.add_argument("--last", action="store_true", required=True, help="the newest task; no other can go alone")
    forget.set_defaults(command=_forget)

    rollback = commands.add_parser("rollback", help="make the version that an order's champion replaced it again")
    rollback.add_argument("order", help="order of the registered model gainlora-ORDER")
    rollback.set_defaults(command=_rollback)


def _learn(options: argparse.Namespace) -> int:
    from flows.supervise import run_flow
    from gainlora.learning.files import read_json

    read_json(options.run / "config.json")  # before a server starts; the flow checks all the rest
    return run_flow({"run": str(options.run), "task": options.task and str(options.task)}, flow="learn")


def _forget(options: argparse.Namespace) -> int:
    from gainlora.learning import grow
    from gainlora.params import side_section
    from gainlora.tracking import mlflow
    from gainlora.tracking.promotion import follow
    from gainlora.tracking.store import tracking_uri

    tracking, report = side_section("tracking"), side_section("report")
    folder, (name, learned) = options.run.resolve(), grow.newest(options.run)
    if learned is None:
        grow.forget(options.run)
        print(f"{options.run}: dropped {name}, which it was about to learn")
        return 0
    mlflow.retire(folder, learned, name, tracking)  # first: without MLflow nothing is forgotten
    version = None

    def record() -> None:
        nonlocal version
        mlflow.record_run(folder, tracking, report)
        version = follow(folder, tracking_uri(Path("."), tracking["uri"]))

    grow.forget(options.run, record)
    print(f"{options.run}: forgot {name}")
    if version:
        print(f"champion of its order: version {version}, this run as it is now")
    return 0


def _rollback(options: argparse.Namespace) -> int:
    from gainlora.params import side_section
    from gainlora.tracking.promotion import rollback
    from gainlora.tracking.store import tracking_uri

    before, now = rollback(options.order, tracking_uri(Path("."), side_section("tracking")["uri"]))
    print(f"champion of {options.order}: version {now} (it was version {before})")
    return 0
