"""Instances -> validated examples; the format of the CL benchmark (O-LoRA, SAPT, GainLoRA), which is also SuperNI's:

    {"Definition": ["..."], "Instances": [{"input": "...", "output": "..." or ["...", ...]}, ...], ...}

`Definition` may be a list (its first entry counts), a string, empty or absent. Other keys are ignored, unless they look
like a misspelled `Definition`, `Instances`, `input` or `output`. All text is stripped, since only some inputs of the
benchmark end in a line break: exactly one precedes "Output: ".
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

import regex

from gainlora.errors import GainLoRAError, short_repr

REMEDY = "correct it or fetch it again"
KEYS = {"file": ("Definition", "Instances"), "instance": ("input", "output")}
"""The keys that are read of the benchmark's format."""


@dataclass(frozen=True)
class Example:
    """One instance: the input text and its correct answers, all stripped, none empty."""

    input: str
    references: tuple[str, ...]
    """At least one; training uses the first."""


class Split(NamedTuple):
    """One part of a task."""

    definition: str
    examples: list[Example]
    notes: list[str]
    """Notes on omitted or converted content, one sentence each."""


def benchmark_split(raw: dict[str, Any], path: Path, allow_blank: bool) -> Split:
    """The definition and examples of a file in the benchmark's format."""
    definition = raw.get("Definition", [])
    if isinstance(definition, list):
        definition = definition[0] if definition else ""
    definition = checked_text(definition, f"{path}: 'Definition'", "give text or a list of texts")
    instances = raw.get("Instances")
    if not isinstance(instances, list):
        found = f"is {kind(instances)}" if "Instances" in raw else f"is missing (keys: {', '.join(raw) or 'none'})"
        raise GainLoRAError(f"{path}: 'Instances' {found}; give a list of objects with 'input' and 'output'.")
    _check_keys(raw, "file", str(path))
    numbered = [(f"{path}: instance {number}", instance) for number, instance in enumerate(instances)]
    examples, notes = checked_examples(numbered, str(path), allow_blank)
    if isinstance(raw.get("Definition"), list) and len(raw["Definition"]) > 1:
        notes.insert(0, f"'Definition' has {len(raw['Definition'])} entries; the first one is used.")
    return Split(definition, examples, notes)


def checked_examples(
    instances: Sequence[tuple[str, Any]], path: str, allow_blank: bool
) -> tuple[list[Example], list[str]]:
    """Examples of instances with their places, and notes on the references that were left out."""
    examples = []
    empty = 0
    for where, instance in instances:
        if not isinstance(instance, dict):
            raise GainLoRAError(f"{where}: is {kind(instance)}; give an object with 'input' and 'output'.")
        for key in KEYS["instance"]:
            if key not in instance:
                keys = ", ".join(instance) or "none"
                raise GainLoRAError(f"{where}: key {key!r} is missing (keys: {keys}); add it.")
        _check_keys(instance, "instance", where)
        text = checked_text(instance["input"], f"{where}: 'input'", "give text")
        if not text:
            raise GainLoRAError(f"{where}: 'input' is empty; give it text or remove it.")
        answers = _answers(instance["output"], where)
        references = tuple(answer for answer in answers if answer)
        if references:
            empty += len(answers) - len(references)
            examples.append(Example(text, references))
        elif not allow_blank:
            raise GainLoRAError(f"{where}: 'output' has only blank text; give an answer or remove it.")
    if not examples:
        raise GainLoRAError(f"{path}: 'Instances' has no usable instance; give at least one with input and output.")
    notes, name = [], Path(path).name
    if blank := len(instances) - len(examples):
        notes.append(f"{name}: {blank} of {len(instances)} instances have only empty references; left out.")
    if empty:
        notes.append(f"{name}: {empty} empty references beside others are left out.")
    return examples, notes


def _answers(output: Any, where: str) -> list[str]:
    """The references, stripped; one of a list may be empty."""
    if isinstance(output, list):
        if not output:
            raise GainLoRAError(f"{where}: 'output' is an empty list; give at least one answer.")
        return [checked_text(o, f"{where}: 'output' entry {i}", "give text") for i, o in enumerate(output)]
    text = checked_text(output, f"{where}: 'output'", "give text or a list of texts")
    if not text:
        raise GainLoRAError(f"{where}: 'output' is empty; give an answer or remove it.")
    return [text]


def _check_keys(given: dict[str, Any], level: str, where: str) -> None:
    """Refuse a key that nearly equals a known one: its content would be ignored."""
    for key in given:
        for known in KEYS[level]:
            if key not in KEYS[level] and _nearly(key, known):
                raise GainLoRAError(
                    f"{where}: key {short_repr(key)} is nearly {known!r} and would be ignored; rename it, or remove it."
                )


@cache
def _nearly(key: str, known: str) -> bool:
    """Whether a key differs from a known one in case, plural, separators, or by one typing error (of a long one, two).
    One with a digit is deliberate."""
    key, known = unicodedata.normalize("NFKC", key).strip().lower(), known.lower()
    letters = "".join(filter(str.isalpha, key))
    if any(map(str.isdigit, key)):
        return False
    key, letters, known = (text.rstrip("s") for text in (key, letters, known))
    swapped = {f"{known[:i]}{known[i + 1]}{known[i]}{known[i + 2 :]}" for i in range(len(known) - 1)}
    errors = 1 if len(known) < 8 else 2  # inserted, missing or other letters
    return letters == known or key in swapped or regex.fullmatch(f"(?:{known}){{e<={errors}}}", key) is not None


def checked_text(value: Any, where: str, remedy: str) -> str:
    """A text, stripped.

    Raises:
        GainLoRAError: it is none, or not one that can be written as UTF-8.
    """
    if not isinstance(value, str):
        raise GainLoRAError(f"{where} is {kind(value)}; {remedy}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a lone \\ud800 is legal JSON, but no tokenizer accepts it
        raise GainLoRAError(f"{where} holds half a surrogate pair, which is no character; correct the text.") from None
    return value.strip()


def kind(value: Any) -> str:
    """What a value of JSON is, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    what = "the number" if isinstance(value, Number) else f"the {type(value).__name__}"
    return names.get(type(value)) or f"{what} {short_repr(value)}"
