"""Files: strict JSON and YAML, atomic writes, SHA-256 checksums, sharing by hard link, locks.

Every fault of a file becomes one error with its name and the remedy. Duplicate keys are refused: the standard readers
silently keep the last value. A sealed folder's files are read-only, since several runs may link them: replace or remove
them, never edit them.
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml

from gainlora.errors import GainLoRAError, RunLocked, not_written, short_repr

DAMAGED = "remove its folder and run the order again"
MERGED = 10_000
"""Limit on keys merged by YAML's `<<`: nested merges grow exponentially."""


# -- reading ---------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, absent: str, damaged: str) -> bytes:
    """The file's content, never empty.

    Args:
        absent: remedy if the file does not exist. damaged: remedy if it cannot be used.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise GainLoRAError(f"{path}: not found; {absent}.") from None
    except (OSError, ValueError) as error:  # ValueError: not a possible file name
        reason = getattr(error, "strerror", None) or error
        raise GainLoRAError(f"{path}: cannot be read ({reason}); make it a readable file.") from None
    if not content.strip():
        raise GainLoRAError(f"{path}: empty; {damaged}.")
    return content


def parse_json(content: bytes, source: object, damaged: str) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark."""
    try:
        return json.loads(decode(content, source), object_pairs_hook=_object)
    except RecursionError:
        raise GainLoRAError(f"{source}: nested too deeply; {damaged}.") from None
    except ValueError as error:  # also numbers of thousands of digits
        reason = str(error).partition(";")[0]
        raise GainLoRAError(f"{source}: not JSON: {reason}; {damaged}.") from None


def read_yaml(path: Path, absent: str, damaged: str) -> Any:
    """The content of a YAML file."""
    return parse_yaml(decode(read_bytes(path, absent, damaged), path), path, damaged)


