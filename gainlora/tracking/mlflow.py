"""A run in MLflow: one parent run, one child run and one logged model per task.

    parent  <method>-<seed>-...   options as params; at step t: AP, FT, BWT, score.<task>, seconds.*,
            |                     subspace.* (basis sizes), stored.* (parameters kept),
            |                     task.<asked>.coefficient.<branch>; config.json, data.json, R as table,
            |                     figures; data sets as inputs; system metrics
            +- task_01_<name>     while it trains: loss, learning rate and gate coefficient by optimizer step, loss and
            +- task_02_<name>     score on validation examples; then scores on all seen tasks, adapter, gate, bases,
                                  predictions; its logged model has the same scores

All requests go through `MlflowClient` with explicit run ids: a Prefect task on another thread would lose an active run.
A run is found by its tag `gainlora.key`, so a resumed run continues its own MLflow run. The tag `gainlora.done` states
what was logged completely. Logging can be repeated after a crash: the store keeps equal points once. `mlflow_runs.py`
reads runs back.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from gainlora.io import read_json
from gainlora.runs.records import MEASURES, Key, Record, Step, flatten, read_run, read_step, train_records
from gainlora.sections import ReportConfig, TrackingConfig
from gainlora.tracking.store import store

KEY, DONE, PARENT = "gainlora.key", "gainlora.done", "mlflow.parentRunId"
CURVES = {"train": ("loss", "penalty", "coefficient", "learning_rate", "seconds"), "validation": ("loss", "score")}
"""Kind of curve -> the values of its records that are logged."""
POINTS = 1000
"""Points of a loss curve that are logged after a task; longer ones are thinned, train.jsonl (an artifact) has all."""
PARAM_LENGTH = 6000  # MLflow's limit
NAME_LENGTH = 100
"""Of a task in a metric's name, which may have 250 characters and names two tasks; a longer one ends in its digest."""
NOTE = (
    "Step t: after learning task t. AP: mean score over the tasks seen, higher is better. FT: forgetting, lower is "
    "better. BWT: below 0 is forgetting. score.X: on task X; a falling curve is a task being forgotten. "
    "Chart AP, FT and score.* of several runs together to compare methods; child runs hold the training curves."
)


def start(folder: Path, tracking: TrackingConfig, root: Path = Path(".")) -> str:
    """Create the parent run of a run folder, or reopen it.

    Args:
        folder: runs/<run_id>, with config.json and data.json.
        tracking: params.yaml's section: experiment, uri.
        root: the project's folder.

    Returns:
        MLflow's run id; the run is RUNNING.

    Raises:
        GainLoRAError: no run folder, or the experiment was deleted.
    """
    run = read_run(folder)
    with store(tracking, root) as (client, experiment):
        parent = _find(client, experiment, folder.name) or _create(
            client, experiment, folder.name, {"mlflow.note.content": NOTE}, run_name=run_name(run)
        )
        run_id: str = parent.info.run_id
        client.update_run(run_id, status="RUNNING")
        # a run that learned a task since keeps its first params: MLflow lets none change
        params = {k: v for k, v in flatten(run.config["config"]).items() if k not in parent.data.params}
        _describe(client, run_id, params, _tags(run))  # two at once would collide
    client.log_inputs(run_id, datasets=[_dataset(name, entry) for name, entry in run.data.items()])
    for name in ("config.json", "data.json"):
        client.log_artifact(run_id, str(folder / name))
    return run_id


def begin_task(folder: Path, step: str, parent: str, tracking: TrackingConfig, root: Path) -> tuple[MlflowClient, str]:
    """Create or reopen the child run of a task that begins; the client and MLflow's run id.

    Args:
        folder: runs/<run_id>.
        step: name of the task's folder in it.
        parent: what `start` returned.
    """
    with store(tracking, root) as (client, experiment):
        child = _child(client, experiment, f"{folder.name}/{step}", parent)
        client.update_run(child.info.run_id, status="RUNNING")
        return client, str(child.info.run_id)


