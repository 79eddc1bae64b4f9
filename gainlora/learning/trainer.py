"""Learning one task: the loop over its examples."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gainlora import distributed
from gainlora.config import Config
from gainlora.data.batches import collate, epoch_batches
from gainlora.errors import GainLoRAError
from gainlora.learning.checkpoint import Checkpoints, Records, latest, random_states, restore_training
from gainlora.model.gainlora_model import GainLoRAModel
from gainlora.progress import track

REMEDY = "lower train.learning_rate, or set model.dtype to float32"


def derive_seed(seed: int, task: int, purpose: str) -> int:
    """A seed from (run seed, 1-based task index, purpose) alone, so that a resumed task repeats exactly."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{purpose}".encode()).digest()[:7], "big")


def target_loss(model: Any, batch: dict[str, Tensor], encoder_decoder: bool) -> Tensor:
    """Sum of the cross-entropy over target tokens, EOS included (float32 scalar).

    Decoder-only batches are padded on the left, so targets end each row: only the logits that predict
    them are computed.
    """
    labels = batch["labels"]  # (B, S) or (B, S_target)
    extra = {}
    if not encoder_decoder:
        first = int((labels != -100).int().argmax(dim=1).min())  # leftmost target position of the batch
        extra["logits_to_keep"] = labels.shape[1] - first + 1
        labels = labels[:, first:]
    logits = model(**batch, use_cache=False, **extra).logits  # (B, S - first + 1, V) or (B, S_target, V)
    if not encoder_decoder:
        logits = logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def train_task(
    model: GainLoRAModel, rows: Any, config: Config, task: int, name: str, pad_id: int, checkpoints: Checkpoints
) -> Records:
    """Train the started branch (and gate) on one task, from its latest checkpoint if there is one.

    The loss is the mean over all target tokens of a batch, however it is split into micro-batches and among processes,
    plus the rule's penalty.

    Args:
        rows: tokenized training examples (`gainlora.data.batches.tokenize`).
        task: 1-based index.
        checkpoints: where to save; the one that the branch was restored from is found there.
    Returns:
        One record per optimizer step: step, loss (without the penalty), penalty (weighted; of rules that have one),
        learning_rate, examples, seconds.

    Raises:
        GainLoRAError: the loss, or what was learned, is not finite.
    """
    from transformers import get_scheduler

    settings = config.train
    batches = [
        batch
        for epoch in range(settings.epochs)
        for batch in epoch_batches(len(rows), settings.batch_size, config.seed, task, epoch)
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    scheduler = get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=len(batches))
    if settings.gradient_checkpointing:
        # the reentrant kind loses the coefficients' gradient
        model.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    weight = config.rule.penalty_weight if settings.penalty_weight is None else settings.penalty_weight
    gate = [] if model.gate is None else list(model.gate.state_dict().values())
    # equal already, but for what another kind of machine rounds otherwise
    distributed.copy_first([*(t for layer in model.layers.values() for t in layer.learning), *gate])
    penalties = [p for layer in model.layers.values() if (p := config.rule.penalty(layer)) is not None]
    # the base's own dropout, where it has any: other numbers for the other processes' examples
    own = f"train/{distributed.index()}" if distributed.index() else "train"
    torch.manual_seed(derive_seed(config.seed, task, own))
    model.train()
    saved = latest(checkpoints.partial)
    records = restore_training(saved, optimizer, scheduler) if saved else []
    random, whole = random_states(), True  # whole: the model is that of len(records) steps
    try:
        for step, batch in enumerate(track(batches[len(records) :], f"train {name}"), start=len(records) + 1):
            started = time.perf_counter()
            examples = [rows[i] for i in batch]
            loss = 0.0
            tokens = sum(len(e["target_ids"]) for e in examples)
            size = min(settings.micro_batch_size or len(batch), math.ceil(len(batch) / distributed.count()))
            for micro, counts in distributed.share(_split(examples, size)):
                tensors = {
                    key: value.to(model.device)
                    for key, value in collate(micro, pad_id, model.encoder_decoder, targets=True).items()
                }
                part = target_loss(model, tensors, model.encoder_decoder) / tokens * counts
                part.backward()
                loss += part.item()
            penalized = _add_penalties(penalties[distributed.index() :: distributed.count()], weight)
            gradients = [p.grad for p in parameters if p.grad is not None]
            loss, penalized = distributed.add(gradients, (loss, penalized))
            penalty = {"penalty": penalized} if penalties else {}
            if not math.isfinite(loss + sum(penalty.values())):
                found = f"the loss is {loss}" + "".join(f", the penalty {value}" for value in penalty.values())
                raise GainLoRAError(f"task {name}, step {step}: {found}; {REMEDY}.")
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            rate, whole = scheduler.get_last_lr()[0], False
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = round(time.perf_counter() - started, 4)
            record = {"step": step, "loss": loss, **penalty, "learning_rate": rate, "examples": len(batch)}
            records.append({**record, "seconds": seconds})
            random, whole = random_states(), True
            if checkpoints.due(step, len(batches)):
                checkpoints.save(model, optimizer, scheduler, records, random)
    except BaseException as error:
        alone = distributed.count() == 1  # the others may be in the middle of a step
        if alone and whole and records and not isinstance(error, Exception):  # interrupted, not failed: nothing is lost
            checkpoints.save(model, optimizer, scheduler, records, random)
        raise
    if not all(torch.isfinite(p).all() for p in parameters):  # no later loss would show what the last step did
        raise GainLoRAError(f"task {name}: its branch is not finite after training; {REMEDY}.")
    model.eval()
    model.integration.coefficients = None
    if settings.gradient_checkpointing:
        model.base.activation_checkpointing_disable()
    return records


def _add_penalties(penalties: Sequence[Callable[[], Tensor]], weight: float) -> float:
    """Add the gradient of the layers' penalties, one by one: a layer's may be as large as its weight."""
    total = 0.0
    for penalty in penalties:
        part = weight * penalty()
        part.backward()
        total += part.item()
    return total


def _split(examples: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [examples[i : i + size] for i in range(0, len(examples), size)]
