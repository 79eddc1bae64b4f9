"""Reads prompts from a JSON-lines file; checks all lines before a model is loaded."""

from pathlib import Path
from typing import Any

from gainlora.errors import GainLoRAError, add_context
from gainlora.export.saved import SavedModel
from gainlora.inference import make_prompt
from gainlora.io import parse_json, read_bytes

ANSWER, COEFFICIENTS = "answer", "coefficients"
"""Keys added to a line."""


def read_questions(path: Path, learned: SavedModel, task: str | None) -> list[tuple[dict[str, Any], str]]:
    """The lines of a file, each with its prompt: objects with "text" and perhaps "task"; other keys are kept. Blank
    lines are skipped.

    Args:
        task: for lines without their own.

    Raises:
        GainLoRAError: a line is wrong; names its number, from 1.
    """
    expected = 'one object with "text" per line'
    content = read_bytes(path, f"give a JSON-lines file, {expected}", f"write {expected}")
    questions = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        given = parse_json(line, where, f"write {expected}")
        if not isinstance(given, dict) or "text" not in given:
            raise GainLoRAError(f'{where}: no object with "text"; write {expected}.')
        if taken := {ANSWER, COEFFICIENTS} & given.keys():
            raise GainLoRAError(f"{where}: has a key {min(taken)!r}, which is written here; rename it.")
        own = given.get("task") or task
        with add_context(where):
            if own is not None and not isinstance(own, str):
                raise GainLoRAError("task: no text; name a task of the run.")
            if learned.adapter.integration == "single" and own != task:
                raise GainLoRAError(f"task: {own!r}: method single answers a file with the one branch of --task.")
            questions.append((given, make_prompt(learned, given["text"], own)))
    return questions