def record_task(
    folder: Path, task_folder: Path, parent_run_id: str, tracking: TrackingConfig, root: Path = Path(".")
) -> str:
    """Log a finished task: a child run of its own with a logged model, and the parent's metrics at step t.

    Args:
        folder: runs/<run_id>.
        task_folder: one finished task's folder in it.
        parent_run_id: what `start` returned.
        tracking: params.yaml's section: experiment, uri.
        root: the project's folder.

    Returns:
        MLflow's run id of the child, FINISHED.

    Raises:
        GainLoRAError: a file of the task's folder is missing or damaged.
    """
    run, step = read_run(folder), read_step(task_folder)
    sums = task_folder / "checksums.json"
    digest = _digest(json.dumps(read_json(sums), sort_keys=True))
    ended = int(sums.stat().st_mtime * 1000)  # the folder's own time: the same whenever it is logged
    started = ended - int(1000 * (step.total("seconds") or 0))
    with store(tracking, root) as (client, experiment):
        key = f"{folder.name}/{task_folder.name}"
        child = _child(client, experiment, key, parent_run_id, digest, start_time=started)
    run_id: str = child.info.run_id
    outcome = _outcome(run, step, ended)
    if DONE in child.data.tags:
        if child.data.tags[PARENT] != parent_run_id:  # the parent was made anew
            client.log_batch(parent_run_id, outcome)
            client.set_tag(run_id, PARENT, parent_run_id)
        return run_id
    data = run.data if run.at_once else {step.task: run.data[step.task]}
    counts = {key: sum(entry[key] for entry in data.values()) for key in ("train", "test")}
    _describe(client, run_id, {"task": step.task, "index": step.index, **counts}, _tags(run))
    client.log_inputs(run_id, datasets=[_dataset(name, entry) for name, entry in data.items()])
    client.log_batch(run_id, _missing_points(client, run_id, task_folder, step, started))
    client.log_batch(run_id, _of_model(client, experiment, child, run, step, outcome))
    client.log_batch(parent_run_id, outcome)
    _artifacts(client, run_id, task_folder)
    client.set_terminated(run_id, "FINISHED", end_time=ended)
    client.set_tag(run_id, DONE, digest)  # last: it states that all of this is done
    return run_id


def finish(
    folder: Path, parent_run_id: str, tracking: TrackingConfig, report: ReportConfig, root: Path = Path(".")
) -> None:
    """Close a parent run: final AP, FT and BWT, R as a table, figures, the run's own files.

    Args:
        folder: runs/<run_id>, all tasks finished.
        parent_run_id: what `start` returned.
        tracking: params.yaml's section: experiment, uri.
        report: params.yaml's section: decimals of the heat map's cells, dpi of the figures.
        root: the project's folder.

    Raises:
        GainLoRAError: a task is not finished.
    """
    run = read_run(folder)
    run.check_finished()
    with store(tracking, root) as (client, _):
        parent = client.get_run(parent_run_id)
    digest = _digest(json.dumps(run.result, sort_keys=True))
    if parent.data.tags.get(DONE) == digest:
        client.set_terminated(parent_run_id, "FINISHED", end_time=parent.info.end_time)
        return
    from gainlora.report.one_run import run_figures

    client.log_artifact(parent_run_id, str(folder / "result.json"))
    client.log_dict(parent_run_id, _table(run), "R.json")
    # as log_table does, which appends to a table that is there
    client.set_tag(parent_run_id, "mlflow.loggedArtifacts", json.dumps([{"path": "R.json", "type": "table"}]))
    for name, (figure, _) in run_figures(run, report.decimals).items():
        client.log_figure(parent_run_id, figure, f"figures/{name}.png", save_kwargs={"dpi": report.dpi})
    client.set_tag(parent_run_id, DONE, digest)
    client.set_terminated(parent_run_id, "FINISHED")


def record_run(folder: Path, tracking: TrackingConfig, report: ReportConfig, root: Path = Path(".")) -> str:
    """Everything of a finished run that is not logged yet; MLflow's run id of the parent."""
    parent = start(folder, tracking, root)
    for step in read_run(folder).steps:
        assert step.folder is not None
        record_task(folder, step.folder, parent, tracking, root)
    finish(folder, parent, tracking, report, root)
    return parent


