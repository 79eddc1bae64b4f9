"""Plain values (YAML, JSON) -> dataclasses, with errors that name the option by its dotted path."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from gainlora.errors import GainLoRAError
from gainlora.reading import shown


def set_option(values: dict[str, Any], option: str, value: Any, source: str) -> None:
    """values["a"]["b"] = value for option "a.b"."""
    *sections, name = option.split(".")
    if not all((*sections, name)):
        raise GainLoRAError(f"{source}: {shown(option)} is no option; write <section>.<name>.")
    here = values
    for section in sections:
        inner = here.get(section) or {}
        if not isinstance(inner, dict):
            raise GainLoRAError(f"{source}: {option!r} is no option; {section!r} holds a value, not a section.")
        here[section] = here = dict(inner)
    if isinstance(here.get(name), dict):
        raise GainLoRAError(f"{source}: {option!r} is a section; set its options one by one ('{option}.<name>').")
    here[name] = value


def build(cls: type, values: Any, path: str) -> Any:
    """Make the dataclass from plain values, checking names and types."""
    if not isinstance(values, Mapping):
        raise GainLoRAError(f"{path.rstrip('.')}: got {shown(values)}, expected a section with options.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise GainLoRAError(f"{path}{key}: unknown option{nearest(str(key), fields)}.")
    made = {}
    for name, spec in fields.items():
        if name in values:
            made[name] = _value(hints[name], values[name], path + name)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise GainLoRAError(f"{path}{name}: missing; it has no default.")
    return cls(**made)


def _value(hint: Any, value: Any, option: str) -> Any:
    """`value` as the annotated type, or an error that names the option."""
    if type(value) is int and value.bit_length() > 63:
        raise GainLoRAError(f"{option}: {shown(value)} is too large; give at most 63 bits.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, option + ".")
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(a for a in args if a is not types.NoneType), value, option)
    if origin is Literal:
        if value in args:
            return value
        raise GainLoRAError(f"{option}: {shown(value)} is not one of {', '.join(map(str, args))}.")
    if origin is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise GainLoRAError(f"{option}: got {shown(value)}, expected a list of names.")
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 (no dot) as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is hint:
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    raise GainLoRAError(f"{option}: got {shown(value)}, expected {expected}.")


def nearest(name: str, known: Mapping[str, Any]) -> str:
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}" if close else f"; known: {', '.join(names)}"
