"""Batched generation on a task's test examples, and what the gates said about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gainlora import distributed
from gainlora.config import Config
from gainlora.data.batches import buckets, collate
from gainlora.learning.metrics import score
from gainlora.model.gainlora_model import GainLoRAModel
from gainlora.progress import track


@torch.inference_mode()
def answer_batch(
    model: GainLoRAModel, tokenizer: Any, rows: Sequence[dict[str, Any]], max_new_tokens: int, num_beams: int
) -> tuple[list[str], list[list[float]] | None]:
    """Generated answers, stripped, and the coefficients a (B, T) of their prompts; None where all are 1.

    Greedy (or beam) search; `load_base` removed the base model's own generation settings.

    Args:
        rows: B examples with prompt_ids.
    """
    inputs = collate(rows, tokenizer.pad_token_id, model.encoder_decoder, targets=False)
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    a = model.coefficients(**inputs)  # (B, T) or None
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=num_beams)
    if not model.encoder_decoder:
        output = output[:, inputs["input_ids"].shape[1] :]  # (B, new tokens)
    answers = [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    return answers, None if a is None else [[round(v, 5) for v in row] for row in a.tolist()]


@dataclass(frozen=True)
class Prediction:
    """One test example's answer."""

    prediction: str
    references: list[str]
    score: float
    """0 to 100."""
    coefficients: list[float] | None
    """a_1..a_t of the prompt; None where all are 1."""


def evaluate_task(
    model: GainLoRAModel, tokenizer: Any, rows: Any, metric: str, config: Config, name: str
) -> list[Prediction]:
    """Generate and score an answer for every row, in the rows' order.

    Batches hold prompts of similar length; in float32 that changes no answer. Every task's answers may be as long as
    `data.max_target_tokens`: a limit by the task's labels would tell the model which task it is, and cut what runs on
    after a right label.

    Args:
        rows: tokenized test examples.
    """
    model.eval()
    found: dict[int, Prediction] = {}
    lengths = [len(ids) for ids in rows["prompt_ids"]]
    for batch, counts in track(distributed.share(buckets(lengths, config.evaluate.batch_size)), f"evaluate {name}"):
        examples = [rows[i] for i in batch]
        answers, a = answer_batch(model, tokenizer, examples, config.data.max_target_tokens, config.evaluate.num_beams)
        if not counts:
            continue
        for row, (i, example, answer) in enumerate(zip(batch, examples, answers, strict=True)):
            references = example["references"] if config.data.references == "all" else example["references"][:1]
            found[i] = Prediction(answer, references, score(metric, answer, references), a[row] if a else None)
    found = dict(distributed.gather(list(found.items())))
    return [found[i] for i in range(len(lengths))]


def coefficient_statistics(predictions: list[Prediction]) -> dict[str, list[float]]:
    """Mean and standard deviation of a_1..a_t over a task's examples."""
    a = torch.tensor([p.coefficients for p in predictions])  # (examples, t)
    return {"mean": _rounded(a.mean(0)), "std": _rounded(a.std(0, correction=0))}


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(v, 5) for v in values.tolist()]
