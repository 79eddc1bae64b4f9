"""Flow `continual`: one order of tasks, learned one after another.

    version data -> open the run folder -> for each task: prepare branch -> train -> update subspaces
    -> evaluate seen tasks -> finish -> record in MLflow -> result

Started by `gainlora run` and `dvc repro` (through flows/supervise.py) or by a worker (`prefect deployment run
continual-order1`). Every step is idempotent on the run folder, so starting the flow again resumes it; no Prefect
result is cached. Tasks take paths and plain values only; gainlora/learning/stream.py keeps the model in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import launch, stops, versions
from flows.artifacts import Progress, show_table
from gainlora.errors import GainLoRAError, refused_by_system
from gainlora.params import load_config, order_names, side_section

Records = tuple[str, dict[str, Any]]
"""A finished task's folder and what names its step."""
STEP = "{t}/{total} {name}"


def transient(task: Any, run: Any, state: Any) -> bool:
    """Whether a failure may pass by itself: bad input does not, nor what comes of being stopped."""
    return not stops.asked.is_set() and not isinstance(state.result(raise_on_failure=False), GainLoRAError)


RETRIES: dict[str, Any] = {"retries": 3, "retry_delay_seconds": [1, 5, 15], "retry_condition_fn": transient}
"""Of steps that write to MLflow: a short outage passes by itself."""


def run_name() -> str:
    """order, method+label and seed, as far as they were given."""
    given = {name: str(value) for name, value in flow_run.parameters.items() if value not in (None, "")}
    method = "+".join(given[name] for name in ("method", "label") if name in given)
    return " ".join(filter(None, (Path(given["order"]).stem, method, given.get("seed"))))


@flow(name="continual", flow_run_name=run_name, validate_parameters=True)
def continual(
    order: str = "embedded",
    method: str | None = None,
    seed: int | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    skip_incomplete: bool = False,
    overrides: dict[str, Any] | None = None,
    results: str | None = None,
    label: str = "",
) -> Any:
    """Learn an order's tasks in sequence.

    Args:
        order: a name under `orders` in params.yaml, or a YAML file with such an entry.
        method, seed: in place of those in params.yaml.
        train_limit, test_limit: examples per task, in place of data.train_limit and data.test_limit.
        skip_incomplete: leave out tasks whose files are missing.
        overrides: any other option by its dotted name, e.g. {"train.learning_rate": 5e-4}.
        results, label: write the run's result file into this folder (`gainlora results --out --label`).

    Returns:
        The content of result.json: R, AP, FT and BWT. With bad input or state the run ends as Failed with one message.
    """
    named = {"method": method, "seed": seed, "data.train_limit": train_limit, "data.test_limit": test_limit}
    options = {**(overrides or {}), **{option: value for option, value in named.items() if value is not None}}
    if skip_incomplete:
        options["data.skip_incomplete"] = True
    try:
        folder, result = learn(order, options)
        if results is not None:
            write_result(folder, results, label)
    except GainLoRAError as error:
        return Failed(message=str(error))
    except OSError as error:  # of a file; what the network does is no input of the user's
        if error.filename is None:
            raise
        return Failed(message=str(refused_by_system(error)))
    decimals = section("report")["decimals"]
    measured = [f"{key} {result[key]:.{decimals}f}" for key in ("AP", "FT", "BWT") if result[key] is not None]
    return Completed(message="  ".join(measured), data=result)


