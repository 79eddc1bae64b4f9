"""The command line `gainlora`: its commands are in gainlora/cli, a file per group.

Heavy imports wait until a command needs them, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from gainlora.cli import handover, reports, runs, sweep
from gainlora.errors import GainLoRAError

NO_ROOM = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 refused or failed, 2 wrong usage, 130/143 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except GainLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # full disk, read-only folder, a file where a folder should be
        remedy = "make it writable or free space" if error.errno in NO_ROOM else "name another place"
        print(f"error: {error.filename}: {error.strerror or error}; {remedy}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gainlora",
        description="Continual learning of language models with gated low-rank adaptation (GainLoRA).",
        epilog="Options of a run are in params.yaml; --set lays a value over one of them.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (runs, sweep, reports, handover):
        group.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
