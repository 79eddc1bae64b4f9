"""The command line `gainlora`: one file per group of commands; commands import heavy packages lazily.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 or 143 interrupted.
"""

import signal
import sys
from typing import Annotated, Any, NoReturn

from typer import Context, Exit, Option, Typer
from typer.core import TyperGroup

from gainlora import __version__
from gainlora.cli import learning, results, using
from gainlora.cli.check import check
from gainlora.cli.options import Once
from gainlora.errors import GainLoRAError, format_error, refused_by_system
from gainlora.interrupts import stoppable, stopped

EXTRAS = ("mlflow", "prefect", "dvc", "matplotlib", "pandas", "jinja2")
"""Packages of `gainlora[mlops]`, which are optional."""


class Commands(TyperGroup):
    """All commands: listed by group; prints errors on one line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            group = getattr(command, "rich_help_panel", "")
            groups.setdefault(group, []).append((name, command.get_short_help_str(90)))
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        set_up_libraries()
        try:
            with stoppable():
                return super().invoke(ctx)
        except (GainLoRAError, OSError, ModuleNotFoundError) as error:
            if stopped:  # in the middle of a lazy import, which makes it an error of its own
                _interrupted(ctx, stopped[0])
            if isinstance(error, OSError) and error.filename is not None:
                error = refused_by_system(error)
            if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
                error = GainLoRAError(f"{ctx.invoked_subcommand} needs {package}: pip install 'gainlora[mlops]'")
            if not isinstance(error, GainLoRAError):
                raise
            print(format_error(error), file=sys.stderr)
            raise Exit(1) from None
        except KeyboardInterrupt as error:
            _interrupted(ctx, error.args[0] if error.args else signal.SIGINT)


def _interrupted(ctx: Any, number: int) -> NoReturn:
    if ctx.invoked_subcommand in ("run", "compare", "sweep", "learn", "rerun"):
        print("Interrupted; what is learned is kept, and the same command continues.", file=sys.stderr)
    raise Exit(128 + number) from None


app = Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="'gainlora COMMAND --help' shows a command's options.",
)
for group, commands in {
    "Learn": (learning.fetch, check, learning.run, learning.compare, learning.sweep),
    "Work on a run": (learning.learn, learning.forget, learning.repair, learning.rerun),
    "Look": (results.runs, results.report, results.results),
    "Model registry (MLflow)": (results.promote, results.rollback, results.register),
    "Use and share": (using.predict, using.export, using.merge, using.push),
}.items():
    for command in commands:  # its docstring is the help text
        app.command(cls=Once, rich_help_panel=group)(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gainlora {__version__}")
        raise Exit


@app.callback(invoke_without_command=True)
def main(
    ctx: Context,
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Continual learning of language models with gated low-rank adaptation (GainLoRA)."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def set_up_libraries() -> None:
    """Before they are imported: silence their log lines and progress bars, except errors."""
    import logging
    import os

    for variable, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "TOKENIZERS_PARALLELISM": "false",
        # OpenMP's threads wait for each other in busy loops: beside another process, a step of 0.5 s took 20 s
        "OMP_WAIT_POLICY": "PASSIVE",
    }.items():
        os.environ.setdefault(variable, value)
    for name in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "alembic", "mlflow", "accelerate", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
