"""Flows `learn` and `inbox`: a finished run learns one more task, when told to or when one lies in its inbox.

    begin -> prepare branch -> train -> update subspaces -> evaluate seen tasks -> finish -> settle
    -> record in MLflow -> promote

The steps are those of flow `continual`. Until it is settled the run stays as it was for all its readers, and a task
that cannot be learned leaves it so (gainlora/learning/grow.py). Started by `gainlora learn`, or by a worker:
`prefect deployment run learn-task --param run=... --param task=...`, `prefect deployment run inbox-watch`.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.states import Completed, Failed

from flows import continual
from flows.artifacts import Progress
from gainlora.data.tasks import FILES
from gainlora.errors import GainLoRAError, Passing

PHASES = (continual.prepare, continual.train, continual.update, continual.evaluate, continual.finish)
STILL = 30
"""Seconds for which no file of a task in the inbox has changed when it is taken."""
DONE, FAILED = "done", "failed"


@flow(name="learn", flow_run_name="{run}", validate_parameters=True)
def learn(run: str, task: str | None = None) -> Any:
    """Teach a finished run one more task.

    Args:
        run: its folder.
        task: a folder with train.json and test.json, or one file, of which a fifth is held out to test; None: the run
            learns those of its tasks that it lacks, as after `gainlora repair`.

    Returns:
        The content of result.json, now with the task. What cannot be learned ends the flow run as Failed with one
        message, and the run is as it was.
    """
    try:
        return learn_task(Path(run), Path(task) if task else None)
    except GainLoRAError as error:
        return Failed(message=str(error))


@flow(name="inbox", validate_parameters=True)
def inbox(folder: str = "inbox") -> Any:
    """Learn every task that lies complete in inbox/<run>/: a task's folder, or a .json file of one.

    A learned one moves to inbox/<run>/done/, one that cannot be learned to inbox/<run>/failed/ with the reason beside
    it. To be sure that none is taken half-written, copy it under a name with a dot in front and rename it; else it is
    taken when it has not changed for `STILL` seconds. Those of a run that is busy stay for the next time.
    """
    became = []
    for dropped in sorted(Path(folder).glob("[!.]*/[!.]*")):
        if dropped.name in (DONE, FAILED) or not complete(dropped):
            continue
        try:
            learn_task(Path("runs") / dropped.parent.name, dropped)
            where, reason = DONE, "learned"
        except Passing as error:
            get_run_logger().warning(f"{dropped}: stays for now: {error}")
            continue
        except GainLoRAError as error:
            where, reason = FAILED, str(error)
        finally:
            continual.close_streams()  # the next one may be another run's, with another base
        put_away(dropped, where, reason)
        became.append((where, f"{dropped}: {reason}"))
    message = "; ".join(line for _, line in became) or "no complete task"
    return (Failed if FAILED in dict(became) else Completed)(message=message)


def learn_task(folder: Path, source: Path | None) -> dict[str, Any]:
    """The chain of steps; GainLoRAError with the run as it was where the task cannot be learned."""
    place, names, finished = begin(str(folder), source and str(source))
    progress = Progress(0, key=continual.artifact_key("progress", place))
    total, processes = len(names), continual.section("launch")
    steps = [{"folder": place, "t": t, "total": total, "name": name} for t, name in enumerate(names, start=1)]
    steps = steps[min(finished, total - 1) :]  # one; more where `gainlora repair` took some
    try:
        for n, step in enumerate(steps):
            if processes["num_processes"] > 1 and finished < total:
                continual.learn_together(**step, **processes)
            for count, phase in enumerate(PHASES, start=1):
                phase(**step)
                progress.set(100 * (n + count / len(PHASES)) / len(steps))
    except Passing:
        raise
    except GainLoRAError:
        drop(place)
        raise
    result = settle(place)
    continual.report_task(steps[-1], continual.evaluate(**steps[-1]), resumed=finished == total)
    recorded = record(place, return_state=True)
    if recorded.is_completed():
        continual.promote(place)
    else:  # what is learned stays
        get_run_logger().warning(f"not in MLflow ({recorded.message}): the same command delivers the records later")
    return result


# ---- the steps ----------------------------------------------------------------------------------


@task(task_run_name="begin {folder}")
def begin(folder: str, source: str | None) -> tuple[str, list[str], int]:
    """Check run and task, and take the task into the run folder: its path, its tasks, how many of them are finished."""
    from gainlora.learning import grow

    stream = grow.begin(Path(folder), Path(source) if source else None)
    if source:
        counts = stream.recorded[stream.tasks[-1]]
        held_out = ", held out of the one file" if Path(source).suffix == ".json" else ""
        what = f"{stream.tasks[-1]}: {counts['train']} examples to train, {counts['test']} to test{held_out}"
    else:
        more = "--task names one more" if stream.finished == len(stream.steps) else "now the others"
        what = f"{folder}: {stream.finished} of {len(stream.steps)} tasks are learned; {more}"
    get_run_logger().info(what)
    if otherwise := grow.differences(stream):
        get_run_logger().warning(
            f"not as when {folder} began, so the result may differ from an order's that had all tasks from the start: "
            + "; ".join(otherwise)
        )
    return str(stream.folder), list(stream.steps), stream.finished


@task(task_run_name="settle")
def settle(folder: str) -> dict[str, Any]:
    """Make the learned task part of the run."""
    from gainlora.learning import grow

    return grow.settle(continual.stream(folder))


@task(task_run_name="drop")
def drop(folder: str) -> None:
    """Take back what was begun."""
    from gainlora.learning import grow

    grow.drop(continual.stream(folder))


@task(task_run_name="record", **continual.RETRIES)
def record(folder: str) -> None:
    """The run in MLflow, with the new task."""
    from gainlora.tracking import mlflow

    mlflow.record_run(Path(folder), continual.section("tracking"), continual.section("report"))


# ---- the inbox ----------------------------------------------------------------------------------


def complete(dropped: Path) -> bool:
    """Whether a task is there whole and nobody writes to it any more."""
    files = [dropped / name for name in FILES] if dropped.is_dir() else [dropped]
    if (dropped.is_file() and dropped.suffix != ".json") or not all(file.is_file() for file in files):
        return False
    return time.time() - max(file.stat().st_mtime for file in files) > STILL


def put_away(dropped: Path, where: str, reason: str) -> None:
    """Move a task from the inbox to done/ or failed/, in place of an earlier one of its name; a failure's reason
    lies beside it."""
    target = dropped.parent / where / dropped.name
    target.parent.mkdir(exist_ok=True)
    for old in (target, target.parent / f"{target.name}.txt"):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    dropped.rename(target)
    if where == FAILED:
        (target.parent / f"{target.name}.txt").write_text(f"{reason}\n", encoding="utf-8")