def learn(order: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The chain of steps for one order under `options` (dotted names, laid over params.yaml).

    Returns:
        The run folder and the content of its result.json.
    """
    config, processes = load_config(order, overrides=options), side_section("launch", overrides=options)
    hashes = version_data(order, config.order.data)
    folder, tasks, finished = open_run(order, options, hashes)
    report_start(folder, finished, tasks)
    with tracked(folder) as tracked_run:
        kept: list[Records] = []  # of finished tasks that MLflow did not take yet
        progress = Progress(100 * finished / len(tasks), key=artifact_key("progress", folder))
        for t, name in enumerate(tasks, start=1):
            stops.check()
            step = {"folder": folder, "t": t, "total": len(tasks), "name": name}
            if processes["num_processes"] > 1 and t > finished:
                learn_together(**step, **processes)  # the steps that follow find their work done
            prepare(**step)
            train(**step)
            update(**step)
            scores = evaluate(**step)
            task_folder = finish(**step)
            kept = deliver([*kept, (task_folder, step)], tracked_run)
            report_task(step, scores, resumed=t <= finished)
            progress.set(100 * t / len(tasks))
        result = stream(folder).result()
        if kept or not taken(conclude(folder, tracked_run, return_state=True)):
            where = f"runs/{Path(folder).name}"
            get_run_logger().warning(f"MLflow does not answer: records stay in {where}, the same command delivers them")
        else:
            promote(folder)
    if order in order_names() and config == load_config(order):  # only what params.yaml says is DVC's business
        publish(order, folder)
    return folder, result


# ---- the steps ----------------------------------------------------------------------------------


@task(task_run_name="version data of {order}")
def version_data(order: str, data: str) -> dict[str, str]:
    """DVC's hash of the data folder as it is now: {tracked path: md5}; empty where DVC does not track it."""
    hashes, changed = versions.data_hashes(Path(data))
    for path in changed:
        get_run_logger().warning("%s is not as DVC recorded it; its present hash is noted in the run", path)
    return hashes


@task(task_run_name="open run of {order}")
def open_run(order: str, options: dict[str, Any], hashes: dict[str, str]) -> tuple[str, list[str], int]:
    """Make or reopen the run folder: its path, its steps' names (the tasks'), how many of them are finished."""
    from gainlora.learning.stream import Stream

    alone = side_section("launch", overrides=options)["num_processes"] == 1
    stream = Stream.create(load_config(order, overrides=options), alone=alone)
    versions.note_hashes(stream.folder, hashes)
    return str(stream.folder), list(stream.steps), stream.finished


@task(task_run_name=f"learn on {{num_processes}} processes {STEP}")
def learn_together(folder: str, t: int, total: int, name: str, num_processes: int, config: str | None) -> None:
    """All steps of task t on several processes."""
    with stream(folder).lent():
        launch.launch(folder, t, num_processes, config)


@task(task_run_name=f"prepare branch {STEP}")
def prepare(folder: str, t: int, total: int, name: str) -> None:
    """The new task's branch and gate, before training."""
    stream(folder).prepare(t)


@task(task_run_name=f"train {STEP}")
def train(folder: str, t: int, total: int, name: str) -> None:
    """Train branch t."""
    stream(folder).train(t)


@task(task_run_name=f"update subspaces {STEP}")
def update(folder: str, t: int, total: int, name: str) -> None:
    """Fold what was learned and expand the protected subspaces."""
    stream(folder).update(t)


@task(task_run_name=f"evaluate seen tasks {STEP}")
def evaluate(folder: str, t: int, total: int, name: str) -> dict[str, Any]:
    """Scores on tasks 1..t: the content of scores.json."""
    return stream(folder).evaluate(t)


@task(task_run_name=f"finish {STEP}")
def finish(folder: str, t: int, total: int, name: str) -> str:
    """Let the task's folder appear, whole; its path."""
    return str(stream(folder).finish(t))


@task(task_run_name=f"record {STEP}", **RETRIES)
def record(task_folder: str, tracked_run: str, folder: str, t: int, total: int, name: str) -> None:
    """The finished task as an MLflow child run."""
    from gainlora.tracking import mlflow

    mlflow.record_task(Path(folder), Path(task_folder), tracked_run, section("tracking"), Path("."))


@task(task_run_name="conclude", **RETRIES)
def conclude(folder: str, tracked_run: str) -> None:
    """R, AP, FT and BWT of the whole run in MLflow."""
    from gainlora.tracking import mlflow

    mlflow.finish(Path(folder), tracked_run, section("tracking"), section("report"), Path("."))


@task(task_run_name="promote")
def promote(folder: str) -> None:
    """Let the run be its order's champion in MLflow's model registry, if it is no worse; an artifact says why."""
    from gainlora.tracking.promotion import promote
    from gainlora.tracking.store import tracking_uri

    try:
        uri = tracking_uri(Path("."), section("tracking")["uri"])
        decision = promote(Path(folder), uri, section("promote")["max_forgetting"])
    except Exception as error:  # what is learned and recorded stands without it
        get_run_logger().warning(f"not promoted: {error}")
        return
    show_table(decision.markdown(section("report")["decimals"]), artifact_key("promotion", folder), decision.reason)
    get_run_logger().info(decision.reason)


@task(task_run_name="publish {order}")
def publish(order: str, folder: str) -> None:
    """metrics/<order>.json and adapters/<order>/, and outside `dvc repro` DVC's record of them."""
    versions.export(order, Path(folder))
    if note := versions.commit(order):
        get_run_logger().warning(note)


@task(task_run_name="write result file")
def write_result(folder: str, results: str, label: str) -> None:
    """One JSON file of the run, as `gainlora results` writes it."""
    from gainlora.tracking.folder import read_run
    from gainlora.tracking.results import export

    export(read_run(Path(folder)), Path(results), label)


# ---- around the steps ---------------------------------------------------------------------------


def stream(folder: str) -> Any:
    """The run folder's Stream; its model stays loaded in this process."""
    from gainlora.learning.stream import Stream

    return Stream.open(Path(folder))


def close_streams() -> None:
    """Let go of the run folders and models that this process holds."""
    from gainlora.learning.stream import Stream

    Stream.close_all()


def section(name: str) -> dict[str, Any]:
    """params.yaml's `tracking`, `report` or `promote`, which decide nothing about what is learned."""
    return side_section(name)


def deliver(records: list[Records], tracked_run: str) -> list[Records]:
    """Record finished tasks in MLflow; those it did not take. Learning goes on without it."""
    for index, (task_folder, step) in enumerate(records):
        if not taken(record(task_folder, tracked_run, **step, return_state=True)):
            get_run_logger().warning(f"MLflow did not take task {step['t']}; it is kept and delivered later")
            return records[index:]
    return []


def taken(state: Any) -> bool:
    """Whether MLflow has it. Bad state of the run itself is raised, as ever."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, GainLoRAError):
        raise error
    return bool(state.is_completed())


@contextmanager
def tracked(folder: str) -> Iterator[str]:
    """An MLflow run around the steps: FAILED when one fails, KILLED when the flow is cancelled."""
    from gainlora.tracking import mlflow

    start = task(mlflow.start, name="start MLflow run", **RETRIES)
    started = start(Path(folder), section("tracking"), Path("."), return_state=True)
    if not taken(started):
        raise GainLoRAError(f"tracking.uri: MLflow does not answer ({started.message}); start it, then this run again.")
    tracked_run = started.result()
    try:
        yield tracked_run
    except BaseException as error:  # also KeyboardInterrupt and Prefect's TerminationSignal
        status = "FAILED" if isinstance(error, Exception) and not stops.asked.is_set() else "KILLED"
        with suppress(Exception):  # what stopped the run is the error to show
            mlflow.fail(tracked_run, status, section("tracking"), Path("."))
        raise


def report_start(folder: str, finished: int, tasks: list[str]) -> None:
    resumed = f", {finished} finished before" if finished else ""
    get_run_logger().info(f"runs/{Path(folder).name}: {len(tasks)} tasks{resumed}")


def report_task(step: dict[str, Any], scores: dict[str, Any], resumed: bool) -> None:
    """One line on the screen and R so far as a Prefect artifact."""
    decimals = section("report")["decimals"]
    each = "  ".join(f"{name} {score:.{decimals}f}" for name, score in scores["scores"].items())
    seconds = sum(scores["seconds"].values())
    when = "finished before" if resumed else f"{int(seconds // 60)} min {seconds % 60:02.0f} s"
    cut = f" | {scores['truncated']} training examples cut to length" if scores.get("truncated") else ""
    get_run_logger().info(
        f"task {step['t']}/{step['total']} {step['name']} | {each} | AP {scores['AP']:.{decimals}f} | {when}{cut}"
    )
    show_table(
        matrix_markdown(step["folder"], step["t"], decimals),
        key=artifact_key("accuracy-matrix", step["folder"]),
        description=f"R after task {step['t']} of {step['total']}: row = learned, column = evaluated",
    )


def matrix_markdown(folder: str, t: int, decimals: int) -> str:
    """R, rows 1..t, as a Markdown table."""
    rows = [json.loads(next(Path(folder).glob(f"task_{i:02d}_*/scores.json")).read_text()) for i in range(1, t + 1)]
    names = list(rows[-1]["scores"])
    lines = ["| after | " + " | ".join(names) + " | AP |", "|---" * (len(names) + 2) + "|"]
    for i, row in enumerate(rows, start=1):
        cells = [f"{row['scores'][n]:.{decimals}f}" if n in row["scores"] else "" for n in names]
        lines.append(f"| {i} {row['task']} | " + " | ".join(cells) + f" | {row['AP']:.{decimals}f} |")
    return "\n".join(lines)


def artifact_key(kind: str, folder: str) -> str:
    """Prefect allows lower-case letters, digits and dashes."""
    return f"{kind}-{re.sub('[^a-z0-9]+', '-', Path(folder).name.lower())}"
