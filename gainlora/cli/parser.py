"""How commands are declared: `gainlora --help` lists them in groups, and the Tab key completes what they take."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  gainlora fetch embedded                           the data and model that come with the project
  gainlora run embedded                             learn its four tasks; the same again goes on or is done
  gainlora run my_order.yaml --method olora         your own tasks, another method
  gainlora run embedded --set train.epochs=2        any option of params.yaml
  gainlora compare embedded --methods seqlora,gainlora-inflora
  gainlora report                                   one page over all runs

'gainlora COMMAND --help' shows a command's options; params.yaml holds those of a run, with their meaning.
docs/index.md starts the documentation; 'make docs' builds it as a site."""


class Parser(argparse.ArgumentParser):
    """A command's: an argument of a known name is completed, whatever the command."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        if action.dest in COMPLETERS:
            action.completer = COMPLETERS[action.dest]  # type: ignore[attr-defined]
        return action


class Commands:
    """What a group's `add` gives its commands to: their parsers, and their lines in the help."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser
        self.parsers = parser.add_subparsers(
            required=True, metavar="COMMAND", help=argparse.SUPPRESS, parser_class=Parser, prog=parser.prog
        )
        self.parser.epilog = EXAMPLES

    def add_group(self, title: str, *groups: Callable[[Commands], None]) -> None:
        """Commands under a title."""
        self.parser.description = f"{self.parser.description}\n\n{title}:"
        for add in groups:
            add(self)

    def add_parser(self, name: str, help: str, **settings: Any) -> argparse.ArgumentParser:
        """One command; `help` is its line in the list and, where there is no `description`, the start of its own."""
        self.parser.description = f"{self.parser.description}\n  {name:<12}{help}"
        settings.setdefault("description", f"{help[0].upper()}{help[1:]}.")
        return self.parsers.add_parser(name, help=help, **settings)


def _orders(**_: Any) -> Iterable[str]:
    from gainlora.params import order_names

    return [*order_names(), *(path.name for path in Path().glob("*.yaml") if path.name not in PROJECT_FILES)]


def _models(**_: Any) -> Iterable[str]:
    from gainlora.params import read_params

    return [*(read_params().get("models") or {}), *(f"{path.parent}" for path in Path().glob("models/*/config.json"))]


def _methods(**_: Any) -> Iterable[str]:
    from gainlora import rules

    return rules.methods()


def _listed_methods(prefix: str, **_: Any) -> Iterable[str]:
    """The last name of a list a,b,c."""
    begun = prefix[: prefix.rfind(",") + 1]
    return [begun + name for name in _methods()]


def _options(**_: Any) -> Iterable[str]:
    from gainlora.config import Config

    sections = [field for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default_factory)]
    return [f"{s.name}.{field.name}=" for s in sections for field in dataclasses.fields(s.default_factory)]  # type: ignore[arg-type]


def _runs(**_: Any) -> Iterable[str]:
    return [f"{path.parent}" for path in Path().glob("runs/*/config.json")]


PROJECT_FILES = ("params.yaml", "dvc.yaml", "prefect.yaml", "mkdocs.yml")
COMPLETERS: dict[str, Callable[..., Iterable[str]]] = {
    "order": _orders,
    "model": _models,
    "method": _methods,
    "methods": _listed_methods,
    "options": _options,
    "run": _runs,
}
"""By the argument's name; others are completed as files are."""
