"""Evaluation of a task with mixed lengths: batches of similar length against batches in the file's order, float32.

Prompt lengths are log-normal with median 48, as of reviews and news: a quarter below 28, a tenth above 134 tokens.
"""

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import datasets
import torch

from benchmarks.measure import Row, interleave, time_row
from benchmarks.models import SMALL, base, learned
from gainlora.config import RunConfig
from gainlora.sections import DataConfig, EvaluateConfig
from gainlora.training.evaluate import evaluate_task

BATCH, NEW_TOKENS, BRANCHES = 16, 4, 4
LONGEST = 512


class Ids:
    """A tokenizer that shows ids as text."""

    pad_token_id = 0

    def batch_decode(self, output: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in output.tolist()]


def test_rows(count: int, vocabulary: int) -> Any:
    """Random prompts of mixed lengths, as the tokenizer leaves them."""
    chooser = random.Random(0)
    lengths = [min(LONGEST, max(8, round(chooser.lognormvariate(3.87, 0.8)))) for _ in range(count)]
    rows = [
        {"prompt_ids": chooser.choices(range(3, vocabulary), k=n), "target_ids": [1], "references": ["1"]}
        for n in lengths
    ]
    return datasets.Dataset.from_list(rows)


def unsorted(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches in the file's order."""
    order = range(len(lengths))
    return [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]


def row(name: str, count: int, rounds: int = 2) -> Row:
    """`count` examples, the same model; the answers must be equal."""
    model = learned(base(name, torch.float32), BRANCHES, learning=False)
    rows = test_rows(count, model.base.config.vocab_size)
    config = cast(
        RunConfig,
        SimpleNamespace(evaluate=EvaluateConfig(batch_size=BATCH), data=DataConfig(max_target_tokens=NEW_TOKENS)),
    )
    answers: dict[str, list[str]] = {}

    def side(key: str) -> Callable[[], None]:
        def once() -> None:
            found = evaluate_task(model, Ids(), rows, "exact_match", config, key)
            answers[key] = [prediction.prediction for prediction in found]

        return once

    def in_order() -> None:
        with patch("gainlora.training.evaluate.buckets", unsorted):
            side("unsorted")()

    times = interleave({"unsorted": in_order, "sorted": side("sorted")}, rounds)
    assert answers["sorted"] == answers["unsorted"]
    what = f"evaluation of mixed lengths, the file's order / by length, {name}, float32"
    return time_row(what, times, "unsorted", "sorted", ">= 1.5")


def run() -> list[Row]:
    """A row per model."""
    return [row(name, count) for name, count in zip(SMALL, (128, 96), strict=True)]
