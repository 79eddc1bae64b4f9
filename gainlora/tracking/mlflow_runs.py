"""Runs read back from MLflow.

A record is built from a search: options (params), environment (tags) and data (inputs) of the parent run, and
the metrics of every finished child. No artifact is downloaded.
"""

import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Run as MlflowRun
from mlflow.utils import get_results_from_paginated_fn

from gainlora.errors import GainLoRAError, printable, reason
from gainlora.runs.records import MEASURES, ROUTING, UNLEARNED, Key, Record, Step, checked, complete_or_refused
from gainlora.sections import TrackingConfig
from gainlora.tracking.mlflow import CURVES, DONE, KEY, PARENT, metric_name
from gainlora.tracking.store import database, store, tracking_uri

REPORT = "report"
"""Key of the run in which version 0.1.0 stored its report."""


def tracked_runs(tracking: TrackingConfig, root: Path = Path(".")) -> list[Record]:
    """All runs of the experiment, sorted by name. Unreadable runs are reported on stderr.

    Args:
        tracking: params.yaml's section: experiment, uri.
        root: the project's folder.

    Raises:
        GainLoRAError: the store does not exist or cannot be read, or the experiment was deleted.
    """
    uri = tracking_uri(root, tracking.uri)
    if (file := database(uri)) and not file.exists():
        raise GainLoRAError(
            f"tracking.uri: {uri} is not there, so there are no runs; make one first (`gainlora run embedded`), or "
            "name run folders or result files."
        )
    try:
        with store(tracking, root) as (client, experiment):
            found: list[MlflowRun] = get_results_from_paginated_fn(
                lambda count, token: client.search_runs([experiment], max_results=count, page_token=token), 1000
            )
    except GainLoRAError:
        raise
    except Exception as error:  # of MLflow, its database's driver, or the network
        remedy = "correct it, or name run folders or result files"
        raise GainLoRAError(f"tracking.uri: {uri}: cannot be read ({reason(error)}); {remedy}.") from None
    children: dict[str, list[MlflowRun]] = {}
    for run in found:
        if PARENT in run.data.tags and DONE in run.data.tags:
            children.setdefault(run.data.tags[PARENT], []).append(run)
    parents = [run for run in found if PARENT not in run.data.tags and run.data.tags.get(KEY) not in (None, REPORT)]
    records = []
    for parent in sorted(parents, key=lambda run: run.data.tags[KEY]):
        what = f"MLflow's run {printable(parent.data.tags[KEY])}"
        remedy = "run the same command again to log it, or delete the run"
        try:
            with complete_or_refused(what, "not whole", remedy):
                records.append(_record(parent, children.get(parent.info.run_id, [])))
        except GainLoRAError as error:
            print(f"left out: {error}", file=sys.stderr)
    return records


def _record(parent: MlflowRun, children: Sequence[MlflowRun]) -> Record:
    """The record of a parent run and its finished children."""
    tags = parent.data.tags
    options: dict[str, Any] = {}
    for dotted, text in parent.data.params.items():
        *sections, name = dotted.split(".")
        here = options
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = _value(text)
    learned = [task for task in tags.get("learned later", "").split(", ") if task]
    tasks = [*options["order"]["tasks"]]
    tasks += [task for task in learned if task not in tasks]
    names = ("order", "method", "model", "dtype", "device", "code")
    config: dict[str, Any] = {"run_id": tags[KEY], "seed": int(tags["seed"]), **{name: tags[name] for name in names}}
    config["versions"] = {k.removeprefix("version."): v for k, v in tags.items() if k.startswith("version.")}
    config["skipped"] = [] if tags["skipped"] == "none" else tags["skipped"].split(", ")
    tasks = [task for task in tasks if task not in config["skipped"]]
    config |= {key: tags[key] for key in ("base", "created") if key in tags}
    config |= {"tasks": tasks, "config": options, "learned": [{"task": t} for t in learned]}
    data = {}
    for entry in (given.dataset for given in (parent.inputs.dataset_inputs if parent.inputs else [])):
        profile, path = json.loads(entry.profile or "{}"), json.loads(entry.source)["uri"]
        data[entry.name] = {**profile, "path": path, "dvc": entry.digest}
    steps = sorted((_step(child, tasks) for child in children), key=lambda step: step.index)
    at_once = any(step.task not in tasks for step in steps) or (tags.get("steps") == "1" and len(tasks) > 1)
    config["steps"] = [steps[0].task if steps else "all"] if at_once else tasks
    return checked(Record(config, data, steps))


def _step(child: MlflowRun, tasks: Sequence[str]) -> Step:
    keys = [Key(kind, task) for kind in ("score", *UNLEARNED, *ROUTING) for task in tasks]
    keys += [Key("coefficient", task, branch) for task in tasks for branch in range(1, len(tasks) + 1)]
    known = {metric_name(key, tasks): key for key in keys}
    metrics = {k: v for k, v in child.data.metrics.items() if k not in MEASURES and k.partition(".")[0] not in CURVES}
    values = {known.get(name, Key(name)): value for name, value in metrics.items()}
    return Step(int(child.data.params["index"]), child.data.params["task"], values)


def _value(text: str) -> Any:
    """A param's value: `str` of plain Python."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
