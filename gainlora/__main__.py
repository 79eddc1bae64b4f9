"""The command line `gainlora`: gainlora/cli."""

import sys
from collections.abc import Sequence

from gainlora.cli import app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 refused or failed, 2 wrong usage, 130 or 143 interrupted."""
    try:
        app(arguments, prog_name="gainlora")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
