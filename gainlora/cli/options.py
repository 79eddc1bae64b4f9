"""Shared arguments and options with their completion."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Option
from typer.core import TyperCommand

from gainlora.errors import GainLoRAError

PROJECT_FILES = ("params.yaml", "dvc.yaml", "prefect.yaml")


class Once(TyperCommand):
    """A command that refuses duplicate options: click silently keeps the last value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in given:
                if not (parameter.multiple or parameter.nargs == -1) and given.count(parameter) > 1:
                    raise BadParameter("given twice; give it once.", ctx, param_hint=parameter.opts[0])
        return super().parse_args(ctx, args)


# ---- completion: nothing raises, nothing heavy is imported --------------------------------------------------------


def _starting(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        try:
            return [name for name in names() if name.startswith(incomplete)]
        except (GainLoRAError, OSError):
            return []

    return complete


def _orders() -> list[str]:
    from gainlora.config import order_names

    return [*order_names(), *(path.name for path in Path().glob("*.yaml") if path.name not in PROJECT_FILES)]


def _models() -> list[str]:
    from gainlora.config import read_params

    return [*(read_params().get("models") or {}), *(str(path.parent) for path in Path().glob("models/*/config.json"))]


def _methods() -> list[str]:
    from gainlora import rules

    return list(rules.methods())


def _options() -> list[str]:
    from gainlora.config import SECTIONS

    return [f"{name}.{option}=" for name, kind in SECTIONS.items() if name != "order" for option in kind.model_fields]


def _runs() -> list[str]:
    return ["latest", *(path.parent.name for path in Path().glob("runs/*/config.json"))]


def _listed_methods(incomplete: str) -> list[str]:
    """Complete the last name of a list a,b,c."""
    before = incomplete[: incomplete.rfind(",") + 1]
    return [before + name for name in _methods() if (before + name).startswith(incomplete)]


# ---- shared arguments and options ---------------------------------------------------------------------------------


def _setting(text: str) -> tuple[str, Any]:
    """ "train.epochs=2" -> ("train.epochs", 2)."""
    from gainlora.io import parse_yaml

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise BadParameter(f"{text!r} is not OPTION=VALUE")
    try:
        return name, parse_yaml(value, name, "quote it")
    except GainLoRAError as error:
        raise BadParameter(str(error)) from None


def _argument(name: str, completion: Callable[[], Iterable[str]], help: str) -> Any:
    return Argument(metavar=name, autocompletion=_starting(completion), help=help)


Order = Annotated[
    str, _argument("ORDER", _orders, "An order of params.yaml (embedded, order1, ...), or a YAML file with one.")
]
RunName = Annotated[
    str, _argument("RUN", _runs, "A run: its folder, its name or the unique beginning of it, a lineage, or `latest`.")
]
Learned = Annotated[
    str,
    _argument(
        "RUN",
        _runs,
        "A run (folder, name, beginning of a name, `latest`), a task's folder, adapters/ORDER, or a hub id.",
    ),
]
Method = Annotated[
    str | None, Option(help="A branch rule, or gainlora- and a rule: gated.", autocompletion=_starting(_methods))
]
Methods = Annotated[str | None, Option(metavar="A,B,...", help="Names of methods.", autocompletion=_listed_methods)]
Seed = Annotated[int | None, Option(help="In place of params.yaml's.")]
Model = Annotated[
    str | None,
    Option(
        autocompletion=_starting(_models),
        help="A model of params.yaml, a hub id, or a folder; brings its hyperparameters.",
    ),
]
SkipIncomplete = Annotated[bool, Option("--skip-incomplete", help="Leave out tasks whose files are missing.")]


def set_option(help: str) -> Any:
    """--set OPTION=VALUE, repeatable."""
    completion = _starting(_options)
    return Option("--set", metavar="OPTION=VALUE", parser=_setting, autocompletion=completion, help=help)


Set = Annotated[
    list[Any] | None, set_option("Any option, e.g. --set train.learning_rate=5e-4 --set data.train_limit=null.")
]
Input = Annotated[
    str | None, Option("--input", metavar="COLUMN", help="The task's column of inputs, if it is not recognized.")
]
Output = Annotated[
    str | None, Option("--output", metavar="COLUMN", help="The task's column of answers, if it is not recognized.")
]
Instruction = Annotated[
    str | None, Option(metavar="TEXT", help="The task's instruction, in place of its files' definition.")
]
Results = Annotated[Path | None, Option(metavar="DIR", help="Write result files of finished runs here.")]
Label = Annotated[str, Option(help="Distinguishes result files of runs with other options, e.g. no-init.")]
Base = Annotated[str | None, Option(metavar="MODEL", help="The base model's hub id or folder, if it moved.")]


def overrides(settings: list[Any] | None, **named: Any) -> dict[str, Any]:
    """Dotted option -> value, from --set and from options with their own names (__ for dots).

    Raises:
        GainLoRAError: an option is given twice.
    """
    given = [*(settings or []), *((n.replace("__", "."), value) for n, value in named.items() if value is not None)]
    made: dict[str, Any] = {}
    for name, value in given:
        if name in made:
            raise GainLoRAError(f"{name}: given twice on the command line; give it once.")
        made[name] = value
    return made


def resolved(name: str) -> Path:
    """The run folder for an argument RUN.

    Raises:
        GainLoRAError: no such run, or several.
    """
    from gainlora.runs.lineage import is_name, resolve

    folder = resolve(name)
    itself = folder.parent / name
    if is_name(name) and itself != folder and (itself / "config.json").is_file():
        print(f"note: {name} goes on as {folder}, which is used; {itself} is that run itself.", file=sys.stderr)
    return folder
