"""Finished runs in MLflow's model registry: model `gainlora-<order>`, one version per finished run.

    the code that serves (tracking/served_model.py), nothing pickled
    artifacts/adapter    the finished model (handover/release.py): safetensors, JSON, its card
    MLmodel              signature; the base model by its name, place and SHA-256, not copied

A version is an artifact of its run, beside the records of `mlflow.py`. The first one of a model becomes its `champion`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gainlora.errors import GainLoRAError
from gainlora.handover.card import check_finished
from gainlora.handover.folder import Learned, base_digest, open_learned
from gainlora.handover.predict import make_prompt
from gainlora.handover.release import write_release
from gainlora.tracking.mlflow import DONE, KEY
from gainlora.tracking.store import SQLITE, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CHAMPION = "champion"
"""The alias that is served: models:/gainlora-<order>@champion."""
PACKAGES = ("mlflow", "torch", "transformers", "safetensors")
"""What the served model needs beside this package, which no index has."""


def model_name(order: str) -> str:
    """The registered model that holds an order's runs."""
    return f"gainlora-{order}"


def register(folder: Path, uri: str) -> int:
    """Register a finished run; the version's number. A run that is registered already keeps its version.

    Args:
        folder: a finished run's, or a finished model's.
        uri: the store's absolute address (`store.tracking_uri`).

    Raises:
        GainLoRAError: the run is not finished, not in MLflow, needs the task at inference, or its base is not there.
    """
    learned = open_learned(folder)
    check_finished(learned)
    if learned.adapter.integration == "single":
        raise GainLoRAError(
            f"{folder}: method single must be told the task, which a served model is not; register another."
        )
    from mlflow.exceptions import MlflowException

    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        raise GainLoRAError(f"tracking.uri: {uri} is not there; give the `gainlora run` command again, which makes it.")
    run, name = learned.run, model_name(learned.config.order.name)
    digest = base_digest(learned.base())
    done = hashlib.sha256(json.dumps([run.result, digest], sort_keys=True).encode()).hexdigest()
    with connect(uri) as client:
        run_id = _run_id(client, run.run_id)
        held = client.search_model_versions(f"name = '{name}'")
        if there := _versions(held, run.run_id, done):
            return there[0]
        place = f"model-{done[:8]}"
        with tempfile.TemporaryDirectory(prefix="gainlora-model-") as scratch:
            save_model(learned, Path(scratch) / "model")
            client.log_artifacts(run_id, str(Path(scratch) / "model"), place)
        with contextlib.suppress(MlflowException):  # it exists
            client.create_registered_model(name, description=f"Finished runs of order {learned.config.order.name}.")
        source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
        tags = {KEY: run.run_id, DONE: done, "method": run.config["method"]}
        tags |= {key: f"{run.result[key]:.2f}" for key in ("AP", "FT") if run.result[key] is not None}
        client.create_model_version(name, source, run_id, tags, description=f"Tasks: {', '.join(run.tasks)}.")
        made, *again = _versions(client.search_model_versions(f"name = '{name}'"), run.run_id, done)
        for version in again:  # a server that answers late was asked again, and made one each time
            client.delete_model_version(name, str(version))
        if not held:
            client.set_registered_model_alias(name, CHAMPION, str(made))
        return made


def _versions(held: Iterable[ModelVersion], run: str, done: str) -> list[int]:
    """Numbers of the versions that are this run as it is now, lowest first."""
    return sorted(int(v.version) for v in held if (v.tags.get(KEY), v.tags.get(DONE)) == (run, done))


def signature(learned: Learned) -> ModelSignature:
    """What the served model takes and gives: rows with a text each; an answer each, coefficients if asked for."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Map, ParamSchema, ParamSpec, Schema

    asked = ColSpec(Map("double"), "coefficients", required=False)
    params = [
        ParamSpec("max_new_tokens", "integer", learned.config.data.max_target_tokens),
        ParamSpec("coefficients", "boolean", False),
    ]
    return ModelSignature(
        Schema([ColSpec("string", "text")]), Schema([ColSpec("string", "answer"), asked]), ParamSchema(params)
    )


def save_model(learned: Learned, folder: Path) -> None:
    """Write a finished model in MLflow's layout, as `mlflow models serve -m` takes it.

    Args:
        folder: a new one.
    """
    import mlflow.pyfunc
    import pandas

    prompts = [
        make_prompt(learned, "Some text of this task.", t)
        for t in learned.run.tasks
        if "definition" in learned.run.data[t]
    ]
    base = learned.base()
    settings: dict[str, Any] = {"base": base, "base_digest": base_digest(base)}
    with tempfile.TemporaryDirectory(prefix="gainlora-model-") as scratch:
        adapter = Path(scratch) / "adapter"  # its name in the version, too
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
