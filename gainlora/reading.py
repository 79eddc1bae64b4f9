"""JSON and YAML files -> plain values: whatever is wrong with a file is one error with its name and the remedy.

A key that is given twice is refused: both formats' readers would keep the last value and lose the first in silence.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from gainlora.errors import GainLoRAError

MERGED = 10_000
"""Most keys that YAML's `<<` may gather: nested ones grow exponentially."""


def read_bytes(path: Path, absent: str, damaged: str) -> bytes:
    """The file's content, never empty.

    Args:
        absent: remedy where there is no such file. damaged: remedy where it cannot be used.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise GainLoRAError(f"{path}: not found; {absent}.") from None
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
        reason = getattr(error, "strerror", None) or error
        raise GainLoRAError(f"{path}: cannot be read ({reason}); make it a readable file.") from None
    if not content.strip():
        raise GainLoRAError(f"{path}: empty; {damaged}.")
    return content


def read_json(path: Path, absent: str, damaged: str) -> Any:
    """The content of a JSON file."""
    return parse_json(read_bytes(path, absent, damaged), path, damaged)


def parse_json(content: bytes, source: Path, damaged: str) -> Any:
    """The value that JSON in UTF-8, with or without a byte order mark, stands for."""
    try:
        return json.loads(_decoded(content, source, damaged), object_pairs_hook=_object)
    except RecursionError:
        raise GainLoRAError(f"{source}: nested too deeply; {damaged}.") from None
    except ValueError as error:  # numbers of thousands of digits, too
        reason = str(error).partition(";")[0]
        raise GainLoRAError(f"{source}: not JSON: {reason}; {damaged}.") from None


def read_yaml(path: Path, absent: str, damaged: str) -> Any:
    """The content of a YAML file."""
    return parse_yaml(_decoded(read_bytes(path, absent, damaged), path, damaged), path, damaged)


def parse_yaml(text: str, source: object, damaged: str) -> Any:
    """The value that YAML stands for: safe tags, every key once."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise GainLoRAError(f"{source}: nested too deeply; {damaged}.") from None
    except Exception as error:  # of any kind: PyYAML checks no text that a tag claims to be a number or a date
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GainLoRAError(f"{source}: not valid YAML: {reason}; {damaged}.") from None


def shown(value: Any) -> str:
    """A value for a message: its start, however large, deep or self-containing it is."""
    return _short.repr(value)


def _decoded(content: bytes, source: Path, damaged: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GainLoRAError(f"{source}: not UTF-8 (byte {error.start}); save it again as UTF-8.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"key {shown(_twice(key for key, _ in pairs))} is given twice")
    return made


def _twice(keys: Iterable[Any]) -> Any:
    """The first key that was there before; None where there is none."""
    seen = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = _twice((key.tag, key.value) for key in scalars)
        if twice:
            raise yaml.MarkedYAMLError(f"key {shown(twice[1])} is given twice", problem_mark=node.start_mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MERGED:
            raise yaml.MarkedYAMLError(f"'<<' gathers more than {MERGED} keys", problem_mark=node.start_mark)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxstring, self.maxother = 3, 6, 6, 6, 100, 100

    def repr_int(self, value: int, level: int) -> str:
        return f"<{value.bit_length()} bits>" if value.bit_length() > 256 else repr(value)


_short = _Short()
