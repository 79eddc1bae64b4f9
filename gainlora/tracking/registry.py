"""Finished runs in MLflow's model registry: model `gainlora-<order>`, one version per finished run.

    the code that serves (tracking/served_model.py), nothing pickled
    artifacts/adapter    the finished model (export/hub.py): safetensors, JSON, its card
    MLmodel              signature; name, location and SHA-256 of the base model, which is not copied

A version is an artifact of its MLflow run. Which one is the `champion`, `gainlora.tracking.promotion` decides.
"""

import hashlib
import json
import tempfile
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, Map, ParamSchema, ParamSpec, Schema

from gainlora.errors import GainLoRAError
from gainlora.export.hub import write_release
from gainlora.export.saved import SavedModel, files_sha256, open_saved
from gainlora.inference import make_prompt
from gainlora.tracking.mlflow import DONE, KEY
from gainlora.tracking.store import connect, database

CHAMPION = "champion"
"""The served alias: models:/gainlora-<order>@champion."""
PACKAGES = ("mlflow", "torch", "transformers", "safetensors")
"""Requirements of the served model, except this package, which is on no index."""


def model_name(order: str) -> str:
    """The registered model that holds an order's runs."""
    return f"gainlora-{order}"


def register(folder: Path, uri: str) -> int:
    """Register a finished run; returns the version's number. A registered run keeps its version.

    Args:
        folder: a finished run's, or a finished model's.
        uri: the store's absolute address (`store.tracking_uri`).

    Raises:
        GainLoRAError: the run is not finished, not in MLflow, needs the task at inference, or its base is missing.
    """
    learned = open_saved(folder)
    learned.check_finished()
    if learned.adapter.integration == "single":
        raise GainLoRAError(f"{folder}: method single needs a task id to choose a branch, which no served model takes.")
    if (file := database(uri)) and not file.exists():
        raise GainLoRAError(f"tracking.uri: {uri} is not there; give the `gainlora run` command again, which makes it.")
    run, name = learned.run, model_name(learned.config.order.name)
    digest = files_sha256(learned.base())
    done = hashlib.sha256(json.dumps([run.result, digest], sort_keys=True).encode()).hexdigest()
    with connect(uri) as client:
        run_id = _run_id(client, run.run_id)
        if there := _versions(client, name, run.run_id, done):
            return there[0]
        place = f"model-{done[:8]}"
        with tempfile.TemporaryDirectory(prefix="gainlora-model-") as scratch:
            save_model(learned, Path(scratch) / "model")
            client.log_artifacts(run_id, str(Path(scratch) / "model"), place)
        try:
            client.create_registered_model(name, description=f"Finished runs of order {learned.config.order.name}.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
        tags = {KEY: run.run_id, DONE: done, "method": run.config["method"]}
        tags |= {key: f"{run.result[key]:.2f}" for key in ("AP", "FT") if run.result[key] is not None}
        client.create_model_version(name, source, run_id, tags, description=f"Tasks: {', '.join(run.tasks)}.")
        made, *again = _versions(client, name, run.run_id, done)
        for version in again:  # after a late answer the client repeats its request, which creates one more each time
            client.delete_model_version(name, str(version))
        return made


def _versions(client: MlflowClient, name: str, run: str, done: str) -> list[int]:
    """Numbers of a model's versions of this run in its present state, lowest first."""
    held = client.search_model_versions(f"name = '{name}'")
    return sorted(int(v.version) for v in held if (v.tags.get(KEY), v.tags.get(DONE)) == (run, done))


def signature(learned: SavedModel) -> ModelSignature:
    """Signature of the served model: an answer a row, with coefficients on request. The model checks the rows."""
    asked = ColSpec(Map("double"), "coefficients", required=False)
    params = [
        ParamSpec("max_new_tokens", "integer", learned.config.data.max_target_tokens),
        ParamSpec("coefficients", "boolean", False),
    ]
    return ModelSignature(None, Schema([ColSpec("string", "answer"), asked]), ParamSchema(params))


def save_model(learned: SavedModel, folder: Path) -> None:
    """Write a finished model in MLflow's layout, for `mlflow models serve -m`.

    Args:
        folder: a new one; the adapter is also written beside it.
    """
    described = [task for task in learned.run.tasks if "definition" in learned.run.data[task]]
    prompts = [make_prompt(learned, "Some text of this task.", task) for task in described]
    base = learned.base()
    settings: dict[str, Any] = {"base": base, "base_digest": files_sha256(base)}
    adapter = folder.with_name("adapter")  # its name in the version, too
    write_release(learned, adapter)
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(Path(__file__).with_name("served_model.py")),  # as code: nothing is pickled
        artifacts={"adapter": str(adapter)},
        model_config=settings,
        signature=signature(learned),
        input_example=pandas.DataFrame({"text": prompts or ["Some text.\nOutput: "]}),
        pip_requirements=[f"{package}=={installed(package)}" for package in PACKAGES],
        metadata={"order": learned.config.order.name, "base_model": learned.adapter.base_model, **settings},
    )


def _run_id(client: MlflowClient, key: str) -> str:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`{KEY}` = '{key}'", max_results=1)
    if not found:
        raise GainLoRAError(f"{key}: MLflow has no such run; give its `gainlora run` command again, which delivers it.")
    return str(found[0].info.run_id)
