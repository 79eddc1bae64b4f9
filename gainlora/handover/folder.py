"""A learned model on disk: the adapter's folder, and the run that made it.

runs/<run>/                    a run; its last finished task's state counts
runs/<run>/task_02_<name>/     the state after task 2
adapters/<order>/              a finished model (handover/release.py); the same from a hub, by its id
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gainlora.config import Config, from_dict
from gainlora.data.sources import resolve_model
from gainlora.errors import GainLoRAError
from gainlora.learning.files import verify_checksums
from gainlora.model.files import find_adapter, read_config
from gainlora.model.gainlora_model import GainLoRAConfig
from gainlora.tracking.folder import Run, read_run
from gainlora.tracking.results import read_result_file

RUN = "run.json"
"""A finished run in one file, as `gainlora results` writes it; beside the adapter of a finished model."""


@dataclass(frozen=True)
class Learned:
    """A learned model that is not loaded."""

    folder: Path
    """Of the adapter."""
    adapter: GainLoRAConfig
    run: Run
    """How it was learned."""
    root: Path
    """The project's folder, where the names of base models and data count from."""

    @cached_property
    def config(self) -> Config:
        """The run's configuration."""
        return from_dict(self.run.config["config"])

    def base(self, given: str | None = None) -> str:
        """What to load the base model from: a folder's absolute path, or a hub id.

        Args:
            given: hub id or folder in place of the one that the adapter names.

        Raises:
            GainLoRAError: there is no such model.
        """
        found = resolve_model(given) if given else resolve_model(self.adapter.base_model, self.root)
        return str(Path(found).resolve()) if Path(found).is_dir() else found


def open_learned(place: str | Path) -> Learned:
    """Find out what lies at `place`; nothing is loaded.

    Args:
        place: a run folder, a task folder, adapters/<order>, or a hub id.

    Raises:
        GainLoRAError: it is none of these, or a file is missing or damaged.
    """
    folder = find_adapter(place)
    adapter = read_config(folder)
    if (folder / RUN).exists():
        return Learned(folder, adapter, read_result_file(folder / RUN), Path("."))
    run_folder = folder.resolve().parent
    if not (run_folder / "config.json").exists():
        raise GainLoRAError(
            f"{folder / RUN}: not found, and {run_folder} is no run folder; give the run folder itself, or make the "
            "finished model anew by its `gainlora run`."
        )
    verify_checksums(folder)
    return Learned(folder, adapter, read_run(run_folder), run_folder.parent.parent)


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place` that gets its name if the block succeeds and goes away if not.

    Raises:
        GainLoRAError: there is something at `place`.
    """
    if place.exists():
        raise GainLoRAError(f"--out: {place} exists already; name a new folder, or remove it.")
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def base_digest(source: str) -> str:
    """What tells a base model from others: SHA-256 of its weights in a folder, the commit of a hub id."""
    if not Path(source).is_dir():
        return f"commit {base_config(source)._commit_hash}"
    digest = hashlib.sha256()
    for path in sorted(Path(source).glob("*.safetensors")):
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def base_config(source: str) -> Any:
    """transformers' configuration of a base model.

    Raises:
        GainLoRAError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of any kind: transformers does not check the types in config.json
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise GainLoRAError(f"--base: {source!r}: its config.json cannot be read ({reason}).") from None
