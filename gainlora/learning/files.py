"""Small files of a run folder: written whole, checked by SHA-256 before they are trusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gainlora import reading
from gainlora.errors import GainLoRAError, not_written

DAMAGED = "remove its folder and run the order again"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step."""
    _replace(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """One JSON object per line, in one step."""
    _replace(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object in the file, which has at least these keys.

    Raises:
        GainLoRAError: not there, or no JSON object.
    """
    content = reading.read_json(path, "name a folder under runs/, or run the order again", DAMAGED)
    if not isinstance(content, dict):
        raise GainLoRAError(f"{path}: holds no JSON object; {DAMAGED}.")
    if lacking := [key for key in keys if key not in content]:
        raise GainLoRAError(f"{path}: lacks {', '.join(lacking)}; {DAMAGED}.")
    return content


def flush(folder: Path) -> None:
    """Bring every file in `folder` to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


def seal(partial: Path, final: Path) -> None:
    """Write checksums.json over every file in `partial`, flush all of it, and give it its final name."""
    for leftover in [*partial.rglob("*.part"), partial / "checksums.json"]:  # of an interrupted write
        leftover.unlink(missing_ok=True)
    for checkpoint in partial.glob("*checkpoint_*"):
        shutil.rmtree(checkpoint)
    flush(partial)
    sums = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        with path.open("rb") as handle:
            sums[str(path.relative_to(partial))] = hashlib.file_digest(handle, "sha256").hexdigest()
    write_json(partial / "checksums.json", sums)
    partial.rename(final)
    parent = os.open(final.parent, os.O_RDONLY)
    os.fsync(parent)  # the new name, too
    os.close(parent)


def verify_checksums(folder: Path) -> None:
    """Check every file against checksums.json.

    Raises:
        GainLoRAError: a file is missing or changed.
    """
    remedy = f"`gainlora repair {os.path.relpath(folder.parent)}` drops back to the last good task"
    sums = folder / "checksums.json"
    if not sums.is_file():
        raise GainLoRAError(f"{sums}: missing; {remedy}.")
    for name, expected in read_json(sums).items():
        path = folder / name
        if not path.is_file():
            raise GainLoRAError(f"{path}: missing; {remedy}.")
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != expected:
            raise GainLoRAError(f"{path}: changed since it was written (another SHA-256); {remedy}.")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    except OSError as error:
        raise not_written(path, error) from None
