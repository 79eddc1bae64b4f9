"""Runs read back from MLflow, and the report of them kept there.

A run is put together in the layout of its folder, without its weights, and read as a folder is: config.json and
data.json of the parent, the small files of every child. The learned state's sizes come from the children's metrics.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gainlora.errors import GainLoRAError
from gainlora.tracking.folder import Run, check_part, read_run
from gainlora.tracking.mlflow import DONE, FORGOT, KEY, PARENT
from gainlora.tracking.store import store, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

REPORT = "report"
"""Key and name of the run that holds the report."""
STORED = "stored."


@contextlib.contextmanager
def tracked_runs(tracking: dict[str, Any], root: Path = Path(".")) -> Iterator[list[Run]]:
    """All runs of the experiment, sorted by name; their files are gone when the context ends.

    A run that cannot be read is left out and named on the error stream.

    Args:
        tracking: params.yaml's section: experiment, uri.
        root: the project's folder.

    Raises:
        GainLoRAError: the store is not there or cannot be read, or the experiment was deleted.
    """
    uri = tracking_uri(root, tracking["uri"])
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise GainLoRAError(
            f"tracking.uri: {uri} is not there, so there are no runs; make one first (`gainlora run embedded`), or "
            "name run folders or result files."
        )
    try:
        with store(tracking, root) as (client, experiment):
            found = _all_runs(client, experiment)
    except GainLoRAError:
        raise
    except Exception as error:  # of MLflow, its database's driver, or the network
        reason = f"{type(error).__name__}: {error}"[:300]
        remedy = "correct it, or name run folders or result files"
        raise GainLoRAError(f"tracking.uri: {uri}: cannot be read ({reason}); {remedy}.") from None
    children: dict[str, list[MlflowRun]] = {}
    for run in found:
        if PARENT in run.data.tags and DONE in run.data.tags:
            children.setdefault(run.data.tags[PARENT], []).append(run)
    parents = [run for run in found if not {PARENT, FORGOT} & {*run.data.tags}]
    parents = [run for run in parents if run.data.tags.get(KEY, REPORT) != REPORT]
    with tempfile.TemporaryDirectory(prefix="gainlora-report-") as folder:
        runs = []
        for parent in sorted(parents, key=lambda run: run.data.tags[KEY]):
            try:
                runs.append(_fetch(client, parent, children.get(parent.info.run_id, []), Path(folder)))
            except GainLoRAError as error:
                print(f"left out: {error}", file=sys.stderr)
        yield runs


def report_tracked(out: Path, tracking: dict[str, Any], report: dict[str, Any], root: Path = Path(".")) -> list[Path]:
    """Write the report of all runs of the experiment, and keep it there.

    Args:
        out: the page's folder, or its file if it ends in .html.
        tracking: params.yaml's section: experiment, uri.
        report: params.yaml's section: decimals, dpi.
        root: the project's folder.

    Returns:
        All files written, the page first.

    Raises:
        GainLoRAError: no runs, or the store cannot be read.
    """
    from gainlora.tracking.report import write_report

    with tracked_runs(tracking, root) as runs:
        files = write_report(runs, out, report)
    log_report(files, tracking, root)
    return files


def log_report(files: Sequence[Path], tracking: dict[str, Any], root: Path = Path(".")) -> str:
    """Keep a report in the experiment: the artifacts of one run named "report", which the next report reuses.

    Args:
        files: what `write_report` wrote, the page first.
        tracking: params.yaml's section: experiment, uri.
        root: the project's folder.

    Returns:
        MLflow's run id.
    """
    with store(tracking, root) as (client, experiment):
        held = [run for run in _all_runs(client, experiment) if run.data.tags.get(KEY) == REPORT]
        run = held[0] if held else client.create_run(experiment, run_name=REPORT, tags={KEY: REPORT})
    run_id: str = run.info.run_id
    for path in files:
        inside = path.parent.relative_to(files[0].parent).as_posix()
        client.log_artifact(run_id, str(path), None if inside == "." else inside)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _all_runs(client: MlflowClient, experiment: str) -> list[MlflowRun]:
    page = client.search_runs([experiment])
    found = list(page)
    while page.token:
        page = client.search_runs([experiment], page_token=page.token)
        found += page
    return found


def _fetch(client: MlflowClient, parent: MlflowRun, children: Sequence[MlflowRun], root: Path) -> Run:
    """Put a run's files together under `root` and read them."""
    for recorded in (parent, *children):
        for part in recorded.data.tags[KEY].split("/"):
            check_part(part, f"MLflow run {recorded.info.run_id}")
    folder = root / parent.data.tags[KEY]
    _download(client, parent, folder, ("config.json", "data.json"))
    stored = {}
    for child in children:
        task_folder = root / child.data.tags[KEY]
        _download(client, child, task_folder, ("scores.json", "subspace.json"), ("coefficients.json", "predictions"))
        sizes = {name: int(size) for name, size in child.data.metrics.items() if name.startswith(STORED)}
        stored[task_folder] = {name.removeprefix(STORED): size for name, size in sizes.items()}
    run = read_run(folder)
    return replace(run, steps=[replace(step, stored=stored[step.folder]) for step in run.steps if step.folder])


def _download(
    client: MlflowClient, run: MlflowRun, folder: Path, needed: Sequence[str], wanted: Sequence[str] = ()
) -> None:
    """Fetch artifacts; those that are only wanted may be missing."""
    there = {file.path for file in client.list_artifacts(run.info.run_id)}
    for name in needed:
        if name not in there:
            raise GainLoRAError(
                f"MLflow's run {run.data.tags[KEY]}: its artifact {name} is missing; run the same command again to log "
                "it, or delete the run."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*needed, *wanted):
        if name in there:
            client.download_artifacts(run.info.run_id, name, str(folder))
