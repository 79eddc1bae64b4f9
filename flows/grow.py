"""Flows `learn`, `inbox` and `sweep`: one more task for a run, on demand or from its inbox; many runs side by side."""

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Completed

from flows.continual import FlowLog, ended, failed, prefect_call
from gainlora.config import load_settings
from gainlora.data.formats import SUFFIXES, Source
from gainlora.errors import GainLoRAError, RetryableError
from gainlora.runs.grow import extended
from gainlora.runs.run import Run
from gainlora.runs.start import learn_recorded

SETTLED = 30
"""Seconds for which a task in the inbox must not have changed to be taken."""
DONE, FAILED = "done", "failed"


@flow(name="learn", flow_run_name="{run}", validate_parameters=True)
def learn(run: str, task: str | None = None) -> Any:
    """Learn one more task on top of a finished run, as a longer run of the same lineage.

    Args:
        run: a lineage, a run's folder or name, or `latest`.
        task: a folder or file of examples (docs/tasks.md); None: the tasks that the run still lacks.

    Returns:
        The content of the longer run's result.json. If the task cannot be learned, the flow run ends as Failed with one
        message and the lineage is unchanged.
    """
    return ended(lambda: learn_task(run, Path(task) if task else None))


@flow(name="inbox", validate_parameters=True)
def inbox(folder: str = "inbox") -> Any:
    """Learn every complete task in inbox/LINEAGE/: a folder or a file, in any format of docs/tasks.md.

    A learned task moves to inbox/LINEAGE/done/, one that cannot be learned to inbox/LINEAGE/failed/ with the reason
    beside it. Tasks of one lineage are learned one after another. Copy a task under a name that starts with a dot and
    rename it; otherwise it is taken once it has not changed for `SETTLED` seconds. Tasks of a locked run wait.
    """
    outcomes, waiting = [], []
    for dropped in sorted(Path(folder).glob("[!.]*/[!.]*")):
        if dropped.name in (DONE, FAILED):
            continue
        if reason := incomplete(dropped):
            waiting.append(f"{dropped}: {reason}")
            continue
        try:
            learn_task(dropped.parent.name, dropped)
            where, reason = DONE, "learned"
        except RetryableError as error:
            get_run_logger().warning(f"{dropped}: stays for now: {error}")
            continue
        except GainLoRAError as error:
            where, reason = FAILED, str(error)
        put_away(dropped, where, reason)
        outcomes.append((where, f"{dropped}: {reason}"))
    message = "; ".join([line for _, line in outcomes] + waiting) or "the inbox is empty"
    return failed(message) if FAILED in dict(outcomes) else Completed(message=message)


@flow(name="sweep", validate_parameters=True, log_prints=True)
def sweep(plan: str = "results/plan.yaml", results: str = "results", jobs: int = 1) -> Any:
    """Run a plan of orders x methods x seeds in separate processes, like `gainlora sweep --plan`.

    Args:
        plan: a YAML file (docs/cluster.md).
        results: folder of result files; runs with an existing file are skipped.
        jobs: runs side by side; those that share a GPU wait for each other.
    """
    from gainlora import plans

    try:
        missing = plans.run_all(plans.experiments(plan=Path(plan)), Path(results), jobs)
    except GainLoRAError as error:
        return failed(str(error))
    return failed("runs failed; the flow's output names them") if missing else Completed(message="all are done")


def learn_task(run: str, source: Path | None) -> dict[str, Any]:
    """The phases of one more task; the longer run's result."""
    settings = load_settings()
    with Run.open(run) as known, extended(known, source) if source else nullcontext(known) as longer:
        return learn_recorded(longer, settings, [FlowLog(settings.report.decimals)], call=prefect_call)


def incomplete(dropped: Path) -> str | None:
    """Why a task has to wait; None: it is complete and settled. A file dated in the future counts as old."""
    if dropped.is_file() and dropped.suffix not in SUFFIXES:
        return f"waits: not a task's file ({', '.join(SUFFIXES)})"
    try:
        lacking = Source.of(dropped).lacks()
    except GainLoRAError:
        return None  # learning it says what is wrong
    if lacking:
        return f"waits for {', '.join(lacking)}"
    files = [path for path in (dropped, *dropped.rglob("*")) if path.is_file()]
    age = time.time() - max(file.stat().st_mtime for file in files)
    return "waits: it may still be written" if 0 <= age <= SETTLED else None


def put_away(dropped: Path, where: str, reason: str) -> None:
    """Move a task to done/ or failed/, replacing an earlier one of its name; write a failure's reason beside it."""
    target = dropped.parent / where / dropped.name
    target.parent.mkdir(exist_ok=True)
    for old in (target, target.parent / f"{target.name}.txt"):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    dropped.rename(target)
    if where == FAILED:
        (target.parent / f"{target.name}.txt").write_text(f"{reason}\n", encoding="utf-8")