def fail(
    run_ids: Iterable[str], status: Literal["FAILED", "KILLED"], tracking: TrackingConfig, root: Path = Path(".")
) -> None:
    """Close the runs of a run that stopped early; `start` and `begin_task` reopen them.

    Args:
        run_ids: what these returned.
        status: FAILED after an error, KILLED when it was stopped.
        tracking: params.yaml's section: experiment, uri.
        root: the project's folder.
    """
    with store(tracking, root) as (client, _):
        for run_id in run_ids:
            client.set_terminated(run_id, status)


def _find(client: MlflowClient, experiment: str, key: str) -> MlflowRun | None:
    """The run with this key, unless it was deleted. Of several, the one with the most records stays."""
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'")
    if not found:
        return None
    kept = max(found, key=lambda run: (DONE in run.data.tags, len(run.data.metrics), run.info.run_id))
    for run in found:
        if run is not kept:
            _delete(client, run)
    return kept


def _create(client: MlflowClient, experiment: str, key: str, tags: dict[str, str], **options: Any) -> MlflowRun:
    """A run with this key. After a late answer the client repeats its request, which creates one more run each time."""
    made = client.create_run(experiment, tags={KEY: key, **tags}, **options)
    return _find(client, experiment, key) or made


def _child(
    client: MlflowClient, experiment: str, key: str, parent: str, digest: str | None = None, **options: Any
) -> MlflowRun:
    """A task's run with this key: the one that is there, unless it holds another outcome than that of `digest`."""
    found = _find(client, experiment, key)
    if found is not None and found.data.tags.get(DONE) in (None, digest):
        return found
    if found is not None:  # learned before, then dropped, or learned again
        _delete(client, found)
    return _create(client, experiment, key, {PARENT: parent}, run_name=Path(key).name, **options)


