"""A run in MLflow: one parent run, one child run per task.

    parent  <run_id>              options as params; at step t: AP, FT, BWT, score.<task>, seconds.*,
            |                     subspace.* (basis sizes), stored.* (parameters kept),
            |                     task.<asked>.coefficient.<branch>; config.json, data.json, R as table,
            |                     figures; data sets as inputs
            +- task_01_<name>     loss by optimizer step, scores on all seen tasks, adapter, gate, bases,
            +- task_02_<name>     predictions

Everything goes through `MlflowClient` with explicit run ids: no active run, which a Prefect task on
another thread would lose. A run is found again by its tag `gainlora.key`, so a resumed run continues
its own MLflow run; what was logged is known by the tag `gainlora.done`, and a crash in between repeats
the same points with the same timestamps, which the store keeps once. `mlflow_runs.py` reads runs back.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gainlora.errors import GainLoRAError
from gainlora.tracking.folder import Run, Step, options, read_json, read_lines, read_run, read_step
from gainlora.tracking.store import store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric
    from mlflow.entities import Run as MlflowRun

KEY, DONE, PARENT = "gainlora.key", "gainlora.done", "mlflow.parentRunId"
FORGOT = "gainlora.forgot"
"""Tag of a run that was set aside, as its folder forgot a task."""
POINTS = 1000
"""Points of a loss curve that are logged; longer ones are thinned, train.jsonl (an artifact) has all."""
PARAM_LENGTH = 6000  # MLflow's limit
NOTE = (
    "Step t: after learning task t. AP: mean score over the tasks seen, higher is better. FT: forgetting, lower is "
    "better. BWT: below 0 is forgetting. score.X: on task X; a falling curve is a task being forgotten. "
    "Chart AP, FT and score.* of several runs together to compare methods; child runs hold the training curves."
)


def start(folder: Path, tracking: dict[str, Any], root: Path = Path(".")) -> str:
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
            client, experiment, folder.name, run_name=folder.name, tags={"mlflow.note.content": NOTE}
        )
        run_id: str = parent.info.run_id
        if parent.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        # a run that learned a task since keeps its first params: MLflow lets none change
        params = {k: v for k, v in options(run.config["config"]).items() if k not in parent.data.params}
        _log(client, run_id, params=params, tags=_tags(run))  # two at once would collide
    client.log_inputs(run_id, datasets=[_dataset(name, entry) for name, entry in run.data.items()])
    for name in ("config.json", "data.json"):
        client.log_artifact(run_id, str(folder / name))
    return run_id


def record_task(
    folder: Path, task_folder: Path, parent_run_id: str, tracking: dict[str, Any], root: Path = Path(".")
) -> str:
    """Log a finished task: a child run of its own, and the parent's metrics at step t.

    Args:
        folder: runs/<run_id>.
        task_folder: one finished task's folder in it.
        parent_run_id: what `start` returned.
        tracking: params.yaml's section: experiment, uri.
        root: the project's folder.

    Returns:
        MLflow's run id of the child, FINISHED.

    Raises:
        GainLoRAError: the task's folder is not whole.
    """
    run, step = read_run(folder), read_step(task_folder)
    sums = task_folder / "checksums.json"
    content = json.dumps(read_json(sums), sort_keys=True)
    ended = int(sums.stat().st_mtime * 1000)  # the folder's own time: the same whenever it is logged
    started = ended - int(1000 * sum(step.scores["seconds"].values()))
    key = f"{folder.name}/{task_folder.name}"
    with store(tracking, root) as (client, experiment):
        child = _find(client, experiment, key)
        if child is not None and DONE in child.data.tags:
            if child.data.tags[DONE] == _digest(content):
                if child.data.tags[PARENT] != parent_run_id:  # the parent was made anew
                    _log(client, parent_run_id, metrics=_outcome(run, step, ended))
                    client.set_tag(child.info.run_id, PARENT, parent_run_id)
                return str(child.info.run_id)
            client.delete_run(child.info.run_id)  # the task was learned again, with another outcome
            child = None
        child = child or _create(
            client, experiment, key, start_time=started, run_name=task_folder.name, tags={PARENT: parent_run_id}
        )
    run_id: str = child.info.run_id
    data = run.data if run.at_once else {step.task: run.data[step.task]}
    counts = {key: sum(entry[key] for entry in data.values()) for key in ("train", "test")}
    _log(client, run_id, params={"task": step.task, "index": step.index, **counts}, tags=_tags(run))
    client.log_inputs(run_id, datasets=[_dataset(name, entry) for name, entry in data.items()])
    outcome = _outcome(run, step, ended)
    _log(client, run_id, metrics=outcome + _curve(task_folder, step, started))
    _log(client, parent_run_id, metrics=outcome)
    _artifacts(client, run_id, task_folder)
    client.set_terminated(run_id, "FINISHED", end_time=ended)
    client.set_tag(run_id, DONE, _digest(content))  # last: it says that all of this is done
    return run_id


def finish(
    folder: Path, parent_run_id: str, tracking: dict[str, Any], report: dict[str, Any], root: Path = Path(".")
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
    if not run.complete:
        done = f"{len(run.steps)} of {len(run.config['steps'])} tasks are learned"
        raise GainLoRAError(f"{folder}: {done}; run the same command again to continue it.")
    with store(tracking, root) as (client, _):
        parent = client.get_run(parent_run_id)
    digest = _digest(json.dumps(run.result, sort_keys=True))
    if parent.data.tags.get(DONE) != digest:
        client.log_artifact(parent_run_id, str(folder / "result.json"))
        rows = _table(run)
        if any(file.path == "R.json" for file in client.list_artifacts(parent_run_id)):  # log_table would append
            whole = {"columns": list(rows), "data": [list(row) for row in zip(*rows.values(), strict=True)]}
            client.log_dict(parent_run_id, whole, "R.json")
        else:
            client.log_table(parent_run_id, rows, "R.json")
        from gainlora.tracking.report import run_figures

        for name, (figure, _) in run_figures(run, report["decimals"]).items():
            client.log_figure(parent_run_id, figure, f"figures/{name}.png", save_kwargs={"dpi": report["dpi"]})
        client.set_tag(parent_run_id, DONE, digest)
        client.set_terminated(parent_run_id, "FINISHED")
    else:
        client.set_terminated(parent_run_id, "FINISHED", end_time=parent.info.end_time)


def record_run(folder: Path, tracking: dict[str, Any], report: dict[str, Any], root: Path = Path(".")) -> str:
    """All of a finished run that is not there yet: `start`, `record_task` for every task, `finish`; its run id."""
    parent = start(folder, tracking, root)
    for step in read_run(folder).steps:
        assert step.folder is not None
        record_task(folder, step.folder, parent, tracking, root)
    finish(folder, parent, tracking, report, root)
    return parent


def retire(folder: Path, task_folder: str, task: str, tracking: dict[str, Any], root: Path = Path(".")) -> None:
    """Set aside the parent run, and the newest task's run, of a run folder that is to forget this task.

    What a metric was at a step cannot be taken back, so `record_run` makes the parent anew from the folder. The old one
    says what was forgotten, and keeps what the model registry has of it. Done again it changes nothing.

    Args:
        folder: runs/<run_id>.
        task_folder, task: the newest task's folder in it, and its name.
        tracking: params.yaml's section: experiment, uri.
        root: the project's folder.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    task_key = f"{folder.name}/{task_folder}"
    with store(tracking, root) as (client, experiment):
        if not _find(client, experiment, task_key):
            return
        for key in (folder.name, task_key):  # the task's last: it says that both are done
            if found := _find(client, experiment, key):
                client.update_run(found.info.run_id, name=f"{found.info.run_name} (forgot {task}, {now})")
                client.set_tag(found.info.run_id, FORGOT, task)
                client.set_tag(found.info.run_id, KEY, f"{key}@{now}")


