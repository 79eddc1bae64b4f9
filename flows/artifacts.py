"""What flows show in Prefect's UI. Learning does not depend on it: while the server is away it is left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings


def show_table(markdown: str, key: str, description: str) -> None:
    """A Markdown artifact; the last one of a key is the one shown, the earlier ones are its history."""
    with _optional():
        create_markdown_artifact(markdown, key=key, description=description)


class Progress:
    """A progress bar, 0 to 100, from `start` on."""

    def __init__(self, start: float, key: str) -> None:
        self._key = key
        self._id: UUID | None = None
        self.set(start)

    def set(self, percent: float) -> None:
        """Move it."""
        with _optional():
            if self._id is None:
                self._id = create_progress_artifact(percent, key=self._key)
            else:
                update_progress_artifact(self._id, percent)


@contextmanager
def one_attempt() -> Iterator[None]:
    """Ask the server once: where asking later is as good, nobody waits."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield


@contextmanager
def _optional() -> Iterator[None]:
    try:
        with one_attempt():
            yield
    except httpx.HTTPError as error:
        get_run_logger().warning(f"Prefect's server does not answer ({type(error).__name__}); learning goes on")