def _describe(client: MlflowClient, run_id: str, params: dict[str, Any], tags: dict[str, Any]) -> None:
    settings = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in params.items()]
    client.log_batch(run_id, params=settings, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def _tags(run: Record) -> dict[str, Any]:
    names = ("method", "order", "model", "seed", "dtype", "device", "code")
    tags = {name: run.config[name] for name in names}
    tags |= {f"version.{name}": version for name, version in run.config["versions"].items()}
    learned = [entry["task"] for entry in run.config.get("learned", [])]
    tags |= {"learned later": ", ".join(learned)} if learned else {}
    tags |= {key: run.config[key] for key in ("base", "note", "created") if run.config.get(key)}
    counts = {"tasks": len(run.tasks), "steps": len(run.config["steps"])}
    return {**tags, **counts, "skipped": ", ".join(run.config["skipped"]) or "none"}


def _dataset(name: str, entry: dict[str, Any]) -> DatasetInput:
    """A task's data as a run's input: digest by DVC where it tracks the folder, else of the contents."""
    data = Dataset(
        name=name,
        digest=(entry["dvc"] or entry["sha256"])[:36],  # MLflow's limit
        source_type="local",
        source=json.dumps({"uri": entry["path"]}),
        profile=json.dumps({"train": entry["train"], "test": entry["test"], "sha256": entry["sha256"]}),
    )
    return DatasetInput(data, [InputTag("mlflow.data.context", "training")])


def _outcome(run: Record, step: Step, at: int) -> list[Metric]:
    """What is known after task t, at step t: the same names on parent and child, in every run.

    Dots, not slashes: the UI makes a section of what stands before a slash and shows it above AP, FT and BWT.
    """
    named = {metric_name(key, run.tasks): value for key, value in step.values.items() if key.metric != "coefficient_sd"}
    values = {**run.measures(step), **named}
    return [Metric(key, float(value), at, run.learned(step)) for key, value in values.items() if value is not None]


def metric_name(key: Key, tasks: Sequence[str]) -> str:
    """The name of a step's value in MLflow."""
    if key.task is None:
        return key.metric
    if key.branch is None:
        return f"{key.metric}.{short_name(key.task)}"
    return f"task.{short_name(key.task)}.{key.metric}.{short_name(tasks[key.branch - 1])}"


def short_name(task: str) -> str:
    """A task's name as metrics have it: at most `NAME_LENGTH` characters."""
    return task if len(task) <= NAME_LENGTH else f"{task[: NAME_LENGTH - 9]}-{_digest(task)[:8]}"


def points(kind: str, record: Mapping[str, Any], at: int) -> list[Metric]:
    """A record of train.jsonl or validation.jsonl as metrics, logged at time `at` in ms."""
    there = [key for key in CURVES[kind] if key in record]
    return [Metric(f"{kind}.{key}", float(record[key]), at, int(record["step"])) for key in there]


def _missing_points(client: MlflowClient, run_id: str, folder: Path, step: Step, started: int) -> list[Metric]:
    """The curves' points that were not logged during training, thinned evenly to POINTS (the last one stays)."""
    rows = train_records(folder)
    prepare, train = (step.values.get(Key(f"seconds.{phase}"), 0.0) for phase in ("prepare", "train"))
    stride = -(-len(rows) // POINTS) or 1
    found = []
    for kind, records in (("train", rows[::-1][::stride][::-1]), ("validation", step.validation)):
        logged = {metric.step for metric in client.get_metric_history(run_id, f"{kind}.loss")}
        for record in (record for record in records if record["step"] not in logged):
            at = started + int(1000 * (prepare + train * record["step"] / len(rows)))
            found += points(kind, record, at)
    return found


def _of_model(
    client: MlflowClient, experiment: str, child: MlflowRun, run: Record, step: Step, outcome: Iterable[Metric]
) -> list[Metric]:
    """The outcome as metrics of both the child run and its logged model, which is created if missing."""
    run_id, name = child.info.run_id, child.info.run_name.replace(".", "_")
    tags = {key: str(run.config[key]) for key in ("method", "seed", "order")}
    if not (found := _models(client, child)):
        client.create_logged_model(experiment, name, run_id, tags, model_type="gainlora")
        found = _models(client, child)
    for again in found[1:]:  # as in `_create`
        client.delete_logged_model(again.model_id)
    if found[0].status != "READY":
        with suppress(MlflowException):  # linked before: the store refuses a second time
            client.log_outputs(run_id, [LoggedModelOutput(found[0].model_id, run.learned(step))])
        client.finalize_logged_model(found[0].model_id, "READY")
    return [Metric(m.key, m.value, m.timestamp, m.step, model_id=found[0].model_id) for m in outcome]


def _models(client: MlflowClient, child: MlflowRun) -> list[LoggedModel]:
    """The logged models of a child run, the oldest first."""
    found = client.search_logged_models([child.info.experiment_id], f"source_run_id = '{child.info.run_id}'")
    return sorted(found, key=lambda model: (model.creation_timestamp, model.model_id))


def _delete(client: MlflowClient, run: MlflowRun) -> None:
    """Delete a run and its logged model."""
    for model in _models(client, run):
        client.delete_logged_model(model.model_id)
    client.delete_run(run.info.run_id)


def _artifacts(client: MlflowClient, run_id: str, folder: Path) -> None:
    """The task's folder: adapter, gate and bases under adapter/, predictions/, the rest beside."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            client.log_artifacts(run_id, str(path), path.name)
        else:
            adapter = path.suffix == ".safetensors" or path.name == "adapter_config.json"
            client.log_artifact(run_id, str(path), "adapter" if adapter else None)


def _table(run: Record) -> dict[str, list[Any]]:
    """R in the format of MLflow's tables: one row per finished step."""
    rows = [
        [step.task, *(step.values.get(Key("score", task)) for task in run.tasks), *run.measures(step).values()]
        for step in run.steps
    ]
    return {"columns": ["after task", *run.tasks, *MEASURES], "data": rows}


def run_name(run: Record) -> str:
    """Name of a run in MLflow's lists, which show its beginning: method and seed first."""
    method, seed, order = (run.config[key] for key in ("method", "seed", "order"))
    return f"{method}-{seed}-{order}-{run.model}-{run.run_id[-8:]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
