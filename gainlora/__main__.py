"""The command line `gainlora`: its commands are in gainlora/cli, a file per group.

Heavy imports wait until a command needs them, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

import argcomplete

from gainlora.cli import grow, handover, reports, runs, sweep
from gainlora.cli.parser import Commands
from gainlora.errors import GainLoRAError, refused_by_system, told


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 refused or failed, 2 wrong usage, 130/143 interrupted."""
    commands = parser()
    argcomplete.autocomplete(commands)  # does something only when the Tab key asks
    options = commands.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):  # by default they end Python at once, and leave what it started
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        return int(options.command(options))
    except GainLoRAError as error:
        print(told(str(error)), file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(told(str(refused_by_system(error))), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line's."""
    top = argparse.ArgumentParser(
        prog="gainlora",
        usage="gainlora COMMAND ...",
        description="Continual learning of language models with gated low-rank adaptation (GainLoRA).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = Commands(top)
    commands.add_group("learn", runs.add, sweep.add)
    commands.add_group("keep learning", grow.add)
    commands.add_group("look", reports.add)
    commands.add_group("use and hand over", handover.add)
    return top


if __name__ == "__main__":
    sys.exit(main())