def fail(
    parent_run_id: str, status: Literal["FAILED", "KILLED"], tracking: dict[str, Any], root: Path = Path(".")
) -> None:
    """Close a parent run that stopped early; `start` reopens it.

    Args:
        parent_run_id: what `start` returned.
        status: FAILED after an error, KILLED when it was stopped.
        tracking: params.yaml's section: experiment, uri.
        root: the project's folder.
    """
    with store(tracking, root) as (client, _):
        client.set_terminated(parent_run_id, status)


def _find(client: MlflowClient, experiment: str, key: str) -> MlflowRun | None:
    """The run with this key, if there is one that is not deleted. Of several the one with most records stays."""
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'")
    if not found:
        return None
    kept = max(found, key=lambda run: (DONE in run.data.tags, len(run.data.metrics), run.info.run_id))
    for run in found:
        if run is not kept:
            client.delete_run(run.info.run_id)
    return kept


def _create(client: MlflowClient, experiment: str, key: str, tags: dict[str, str], **options: Any) -> MlflowRun:
    """A run with this key. The client asks again when a server answers late, which has made one each time then."""
    made = client.create_run(experiment, tags={KEY: key, **tags}, **options)
    return _find(client, experiment, key) or made


def _log(
    client: MlflowClient,
    run_id: str,
    metrics: list[Metric] | None = None,
    params: dict[str, Any] | None = None,
    tags: dict[str, Any] | None = None,
) -> None:
    """One request per 1000 metrics or 100 params and tags, MLflow's limits."""
    from mlflow.entities import Param, RunTag

    settings = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in (params or {}).items()]
    labels = [RunTag(key, str(value)) for key, value in (tags or {}).items()]
    for at in range(0, len(metrics or []), 1000):
        client.log_batch(run_id, metrics=(metrics or [])[at : at + 1000])
    for at in range(0, max(len(settings), len(labels)), 100):
        client.log_batch(run_id, params=settings[at : at + 100], tags=labels[at : at + 100])


