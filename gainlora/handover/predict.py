"""A learned model that answers: prompts as in training, batches of similar length, answers in the order asked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gainlora.data.batches import buckets, encode_prompts
from gainlora.data.tasks import fill_template
from gainlora.errors import GainLoRAError
from gainlora.handover.folder import Learned
from gainlora.learning.evaluate import answer_batch
from gainlora.model.base import load_base, pick_device
from gainlora.model.gainlora_model import GainLoRAModel
from gainlora.plain import nearest


@dataclass(frozen=True)
class Answer:
    """What the model says to one prompt."""

    text: str
    coefficients: list[float] | None
    """a_1..a_T; None where all are 1."""
    cut: bool
    """Whether the prompt was longer than the run's data.max_prompt_tokens and lost its start."""


class Predictor:
    """A learned model, loaded with the numeric type that the run had.

    Args:
        learned: what to load.
        base: hub id or folder of the base model, in place of the one that the adapter names.

    Raises:
        GainLoRAError: a file is missing or damaged, or the base model is not there.
    """

    def __init__(self, learned: Learned, base: str | None = None) -> None:
        self.learned, self.config = learned, learned.config
        dtype: torch.dtype = getattr(torch, learned.run.config["dtype"])
        model, self.tokenizer = load_base(learned.base(base), dtype)
        self.model = GainLoRAModel.from_pretrained(learned.folder, model.to(pick_device()))
        self._lock = threading.Lock()  # a model's coefficients belong to one batch at a time

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches: their tasks; one name where all tasks share one."""
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
            prompts: whole prompts, each answered as it stands.
            max_new_tokens: of an answer; None: the run's data.max_target_tokens.
            batch_size: None: the run's evaluate.batch_size.
            task: whose branch answers; for method `single` alone.
        """
        config, model = self.config, self.model
        longest = max_new_tokens or config.data.max_target_tokens
        ids, cut = encode_prompts(list(prompts), self.tokenizer, config.data.max_prompt_tokens, model.encoder_decoder)
        found: dict[int, Answer] = {}
        for batch in buckets([len(i) for i in ids], batch_size or config.evaluate.batch_size):
            rows: list[dict[str, Any]] = [{"prompt_ids": ids[i], "target_ids": []} for i in batch]
            with self._lock:
                model.task = model.config.tasks.index(task) if task else None
                answers, a = answer_batch(model, self.tokenizer, rows, longest, config.evaluate.num_beams)
            for row, i in enumerate(batch):
                found[i] = Answer(answers[row], a[row] if a else None, cut[i])
        return [found[i] for i in range(len(prompts))]


def make_prompt(learned: Learned, text: str, task: str | None) -> str:
    """The prompt for a text: of a task's template and instruction, or the text as it stands.

    Args:
        task: one of the run's tasks; None: `text` is the whole prompt.

    Raises:
        GainLoRAError: no such task, the run does not record its instruction, or there is no text.
    """
    check_text(text)
    if task is None:
        return text
    entries = learned.run.data
    if task not in entries:
        raise GainLoRAError(f"--task: {task!r} is no task of this run{nearest(task, entries)}.")
    if "definition" not in entries[task]:
        raise GainLoRAError(
            "--task: this run is older than the record of instructions; give the whole prompt as the text."
        )
    return fill_template(learned.config.order.template, entries[task]["definition"], text.strip())


def check_task(learned: Learned, task: str | None) -> None:
    """Method `single` must be told the task.

    Raises:
        GainLoRAError: it is not told, or that task is not learned yet.
    """
    if learned.adapter.integration == "single" and task not in learned.adapter.tasks:
        known = ", ".join(learned.adapter.tasks)
        raise GainLoRAError(
            f"--task: {task or 'none'}: method single answers with one task's branch; name it: {known}."
        )


def check_text(text: Any) -> None:
    """Refuse what is no text.

    Raises:
        GainLoRAError: not a string, blank, or not made of characters.
    """
    if not isinstance(text, str) or not text.strip():
        raise GainLoRAError(f"text: {'empty' if isinstance(text, str) else 'no text'}; give some.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone \ud800 is legal JSON, yet no tokenizer takes it
        raise GainLoRAError("text: holds half a surrogate pair, which is no character; correct it.") from None
