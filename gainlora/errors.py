"""Errors that a user can cause and mend."""

from pathlib import Path


class GainLoRAError(Exception):
    """A wrong input, option or state: names the option or file, the value, and the remedy."""


def not_written(path: Path, error: Exception) -> GainLoRAError:
    """What to raise when a file of a run could not be written: disk full, read-only folder."""
    reason = getattr(error, "strerror", None) or str(error)
    return GainLoRAError(
        f"{path}: not written: {reason}; free space or make it writable, and give the same command again: it goes on "
        "from what is learned."
    )
