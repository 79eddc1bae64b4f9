"""Inference with a learned model: prompts as in training, batches of similar length, answers in input order."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gainlora.data.instances import checked_text
from gainlora.data.prompts import build_prompt, parse_prompt
from gainlora.errors import GainLoRAError, add_context, did_you_mean
from gainlora.export.saved import SavedModel
from gainlora.io import parse_json, read_bytes
from gainlora.model.base import load_base
from gainlora.model.modeling import GainLoRAModel
from gainlora.training.evaluate import Answer, answer_prompts

ANSWER, COEFFICIENTS = "answer", "coefficients"
"""Keys added to a line."""


class Predictor:
    """A learned model, loaded with the run's dtype and device map.

    Args:
        learned: what to load.
        base: hub id or folder of the base model, in place of the one that the adapter names.

    Raises:
        GainLoRAError: a file is missing or damaged, or the base model is missing.
    """

    def __init__(self, learned: SavedModel, base: str | None = None) -> None:
        self.learned, self.config = learned, learned.config
        dtype: torch.dtype = getattr(torch, learned.run.config["dtype"])
        model, self.tokenizer = load_base(learned.base(base), dtype, self.config.model.device_map)
        self.model = GainLoRAModel.from_pretrained(learned.folder, model)
        self.model.tf32 = self.config.model.tf32
        self._lock = threading.Lock()  # the model holds the coefficients of one batch

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches: their tasks; one name if all tasks share one."""
        tasks = self.model.config.tasks
        return tasks if self.model.branches == len(tasks) else ("all_tasks",)

    def answer(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        task: str | None = None,
    ) -> list[Answer]:
        """Answers in the prompts' order.

        Args:
            prompts: complete prompts.
            max_new_tokens: of an answer; None: the run's data.max_target_tokens.
            batch_size: None: the run's evaluate.batch_size.
            task: whose branch answers; only for method `single`.
        """
        config, model = self.config, self.model
        definitions = {entry.get("definition", "") for entry in self.learned.run.data.values()}
        parts = [parse_prompt(config.order.template, prompt, definitions) for prompt in prompts]
        with self._lock:
            model.task = model.config.tasks.index(task) if task else None
            return answer_prompts(model, self.tokenizer, parts, config, max_new_tokens, batch_size)


def make_prompt(learned: SavedModel, text: Any, task: str | None) -> str:
    """The prompt for a text: with a task's template and instruction, or the text unchanged.

    Args:
        task: one of the run's tasks; None: `text` is the complete prompt.

    Raises:
        GainLoRAError: no such task, the run does not record its instruction, or the text is no string of characters.
    """
    if not checked_text(text, "text:", "give text"):
        raise GainLoRAError("text: empty; give some.")
    if task is None:
        return text
    entries = learned.run.data
    if task not in entries:
        raise GainLoRAError(f"task: {task!r} is no task of this run{did_you_mean(task, entries)}.")
    if "definition" not in entries[task]:
        raise GainLoRAError(
            "task: this run is older than the record of instructions; give the whole prompt as the text."
        )
    return build_prompt(learned.config.order.template, entries[task]["definition"], text.strip()).text


def check_task(learned: SavedModel, task: str | None) -> None:
    """Require a task id for method `single`.

    Raises:
        GainLoRAError: no task id, or a task that is not learned yet.
    """
    if learned.adapter.integration == "single" and task not in learned.adapter.tasks:
        known = ", ".join(learned.adapter.tasks)
        raise GainLoRAError(
            f"--task: {task or 'none'}: method single answers with one task's branch; name it: {known}."
        )


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
