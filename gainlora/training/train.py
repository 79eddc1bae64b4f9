"""Learning one task: the loop over its examples."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gainlora import distributed
from gainlora.config import RunConfig
from gainlora.data.collate import chunks, collate, epoch_batches, lengths
from gainlora.errors import GainLoRAError
from gainlora.model.base import to_device
from gainlora.model.modeling import GainLoRAModel
from gainlora.progress import track
from gainlora.training.callbacks import Callback
from gainlora.training.checkpoint import Checkpoints, Records, latest, random_states, resume_training, set_random_states

if TYPE_CHECKING:
    from gainlora.training.validation import Validation

REMEDY = "lower train.learning_rate, or set model.dtype to float32"


def derive_seed(seed: int, task: int, purpose: str) -> int:
    """A seed from (run seed, 1-based task index, purpose) alone, so that a resumed task repeats exactly."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{purpose}".encode()).digest()[:7], "big")


def target_loss(model: Any, batch: dict[str, Tensor], encoder_decoder: bool) -> Tensor:
    """Sum of the cross-entropy over target tokens, EOS included (float32 scalar). Arguments: of `target_logits`."""
    logits, labels = target_logits(model, batch, encoder_decoder)
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


def target_logits(model: Any, batch: dict[str, Tensor], encoder_decoder: bool) -> tuple[Tensor, Tensor]:
    """Logits (n, V) at all positions from the first target's, and their labels (n,), -100 where there is no target.

    Decoder-only batches are padded on the left, so targets end each row: only the logits that predict
    them are computed.

    Args:
        batch: collated, best on the CPU: a GPU would have to be asked where targets begin.
    """
    extra, labels = {}, batch["labels"]  # (B, S) or (B, S_target)
    if not encoder_decoder:
        first = int((labels != -100).int().argmax(dim=1).min())  # leftmost target position of the batch
        extra["logits_to_keep"] = labels.shape[1] - first + 1
    batch = to_device(batch, model.device)
    logits = model(**batch, use_cache=False, **extra).logits  # (B, S - first + 1, V) or (B, S_target, V)
    labels = batch["labels"]
    if not encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, first:]
    return logits.flatten(0, 1), labels.flatten()


def train_task(
    model: GainLoRAModel, rows: Any, config: RunConfig, task: int, name: str, pad_id: int, checkpoints: Checkpoints,
    validation: "Validation", callback: Callback = Callback(),  # noqa: B008  does nothing and holds nothing
) -> Records:  # fmt: skip
    """Train the started branch (and gate) on one task, resuming from its latest checkpoint, if any.

    The loss is the mean over all target tokens of a batch, independent of micro-batches and processes, plus the rule's
    penalty.

    Args:
        rows: tokenized training examples (`gainlora.data.collate.tokenize`).
        task: 1-based index.
        checkpoints: where to save, and where to find the one from which the branch was restored.
        validation: runs between steps, and holds the best state for `train.keep: best`.

    Returns:
        One record per optimizer step: step, loss (without the penalty), penalty (weighted; for rules with one),
        coefficient (the new branch's mean, with gates), learning_rate, examples, micro_batch_size (where memory allowed
        less than the configured one), seconds.

    Raises:
        GainLoRAError: the loss or a trained parameter is not finite.
    """
    from transformers import get_scheduler

    settings = config.train
    batches = [
        batch
        for epoch in range(config.epochs(name, len(rows)))
        for batch in epoch_batches(len(rows), settings.batch_size, config.seed, task, epoch)
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if model.gate is not None and config.gate.learning_rate is not None:
        own = [p for p in model.gate.parameters() if p.requires_grad]
        rest = [p for p in parameters if all(p is not q for q in own)]
        groups = [{"params": rest}, {"params": own, "lr": config.gate.learning_rate}]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay)
    scheduler = get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=len(batches))
    if settings.gradient_checkpointing:
        # reentrant checkpointing loses the coefficients' gradient
        model.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if config.model.compile:
        model.compile_base()
    weight = config.rule.penalty_weight if settings.penalty_weight is None else settings.penalty_weight
    gate = [] if model.gate is None else list(model.gate.state_dict().values())
    # equal up to rounding on different kinds of machines
    distributed.broadcast([*(t for layer in model.layers.values() for t in layer.learning), *gate])
    penalties = [p for layer in model.layers.values() if (p := config.rule.penalty(layer)) is not None]
    # for dropout in the base: other random numbers for the examples of other processes
    purpose = f"train/{distributed.index()}" if distributed.index() else "train"
    torch.manual_seed(derive_seed(config.seed, task, purpose))
    model.train()
    saved = latest(checkpoints.partial)
    records = resume_training(saved, optimizer, scheduler, validation) if saved else []
    size = int(records[-1].get("micro_batch_size", 0)) if records else 0  # what memory allowed before
    size = size or settings.micro_batch_size or settings.batch_size
    random, whole = random_states(), True  # whole: the model is in the state after len(records) steps
    left = batches[len(records) :]
    reads = ([rows[i] for i in batch] for batch in left)
    try:
        if validation.run(len(records), parameters):  # interrupted before it was done
            callback.on_validation(validation.records[-1])
            left = [] if validation.stalled else left
        size = _try_longest(model, rows, min(size, settings.batch_size), pad_id) if left else size
        examples = next(reads, [])
        for step, _ in enumerate(track(left, f"train {name}"), start=len(records) + 1):
            started = time.perf_counter()
            measured, size = _add_gradients(model, examples, size, pad_id)
            mine = penalties[distributed.index() :: distributed.count()]
            sums = torch.stack((*measured, _add_penalties(mine, weight, measured[0])))
            distributed.all_reduce_sum([*(p.grad for p in parameters if p.grad is not None), sums])
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            rate, whole = scheduler.get_last_lr()[0], False
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            count, examples = len(examples), next(reads, [])  # read while a GPU computes
            total, opened, penalized = sums.tolist()  # the one point of a step where the CPU waits for it
            penalty = {"penalty": penalized} if penalties else {}
            coefficient = {} if model.gate is None else {"coefficient": opened / count}
            if not math.isfinite(total + penalized):
                found = f"the loss is {total}" + "".join(f", the penalty {value}" for value in penalty.values())
                raise GainLoRAError(f"task {name}, step {step}: {found}; {REMEDY}.")
            seconds = round(time.perf_counter() - started, 4)
            reduced = {"micro_batch_size": size} if size < (settings.micro_batch_size or settings.batch_size) else {}
            record = {"step": step, "loss": total, **penalty, **coefficient, "learning_rate": rate}
            records.append({**record, "examples": count, **reduced, "seconds": seconds})
            random, whole = random_states(), True
            if validation.run(step, parameters):
                callback.on_validation(validation.records[-1])
            callback.on_step(records[-1])
            if checkpoints.due(step, len(batches)):
                checkpoints.save(model, optimizer, scheduler, records, random, validation)
            if validation.stalled:
                break
    except BaseException as error:
        alone = distributed.count() == 1  # other processes may be in the middle of a step
        if alone and whole and records and not isinstance(error, Exception):  # interrupted, not failed
            checkpoints.save(model, optimizer, scheduler, records, random, validation)
        raise
    if not all(torch.isfinite(p).all() for p in parameters):  # no later loss would reveal a failure of the last step
        raise GainLoRAError(f"task {name}: its branch is not finite after training; {REMEDY}.")
    validation.keep_best(parameters)
    model.eval()
    model.integration.coefficients = None
    if settings.gradient_checkpointing:
        model.base.activation_checkpointing_disable()
    return records