def _tags(run: Run) -> dict[str, Any]:
    names = ("method", "order", "model", "seed", "dtype", "device", "code")
    tags = {name: run.config[name] for name in names}
    tags |= {f"version.{name}": version for name, version in run.config["versions"].items()}
    learned = [entry["task"] for entry in run.config.get("learned", [])]
    tags |= {"learned later": ", ".join(learned)} if learned else {}
    return tags | {"tasks": len(run.tasks), "skipped": ", ".join(run.config["skipped"]) or "none"}


def _dataset(name: str, entry: dict[str, Any]) -> DatasetInput:
    """A task's data as a run's input: digest by DVC where it tracks the folder, else of the contents."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(
        name=name,
        digest=(entry["dvc"] or entry["sha256"])[:36],  # MLflow's limit
        source_type="local",
        source=json.dumps({"uri": entry["path"]}),
        profile=json.dumps({"train": entry["train"], "test": entry["test"], "sha256": entry["sha256"]}),
    )
    return DatasetInput(data, [InputTag("mlflow.data.context", "training")])


def _outcome(run: Run, step: Step, at: int) -> list[Metric]:
    """What is known after task t, at step t: the same names on parent and child, in every run.

    Dots, not slashes: the UI makes a section of what stands before a slash and shows it above AP, FT and BWT.
    """
    from mlflow.entities import Metric

    scores, subspace = step.scores, step.subspace
    values = {key: scores[key] for key in ("AP", "FT", "BWT")}
    values |= {f"score.{task}": score for task, score in scores["scores"].items()}
    values |= {f"seconds.{phase}": seconds for phase, seconds in scores["seconds"].items()}
    values |= {key: scores[key] for key in ("trainable_parameters", "truncated", "num_processes")}
    for task, row in step.coefficients.items():
        values |= {f"task.{task}.coefficient.{b}": a for b, a in zip(run.tasks, row["mean"], strict=False)}
    values |= {f"subspace.gate.{layer}": k for layer, k in subspace["gate"].items()}
    if subspace["layers"]:
        sizes = list(subspace["layers"].values())
        values |= {"subspace.layers.mean": sum(sizes) / len(sizes), "subspace.layers.max": max(sizes)}
    values |= {f"stored.{kind}": count for kind, count in step.stored.items()}
    return [Metric(key, float(value), at, run.learned(step)) for key, value in values.items() if value is not None]


def _curve(folder: Path, step: Step, started: int) -> list[Metric]:
    """Training by optimizer step, thinned evenly to POINTS (the last one stays)."""
    from mlflow.entities import Metric

    rows = list(read_lines(folder / "train.jsonl"))
    seconds = step.scores["seconds"]
    stride = -(-len(rows) // POINTS) or 1
    metrics = []
    for n in range(len(rows) - 1, -1, -stride):  # evenly in time too, for the time axis of the UI
        at = started + int(1000 * (seconds["prepare"] + seconds["train"] * (n + 1) / len(rows)))
        metrics += [
            Metric(f"train.{key}", float(rows[n][key]), at, rows[n]["step"])
            for key in ("loss", "learning_rate", "seconds")
        ]
    return metrics[::-1]


def _artifacts(client: MlflowClient, run_id: str, folder: Path) -> None:
    """The task's folder: adapter, gate and bases under adapter/, predictions/, the rest beside."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            client.log_artifacts(run_id, str(path), path.name)
        else:
            adapter = path.suffix == ".safetensors" or path.name == "adapter_config.json"
            client.log_artifact(run_id, str(path), "adapter" if adapter else None)


def _table(run: Run) -> dict[str, list[Any]]:
    """R for `log_table`: one row per finished step."""
    columns: dict[str, list[Any]] = {"after task": [step.task for step in run.steps]}
    columns |= {task: [step.scores["scores"].get(task) for step in run.steps] for task in run.tasks}
    return columns | {key: [step.scores[key] for step in run.steps] for key in ("AP", "FT", "BWT")}


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
