"""Errors that a user can cause and correct."""

import difflib
import errno
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HELP = "docs/troubleshooting.md"
SECTIONS = {
    "set-up": r".*(package index|fetch again|`gainlora fetch embedded`|run from the project's folder)",
    "data": r"orders\.|.*(train|dev|test)\.json|.*changed since this run began",
    "model": r"model\.|lora\.targets|.*(positions of this|base model .*other weights)",
    "learning": r"task .*(, step|: .*(memory is full|covariance|finite))|(gate|input) memory|.*covariance",
    "stopped-damaged": r".*(gainlora repair|in progress already|the same command again)",
    "mlflow": r"tracking\.|.*MLflow",
    "prefect": r".*(P(REFECT|refect)|did not become ready)",
    "options": r"params\.yaml|method|[a-z]+\.[a-z_]+:",
}
"""Sections of HELP, and patterns of the messages that they explain; the first match counts."""
LONGEST = 2000
"""Characters of a message; a longer one loses its middle, since the remedy is at the end."""


def printable(text: str) -> str:
    """Text for a terminal or page: control, bidirectional and other invisible characters as escapes (\\x1b)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class GainLoRAError(Exception):
    """A wrong input, option or state: names the option or file, the value, and the remedy, on one line."""

    def __str__(self) -> str:
        text = printable(" ".join(super().__str__().splitlines()))
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


@contextmanager
def add_context(what: str) -> Iterator[None]:
    """Prefix the errors of a block, e.g. with a task's name."""
    try:
        yield
    except GainLoRAError as error:
        raise type(error)(f"{what}: {error}") from None


class RetryableError(GainLoRAError):
    """Retryable: the same command resumes."""


class RunLocked(RetryableError):
    """Another process works on the run."""


def not_written(path: Path, error: Exception) -> RetryableError:
    """The error for a file of a run that cannot be written: disk full, read-only folder."""
    reason = getattr(error, "strerror", None) or str(error)
    return RetryableError(
        f"{path}: not written: {reason}; free space or make it writable, and give the same command again: it resumes."
    )


def refused_by_system(error: OSError) -> GainLoRAError:
    """The error for a file that the system refuses: disk full, no permission, a file in place of a folder."""
    misplaced = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
    remedy = "make it readable and writable or free space, and give the same command again"
    return GainLoRAError(
        f"{error.filename}: {error.strerror}; {'name another place' if error.errno in misplaced else remedy}."
    )


def format_error(error: object) -> str:
    """Format an error for the terminal, with a link to its troubleshooting section."""
    message = str(error)
    section = next((name for name, begins in SECTIONS.items() if re.match(begins, message)), None)
    return f"error: {message}" + (f"\nsee {HELP}#{section}" if section else "")


def reason(error: Exception) -> str:
    """A library's error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def did_you_mean(name: str, known: Iterable[object]) -> str:
    """Suffix for an "unknown name" error: the nearest known name, or else all of them."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}" if close else f"; known: {', '.join(names)}" if names else ""


def short_repr(value: Any) -> str:
    """A value for a message, shortened; safe for large, deep or recursive values."""
    return _short.repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxstring, self.maxother = 3, 6, 6, 6, 100, 100

    def repr_int(self, value: int, level: int) -> str:
        return f"<{value.bit_length()} bits>" if value.bit_length() > 256 else repr(value)


_short = _Short()
