"""Artifacts of flows in Prefect's UI. Learning never depends on them: without a server they are skipped."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

_bars: dict[str, UUID] = {}


def show_table(markdown: str, key: str, description: str) -> None:
    """A Markdown artifact; the UI shows the last one of a key, with the earlier ones as its history."""
    with _optional():
        create_markdown_artifact(markdown, key=key, description=description)


def show_progress(percent: float, key: str) -> None:
    """A progress bar, 0 to 100: created by this process's first call, then updated."""
    with _optional():
        if key in _bars:
            update_progress_artifact(_bars[key], percent)
        else:
            _bars[key] = create_progress_artifact(percent, key=key)


@contextmanager
def _optional() -> Iterator[None]:
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # one attempt: artifacts are not worth waiting
            yield
    except httpx.HTTPError as error:
        get_run_logger().warning(f"Prefect's server does not answer ({type(error).__name__}); learning continues")
