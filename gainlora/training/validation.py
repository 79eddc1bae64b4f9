"""Validation on held-out examples: measures a task's training and selects the final state; never alters the training.

at the end of each epoch and at least 4 times per task: loss and score -> validation.jsonl
keep: best   highest score, ties by lower loss, then the earlier one; its parameters are restored at the end
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gainlora import distributed
from gainlora.config import RunConfig
from gainlora.data.collate import buckets, collate, lengths
from gainlora.model.modeling import GainLoRAModel
from gainlora.training.checkpoint import Records, random_states, set_random_states
from gainlora.training.evaluate import evaluate_task, mean
from gainlora.training.steps import PASS_BATCH
from gainlora.training.train import target_loss

AT_LEAST = 4
"""Least number of evaluations per task."""


class Validation:
    """Validation while one step's tasks train.

    Args:
        rows: each task's tokenized validation examples; empty: no validation.
        keep_punctuation: per task, argument of `gainlora.training.metrics.score`.
        epochs: of the step.
        steps: optimizer steps of an epoch.
    """

    def __init__(
        self, rows: Mapping[str, Any], keep_punctuation: Mapping[str, bool], model: GainLoRAModel, tokenizer: Any,
        config: RunConfig, epochs: int, steps: int,
    ) -> None:  # fmt: skip
        self.rows, self.keep_punctuation = rows, keep_punctuation
        self.model, self.tokenizer, self.config = model, tokenizer, config
        per_epoch = math.ceil(AT_LEAST / epochs)
        within = [math.ceil(steps * k / per_epoch) for k in range(1, per_epoch + 1)]
        self.points = {epoch * steps + point for epoch in range(epochs) for point in within}
        self.records: Records = []
        self.best: list[Tensor] = []

    def run(self, step: int, parameters: Sequence[Tensor]) -> bool:
        """Evaluate the state after `step` steps, if due and not done yet; returns whether it was evaluated."""
        if not self.rows or step not in self.points or (self.records and self.records[-1]["step"] >= step):
            return False
        started, random = time.perf_counter(), random_states()
        try:
            loss, score = self._loss(), self._score()
        finally:
            set_random_states(random)
            self.model.train()
        kept = self.config.train.keep == "best" and all((score, -loss) > earlier for earlier in self._order)
        if kept:
            self.best = [p.detach().clone() for p in parameters]
        seconds = round(time.perf_counter() - started, 4)
        best = {"best": float(kept)} if self.config.train.keep == "best" else {}
        self.records.append({"step": step, "loss": loss, "score": score, **best, "seconds": seconds})
        return True

    @property
    def stalled(self) -> bool:
        """Whether `train.patience` is exhausted: so many validations followed the best one."""
        order, patience = self._order, self.config.train.patience
        return patience is not None and bool(order) and len(order) - 1 - order.index(max(order)) >= patience

    def restore(self, records: Records, best: Sequence[Tensor]) -> None:
        """Resume from a checkpoint's state."""
        self.records, self.best = records, list(best)

    @torch.no_grad()
    def keep_best(self, parameters: Sequence[Tensor]) -> None:
        """Restore the parameters of the best state; does nothing with `train.keep: last`."""
        for parameter, best in zip(parameters if self.best else (), self.best, strict=True):
            parameter.copy_(best)

    def chosen(self) -> dict[str, float]:
        """Record of the final state; empty without validation."""
        best = [record for record in self.records if record.get("best")]
        return (best or self.records or [{}])[-1]

    @property
    def _order(self) -> list[tuple[float, float]]:
        """What tells which state is better, of each validation."""
        return [(record["score"], -record["loss"]) for record in self.records]

    @torch.no_grad()
    def _loss(self) -> float:
        """Mean cross-entropy over all target tokens."""
        self.model.eval()
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.model.device), 0
        for rows in self.rows.values():
            for batch, counts in distributed.split(buckets(lengths(rows), PASS_BATCH)):
                examples = [rows[i] for i in batch]
                tensors = collate(examples, self.tokenizer.pad_token_id, self.model.encoder_decoder, targets=True)
                part = target_loss(self.model, tensors, self.model.encoder_decoder)
                if counts:
                    total += part.double()
                    tokens += sum(len(e["target_ids"]) for e in examples)
        sums = distributed.all_gather([(total.item(), tokens)])
        return sum(part for part, _ in sums) / sum(count for _, count in sums)

    def _score(self) -> float:
        """Mean of the tasks' scores, 0 to 100."""
        scores, metric = [], self.config.order.metric
        for name, rows in self.rows.items():
            what, keep = f"{name}, held out", self.keep_punctuation[name]
            answers = evaluate_task(self.model, self.tokenizer, rows, metric, self.config, what, keep)
            scores.append(mean(answers))
        return sum(scores) / len(scores)
