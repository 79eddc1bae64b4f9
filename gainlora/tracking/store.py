"""The MLflow store: its address, whether anybody answers there, a client of it, the experiment."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gainlora.errors import GainLoRAError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
ADDRESS = r"(sqlite:///|https?://|(postgresql|mysql|mssql)(\+\w+)?://)[^\0]+"
"""Of an MLflow store. It keeps no runs in folders."""


def tracking_uri(root: Path = Path("."), uri: str | None = None) -> str:
    """The store's address, absolute, so that it means the same in every process.

    Args:
        root: the project's folder.
        uri: params.yaml's `tracking.uri`; None: SQLite in <root>/mlruns. A relative SQLite path counts from root.

    Raises:
        GainLoRAError: no address of a store, or a server's with a password, which would be versioned and logged.
    """
    if uri is None:
        uri = "sqlite:///mlruns/mlflow.db"
    if re.match("https?://[^/]*@", uri):
        raise GainLoRAError(
            "tracking.uri: holds a user or password, and params.yaml is versioned; give them in the environment: "
            "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD."
        )
    if not re.fullmatch(ADDRESS, uri):
        shown = re.sub("//[^/]*@", "//...@", uri)
        raise GainLoRAError(
            f"tracking.uri: {shown!r}: no address of an MLflow store; give sqlite:///FILE or http://HOST."
        )
    if uri.startswith(SQLITE):
        return f"sqlite:///{(root / uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def check_server(uri: str) -> None:
    """Refuse an MLflow server that does not answer before there is anything to record.

    Args:
        uri: what `tracking_uri` returned; other stores are opened without a server.

    Raises:
        GainLoRAError: nothing answers there.
    """
    if not uri.startswith("http"):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return  # somebody answers; whether we may write shows when we do
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise GainLoRAError(
            f"tracking.uri: {uri}: no MLflow server answers ({reason}); start it, or set tracking.uri to null."
        ) from None


@contextlib.contextmanager
def store(tracking: dict[str, Any], root: Path) -> Iterator[tuple[MlflowClient, str]]:
    """Client and experiment id, both created when missing.

    A local store is locked meanwhile: two processes that find no database would both create its
    tables, and two that find no run would both create it.
    """
    uri = tracking_uri(root, tracking.get("uri"))
    with connect(uri) as client:
        artifacts = None
        if uri.startswith(SQLITE):
            artifacts = (Path(uri.removeprefix(SQLITE)).parent / "artifacts").as_uri()
        yield client, _experiment(client, tracking["experiment"], artifacts)


@contextlib.contextmanager
def connect(uri: str) -> Iterator[MlflowClient]:
    """Client of the store at an absolute address; a local store is locked meanwhile.

    Args:
        uri: what `tracking_uri` returned.
    """
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the flow tries again, and learning must not wait
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for every file
    for name in ("alembic", "mlflow.store.db.utils"):  # two lines for each of 50 migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    from filelock import FileLock
    from mlflow import MlflowClient

    with contextlib.ExitStack() as stack:
        if uri.startswith(SQLITE):
            database = Path(uri.removeprefix(SQLITE))
            database.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{database}.lock"))
            if not database.exists():
                _make_database(database)
        yield MlflowClient(tracking_uri=uri)


def _make_database(database: Path) -> None:
    """MLflow creates its tables one by one, and never goes on from half of them: the file appears whole."""
    from mlflow import MlflowClient

    new = database.with_name(database.name + ".new")
    for left in (new, new.with_name(new.name + "-journal")):  # by a process that was killed
        left.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"{SQLITE}{new}").search_experiments(max_results=1)
    new.replace(database)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:  # another machine was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise GainLoRAError(f"tracking.experiment: {name!r}: {error.message}") from None
    if found.lifecycle_stage == "deleted":
        remedy = f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
        raise GainLoRAError(f"tracking.experiment: {name!r} was deleted; {remedy}, or choose another name.")
    return str(found.experiment_id)