def _add_gradients(model: GainLoRAModel, examples: list[dict[str, Any]], size: int, pad_id: int) -> tuple[Tensor, int]:
    """Add the gradient of the examples' loss, the mean over their target tokens.

    Returns:
        This process's part of the loss and of the sum of the new branch's coefficients (2,), on the device; and the
        micro-batch size, which is halved whenever a GPU runs out of memory.
    """
    random = random_states()
    while (measured := _added(model, examples, size, pad_id)) is None:
        size = min(size, math.ceil(len(examples) / distributed.count()))
        if distributed.count() > 1:  # the others go on with theirs
            raise _too_little_memory(size)
        size = _halved(model, size, random)
    return measured, size


def _added(model: GainLoRAModel, examples: list[dict[str, Any]], size: int, pad_id: int) -> Tensor | None:
    """Add the gradient in micro-batches of one size; None if the GPU's memory does not hold it."""
    tokens = sum(len(e["target_ids"]) for e in examples)
    share = min(size, math.ceil(len(examples) / distributed.count()))
    measured = torch.zeros(2, device=model.device)
    try:
        for micro, counts in distributed.split(chunks(examples, share)):
            batch = collate(micro, pad_id, model.encoder_decoder, targets=True)
            part = target_loss(model, batch, model.encoder_decoder) / tokens * counts
            with model.base_products():
                part.backward()
            measured[0] += part.detach()
            if (a := model.integration.coefficients) is not None:  # (B, T)
                measured[1] += a[:, -1].detach().sum() * counts
    except torch.OutOfMemoryError:
        if distributed.sharded():  # the others wait for this process in the middle of a pass
            raise _too_little_memory(share) from None
        return None
    return measured


def _halved(model: GainLoRAModel, size: int, random: Any) -> int:
    """Half a micro-batch that was too large, with all as it was before it."""
    if size == 1:
        raise _too_little_memory(size)
    logging.getLogger(__name__).warning("out of memory: micro-batches of %d examples from here on", size // 2)
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    set_random_states(random)
    return size // 2


def _too_little_memory(size: int) -> GainLoRAError:
    smaller = "lower it" if size > 1 else "set train.gradient_checkpointing, or lower data.max_prompt_tokens"
    return GainLoRAError(
        f"train.micro_batch_size: {size}: the GPU's memory does not hold that many examples; {smaller}; the same "
        "command continues from the last checkpoint."
    )


def _try_longest(model: GainLoRAModel, rows: Any, size: int, pad_id: int) -> int:
    """On GPUs, the micro-batch size for which each has memory at the longest examples: found now, not after hours."""
    if model.device.type != "cuda":
        return size
    order = sorted(range(len(rows)), key=lengths(rows).__getitem__)
    random = random_states()
    while True:
        longest = [rows[i] for i in order[-size * distributed.count() :]]
        if all(distributed.all_gather([_added(model, longest, size, pad_id) is not None])):
            break
        size = _halved(model, size, random)
    model.zero_grad(set_to_none=True)
    set_random_states(random)
    return size


def _add_penalties(penalties: Sequence[Callable[[], Tensor]], weight: float, like: Tensor) -> Tensor:
    """Add the gradient of the layers' penalties, one by one: the graph of one layer's may be as large as its weight."""
    total = torch.zeros_like(like)
    for penalty in penalties:
        part = weight * penalty()
        part.backward()
        total += part.detach().to(total.device)
    return total
