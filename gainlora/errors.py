"""Errors that a user can cause and mend."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HELP = "docs/troubleshooting.md"
SECTIONS = {
    "set-up": r".*(package index|fetch again|`gainlora fetch embedded`|run from the project's folder)",
    "data": r"orders\.|.*(train|test)\.json|.*changed since this run began",
    "model": r"model\.|lora\.targets|.*(positions of this|base model .*other weights)",
    "learning": r"task .*(, step|: (lora\.rank|.*(covariance|finite)))|gate memory|lora\.rank|.*covariance",
    "stopped-damaged": r".*(gainlora repair|in progress already|the same command again)",
    "mlflow": r"tracking\.|.*MLflow",
    "prefect": r".*(P(REFECT|refect)|did not become ready)",
    "options": r"params\.yaml|method|[a-z]+\.[a-z_]+:",
}
"""Sections of HELP, and how the messages begin that they explain; the first that fits counts."""
LONGEST = 2000
"""Characters of a message; a longer one loses its middle, as the remedy is at its end."""


class GainLoRAError(Exception):
    """A wrong input, option or state: names the option or file, the value, and the remedy, on one line."""

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines())
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


@contextmanager
def within(what: str) -> Iterator[None]:
    """Let an error that names a layer name the task, too."""
    try:
        yield
    except GainLoRAError as error:
        raise GainLoRAError(f"{what}: {error}") from None


class Passing(GainLoRAError):
    """Nothing is wrong with what was asked: the same command, given again, goes on."""


class Busy(Passing):
    """Another process works there; it passes by itself."""


def not_written(path: Path, error: Exception) -> Passing:
    """What to raise when a file of a run could not be written: disk full, read-only folder."""
    reason = getattr(error, "strerror", None) or str(error)
    return Passing(
        f"{path}: not written: {reason}; free space or make it writable, and give the same command again: it goes on "
        "from what is learned."
    )


def refused_by_system(error: OSError) -> GainLoRAError:
    """What to say when the system refuses a file: disk full, no permission, a file where a folder should be."""
    misplaced = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
    remedy = "make it readable and writable or free space, and give the same command again"
    return GainLoRAError(
        f"{error.filename}: {error.strerror}; {'name another place' if error.errno in misplaced else remedy}."
    )


def told(message: str) -> str:
    """How a message is printed: with the place of the documentation that says more, where there is one."""
    section = next((name for name, begins in SECTIONS.items() if re.match(begins, message)), None)
    return f"error: {message}" + (f"\nsee {HELP}#{section}" if section else "")
