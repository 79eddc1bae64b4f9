"""Errors that a user can cause and mend."""

from pathlib import Path

LONGEST = 2000
"""Characters of a message; a longer one loses its middle, as the remedy is at its end."""


class GainLoRAError(Exception):
    """A wrong input, option or state: names the option or file, the value, and the remedy, on one line."""

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines())
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def not_written(path: Path, error: Exception) -> GainLoRAError:
    """What to raise when a file of a run could not be written: disk full, read-only folder."""
    reason = getattr(error, "strerror", None) or str(error)
    return GainLoRAError(
        f"{path}: not written: {reason}; free space or make it writable, and give the same command again: it goes on "
        "from what is learned."
    )