def parse_yaml(text: str, source: object, damaged: str) -> Any:
    """Parse YAML: safe tags, no duplicate keys."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise GainLoRAError(f"{source}: nested too deeply; {damaged}.") from None
    except Exception as error:  # any exception: PyYAML does not check text that a tag declares a number or a date
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GainLoRAError(f"{source}: not valid YAML: {reason}; {damaged}.") from None


def read_json(
    path: Path, *keys: str, absent: str = "name a folder under runs/, or run the order again", damaged: str = DAMAGED
) -> dict[str, Any]:
    """The JSON object in a file; requires these keys.

    Args:
        absent, damaged: remedies, as for `read_bytes`.

    Raises:
        GainLoRAError: missing, not a JSON object, or without a key.
    """
    content = parse_json(read_bytes(path, absent, damaged), path, damaged)
    if not isinstance(content, dict):
        raise GainLoRAError(f"{path}: holds no JSON object; {damaged}.")
    if lacking := [key for key in keys if key not in content]:
        raise GainLoRAError(f"{path}: lacks {', '.join(lacking)}; {damaged}.")
    return content


def decode(content: bytes, source: object) -> str:
    """Text in UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GainLoRAError(f"{source}: not UTF-8 (byte {error.start}); save it again as UTF-8.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"key {short_repr(_twice(key for key, _ in pairs))} is given twice")
    return made


def _twice(keys: Iterable[Any]) -> Any:
    """The first duplicate key; None if all are distinct."""
    seen = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


_SCALARS = (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ("merge", r"<<"),
)
"""Plain scalars by YAML 1.2, as in DVC. Anything else is text: YAML 1.1 would read `010` as 8,
`1:30` as 90 and `yes` as true."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: typing.ClassVar[Any] = {  # type: ignore[misc]
        None: [(f"tag:yaml.org,2002:{kind}", re.compile(rf"({words})\Z")) for kind, words in _SCALARS]
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = _twice((key.tag, key.value) for key in scalars)
        if twice:
            raise yaml.MarkedYAMLError(f"key {short_repr(twice[1])} is given twice", problem_mark=node.start_mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MERGED:
            raise yaml.MarkedYAMLError(f"'<<' gathers more than {MERGED} keys", problem_mark=node.start_mark)


# -- writing ---------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically."""
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


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_lines(path: Path) -> list[Any]:
    """What `write_lines` wrote.

    Raises:
        GainLoRAError: the file is missing or damaged.
    """
    return [parse_json(line, path, DAMAGED) for line in read_bytes(path, DAMAGED, DAMAGED).splitlines()]


def flush(folder: Path) -> None:
    """Flush every file in `folder` to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seal(partial: Path, final: Path) -> None:
    """Write checksums.json over every file in `partial`, flush, make the files read-only, and rename it to `final`."""
    for leftover in [*partial.rglob("*.part"), partial / "checksums.json"]:  # of an interrupted write
        leftover.unlink(missing_ok=True)
    for checkpoint in partial.glob("*checkpoint_*"):
        shutil.rmtree(checkpoint)
    flush(partial)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    write_json(partial / "checksums.json", {str(path.relative_to(partial)): sha256(path) for path in files})
    for path in [*files, partial / "checksums.json"]:
        path.chmod(0o444)
    rename(partial, final)


def rename(folder: Path, final: Path) -> None:
    """Rename a folder durably: the name survives a power failure."""
    folder.rename(final)
    parent = os.open(final.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def lasting_root(root: Path) -> Path:
    """The project's folder, also where `root` is the temporary copy in which `dvc exp run --temp` works."""
    parents = root.resolve().parents
    return next((p.parents[2] for p in parents if p.parts[-3:] == (".dvc", "tmp", "exps")), root)


def remove(folder: Path) -> None:
    """Remove a folder atomically for readers."""
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.is_dir():
        folder.rename(hidden)
        shutil.rmtree(hidden)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden, empty folder, each process's own; once the block has filled it, it becomes `folder`, in place of an
    earlier one."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        pid = left.suffixes[-2][1:]
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():  # of a killed process
            shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def link_folder(source: Path, target: Path) -> None:
    """Make `target` a copy of a sealed folder with hard links, or copies where links are impossible.

    Raises:
        GainLoRAError: the source is damaged; `target` is not created.
    """
    with whole_folder(target) as part:
        link_files(source, part)
        verify_checksums(part)


def link_files(source: Path, target: Path) -> None:
    """Copy a folder by hard links, or by copies where links are impossible."""
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another device, too many links, or a file system without them
        shutil.copy2(source, target)


def mending(step: Path) -> str:
    """The remedy for a damaged step of a run."""
    return f"`gainlora repair {os.path.relpath(step.parent)}` drops back to the last good task"


def verify_checksums(folder: Path, *names: str) -> dict[str, str]:
    """Check the files of a sealed folder against checksums.json; returns its content.

    Args:
        names: check only these of them.

    Raises:
        GainLoRAError: a file is missing or changed.
    """
    remedy = mending(folder)
    sums: dict[str, str] = read_json(folder / "checksums.json", absent=remedy, damaged=remedy)
    for name, expected in sums.items():
        path = folder / name
        if names and name not in names:
            continue
        if not path.is_file():
            raise GainLoRAError(f"{path}: missing; {remedy}.")
        if sha256(path) != expected:
            raise GainLoRAError(f"{path}: changed since it was written (another SHA-256); {remedy}.")
    return sums


def is_whole(folder: Path) -> bool:
    """Whether a sealed folder exists and is intact."""
    try:
        verify_checksums(folder)
    except GainLoRAError:
        return False
    return True


def lock(path: Path, what: str) -> IO[str]:
    """Lock `path` until the returned file is closed or the process ends.

    Args:
        what: for the message, e.g. "runs/x: this run".

    Raises:
        RunLocked: another process holds the lock; the message names it, its machine and start time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = path.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "just started"
        handle.close()
        raise RunLocked(
            f"{what} is in progress already ({holder}); wait for it, or stop it and give the same command again: it "
            "resumes where it stopped."
        ) from None
    handle.truncate(0)
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    handle.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
    handle.flush()
    return handle
