"""Commands that show, keep and rank results: runs, report, results, promote, rollback, register."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gainlora.cli import options as cli
from gainlora.errors import GainLoRAError, printable


def runs() -> None:
    """List the runs of this folder: order, method, seed, tasks, AP, FT, state."""
    rows = [("run", "order", "method", "seed", "tasks", "AP", "FT", "state")]
    rows += [(file.parent.name, *_row(file.parent)) for file in sorted(Path("runs").glob("*/config.json"))]
    if len(rows) == 1:
        raise GainLoRAError("runs: none in this folder; `gainlora run embedded` makes one.")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(printable("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))).rstrip())


def report(
    names: Annotated[
        list[str] | None, Argument(metavar="RUN...", help="Runs and result files; none: all runs in MLflow.")
    ] = None,
    out: Annotated[Path, Option(metavar="DIR", help="Folder of the page.")] = Path("report"),
) -> None:
    """Write tables and figures of runs: index.html, report.md, figures/."""
    from gainlora.config import load_settings
    from gainlora.report.report import write_report

    settings = load_settings()
    if names:
        from gainlora.runs.records import read_record

        records = [read_record(_path(name)) for name in names]
    else:
        from gainlora.tracking.mlflow_runs import tracked_runs

        records = tracked_runs(settings.tracking)
    print(write_report(records, out, settings.report)[0])


def results(
    names: Annotated[list[str], Argument(metavar="RUN...", help="Finished runs.")],
    out: Annotated[Path, Option(metavar="DIR", help="Folder of the files.")] = Path("results"),
    label: cli.Label = "",
) -> None:
    """Write finished runs as small JSON files for version control."""
    for folder in [cli.resolved(name) for name in names]:
        print(printable(str(write_result(folder, out, label))))


def promote(
    name: cli.RunName, reason: Annotated[str, Option(metavar="TEXT", help="Why; kept with the version.")]
) -> None:
    """Make a finished run its order's champion regardless of the comparison."""
    from gainlora.sections import PromoteConfig
    from gainlora.tracking.promotion import promote as by_hand

    print(by_hand(cli.resolved(name), _store(), PromoteConfig(), reason).reason)


def rollback(order: Annotated[str, Argument(metavar="ORDER", help="Of the model gainlora-ORDER.")]) -> None:
    """Restore the previous champion of an order."""
    from gainlora.tracking.promotion import rollback as back

    before, now = back(order, _store())
    print(f"champion of {order}: version {now} (it was version {before})")


def register(name: cli.RunName) -> None:
    """Register a finished run as a version of its order's model in MLflow."""
    from mlflow.exceptions import MlflowException

    from gainlora.export.saved import open_saved
    from gainlora.tracking.registry import model_name
    from gainlora.tracking.registry import register as add_version

    folder, uri = cli.resolved(name), _store()
    model = model_name(open_saved(folder).config.order.name)
    try:
        version = add_version(folder, uri)
    except MlflowException as error:
        raise GainLoRAError(f"tracking.uri: {uri}: {error.message[:300]}; nothing is registered.") from None
    print(f"{model} version {version}; to serve it:")
    print(
        f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow models serve -m models:/{model}/{version} --env-manager local "
        "--host 127.0.0.1 --port 5001"
    )


def write_result(folder: Path, out: Path, label: str) -> Path:
    """Write a finished run's result file."""
    from gainlora.runs.records import read_run
    from gainlora.runs.result_files import export

    return export(read_run(folder), out, label)


def _row(folder: Path) -> tuple[str, str, str, str, str, str, str]:
    from gainlora.runs.records import read_run

    try:
        run = read_run(folder)
        found = run.result if run.steps else {}
    except GainLoRAError as error:
        return "", "", "", "", "", "", f"not readable: {error}"
    ap, ft = ("-" if found.get(key) is None else f"{found[key]:.1f}" for key in ("AP", "FT"))
    state = "finished" if run.complete else f"{len(run.steps)} of {len(run.config['steps'])} learned"
    order, method, seed = (str(run.config[key]) for key in ("order", "method", "seed"))
    return order, method, seed, str(len(run.tasks)), ap, ft, state


def _path(name: str) -> Path:
    """An existing file or folder unchanged, otherwise the run of that name."""
    return Path(name) if Path(name).exists() or name.endswith(".json") else cli.resolved(name)


def _store() -> str:
    from gainlora.config import load_settings
    from gainlora.tracking.store import tracking_uri

    return tracking_uri(Path("."), load_settings().tracking.uri)
