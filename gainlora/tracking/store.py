"""The MLflow store: its address, a check that its server answers, a client, the experiment."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from gainlora.errors import GainLoRAError
from gainlora.io import lasting_root
from gainlora.proxies import direct
from gainlora.sections import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment that MLflow's pages show as model training, not as generative AI."""
SQLITE, ESCAPED = "sqlite:///", "sqlite+pysqlite:///"
"""Beginnings of a database file's address. With the first, MLflow creates the folder by its escaped name."""
DAMAGES = ("file is not a database", "database disk image is malformed")
"""What SQLite says of a damaged file."""


def tracking_uri(root: Path = Path("."), uri: str | None = None) -> str:
    """The store's absolute address, the same in every process.

    Args:
        root: the project's folder.
        uri: params.yaml's `tracking.uri`; None: SQLite in <root>/mlruns. A relative SQLite path counts from root.

    Raises:
        GainLoRAError: not the address of a store, or one with a password, which would be versioned and logged.
    """
    uri = TrackingConfig(uri=uri).uri or "sqlite:///mlruns/mlflow.db"
    if uri.startswith(SQLITE):
        return _address((lasting_root(root) / unquote(uri.removeprefix(SQLITE))).resolve())
    return uri


def database(uri: str) -> Path | None:
    """The file of a SQLite store; None for a server or another database."""
    kind, _, path = uri.partition(":///")
    return Path(unquote(path)) if f"{kind}:///" in (SQLITE, ESCAPED) else None


def _address(database: Path) -> str:
    """The address of a file; in it, "?" would begin options and "%XX" stand for a character."""
    path = re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", str(database)).replace("?", "%3F")
    return (SQLITE if path == str(database) else ESCAPED) + path


def check_server(uri: str) -> None:
    """Refuse an MLflow server that does not answer, before learning begins.

    Args:
        uri: what `tracking_uri` returned; other stores are opened without a server.

    Raises:
        GainLoRAError: no answer.
    """
    if not uri.startswith("http"):
        return
    os.environ.update(direct())
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return  # a server answers; the first write will show whether it accepts ours
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise GainLoRAError(
            f"tracking.uri: {uri}: no MLflow server answers ({reason}); start it, or set tracking.uri to null."
        ) from None


@contextlib.contextmanager
def store(tracking: TrackingConfig, root: Path) -> Iterator[tuple[MlflowClient, str]]:
    """A client, and the id of the experiment, which is created if missing.

    A local store is locked during the block: otherwise two processes that find no database would both create its
    tables, and two that find no run would both create one.
    """
    uri = tracking_uri(root, tracking.uri)
    with connect(uri) as client:
        file = database(uri)
        artifacts = (file.parent / "artifacts").as_uri() if file else None
        yield client, _experiment(client, tracking.experiment, artifacts)


@contextlib.contextmanager
def connect(uri: str) -> Iterator[MlflowClient]:
    """A client of the store at an absolute address. A local store is locked during the block.

    Args:
        uri: what `tracking_uri` returned.
    """
    os.environ.update(direct())
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # records are delivered later; learning must not wait
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for every file
    # two lines per migration, of which there are 50; "Validating input example" per registered run; "Stopping system
    # metrics monitoring" in the middle of a run's own lines
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from filelock import FileLock
    from mlflow import MlflowClient

    with contextlib.ExitStack() as stack:
        if file := database(uri):
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{file}.lock"))
            if not file.exists():
                _make_database(file)
        try:
            yield MlflowClient(tracking_uri=uri, registry_uri=uri)  # one store, whatever MLFLOW_REGISTRY_URI says
        except Exception as error:
            if any(damage in str(error) for damage in DAMAGES):
                raise GainLoRAError(
                    f"{file}: damaged, so MLflow cannot read it; restore a copy, or move it away: the same `gainlora "
                    "run` commands record their runs in a new one."
                ) from None
            raise


def _make_database(file: Path) -> None:
    """Create the tables in another file, then rename it: MLflow cannot resume from half of its tables."""
    from mlflow import MlflowClient

    new = file.with_name(file.name + ".new")
    for left in (new, new.with_name(new.name + "-journal")):  # left by a killed process
        left.unlink(missing_ok=True)
    MlflowClient(tracking_uri=_address(new)).search_experiments(max_results=1)
    new.replace(file)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=KIND)
        except MlflowException as error:  # another machine created it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise GainLoRAError(f"tracking.experiment: {name!r}: {error.message}") from None
    if found.lifecycle_stage == "deleted":
        remedy = f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
        raise GainLoRAError(f"tracking.experiment: {name!r} was deleted; {remedy}, or choose another name.")
    return str(found.experiment_id)
