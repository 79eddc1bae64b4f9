"""Checks that a base model behaves as training and generation assume, on a few tokens before learning.

    causal     a later token changes no earlier logits (BERT without is_decoder: it would train on its own answers)
    masked     the content of padding changes no logits (RWKV)
    shifted    left padding changes no logits of a decoder-only model, nor do the resulting position ids
               (RoBERTa counts positions from 2)
    alike      generation and training compute the same logits from the same start

The checks use the code of training and evaluation: `collate`, `GainLoRAModel.forward` and `.generate`.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gainlora.data.collate import collate
from gainlora.errors import GainLoRAError, reason
from gainlora.model.modeling import GainLoRAModel

ATTEMPTS = 3
"""Different tokens; a model is refused if all fail, since rounding may once send a token to another expert."""
NEW = 2
"""Tokens generated: the first without, the second with a cache."""
REMEDY = "choose another model"


def check_behavior(model: GainLoRAModel, pad_id: int) -> None:
    """Refuse a model that violates an assumption of training or generation.

    Args:
        model: without branches, so that its outputs are the base model's; gates depend on the whole prompt.

    Raises:
        GainLoRAError: names the model and the violation.
    """
    problem = ""
    devices = [model.device] if model.device.type == "cuda" else []
    for attempt in range(ATTEMPTS):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                problem = _problem(model, pad_id, attempt)
        except Exception as error:  # any exception
            problem = f"training on or generating a few tokens fails ({reason(error)}); {REMEDY}"
        if not problem:
            return
    where = f"{model.config.base_model!r} ({model.base.config.model_type})"
    raise GainLoRAError(f"model.name: {where}: {problem}.")


def _problem(model: GainLoRAModel, pad_id: int, attempt: int) -> str:
    """The violation, or ""."""
    *q, a, b, c, d = _tokens(model, pad_id, 8, attempt)  # 4 prompt tokens and 4 others
    longer, last_changed = [*q, a, b], [*q, a, c]
    prompts = [q, q, longer, longer if model.encoder_decoder else last_changed]
    batch = _batch(model, [{"prompt_ids": p, "target_ids": []} for p in prompts], pad_id, (a, d), targets=False)
    made: Any = model.generate(**batch, max_new_tokens=NEW, output_scores=True, return_dict_in_generate=True)
    scores = torch.stack(made.scores, dim=1).float()  # (4, n, V)
    n = scores.shape[1]
    answers = made.sequences[:, -n:].tolist()
    ended = answers[2][0] == model.generation_config.eos_token_id

    targets = [[*answer, d] for answer in answers]
    targets[1] = targets[0]  # differs from row 0 only in the content of padding
    if model.encoder_decoder:
        targets[3] = [c if answers[2][0] != c else d, *targets[2][1:]]
    rows = [{"prompt_ids": p, "target_ids": t} for p, t in zip(prompts, targets, strict=True)]
    batch = _batch(model, rows, pad_id, (a, d), targets=True)
    logits = _centered(model(**batch, use_cache=False).logits)  # (4, S + n + 1, V) or (4, n + 1, V)
    first = 0 if model.encoder_decoder else len(longer) - 1  # of the positions that predict answers
    known = 1 if ended else n
    width, causal = len(longer), first + 1 if model.encoder_decoder else len(q) + 1
    # rounding is the same within one pass, except for experts; other shapes differ by up to 0.04 in bfloat16
    same, other = (1e-3, 1e-3) if model.base.dtype == torch.float32 else (0.05, 0.2)
    if not _close(logits[3, :causal], logits[2, :causal], same):
        return (
            "its earlier logits change with later tokens, so it would train on its own answers; set is_decoder in its "
            f"config.json, or {REMEDY}"
        )
    real = slice(None) if model.encoder_decoder else slice(width - len(q), None)
    if not _close(logits[1, real], logits[0, real], same):
        return f"it does not ignore padding (attention_mask), so a batch would change its samples; {REMEDY}"
    if not model.encoder_decoder:
        if not _close(logits[0, width - len(q) : width], logits[2, : len(q)], same):
            return f"padding on the left changes its logits; {REMEDY}"
        alone = {key: value[2:3] for key, value in batch.items() if key != "position_ids"}
        if not _close(_centered(model(**alone, use_cache=False).logits), logits[2:3], other):
            return f"it does not count positions from 0 at the first token, as training does; {REMEDY}"
    for row in (0, 2):
        found = _centered(scores[row, : 1 if row == 0 else known])
        if not _close(found, logits[row, first : first + len(found)], other):
            return f"generation starts or continues differently from training; {REMEDY}"
    calls: set[str] = set()
    with ExitStack() as ends:
        for name, layer in model.layers.items():
            ends.enter_context(layer.register_forward_pre_hook(lambda module, args, name=name: calls.add(name)))
        ends.callback(model.eval)
        model.train()  # some models take another path, or require more inputs, in training
        model(**batch, use_cache=False)
    if bypassed := sorted(set(model.layers) - calls):
        return f"training bypasses {bypassed[0]}; leave {bypassed[0].rpartition('.')[2]} out of lora.targets"
    return ""


def _batch(
    model: GainLoRAModel, rows: list[dict[str, Any]], pad_id: int, padding: tuple[int, int], targets: bool
) -> dict[str, Tensor]:
    """The collated rows; row 1 has other tokens under its padding."""
    batch = collate(rows, pad_id, model.encoder_decoder, targets)
    batch["input_ids"][1, batch["attention_mask"][1] == 0] = torch.tensor(padding)
    return {key: value.to(model.device) for key, value in batch.items()}


def _tokens(model: GainLoRAModel, pad_id: int, count: int, attempt: int) -> list[int]:
    """Ids of distinct tokens that are not special."""
    settings = model.generation_config
    special = {pad_id, settings.eos_token_id, settings.bos_token_id, settings.decoder_start_token_id}
    size = model.base.get_input_embeddings().num_embeddings
    order = torch.randperm(size, generator=torch.Generator().manual_seed(attempt)).tolist()
    return [token for token in order[: count + len(special)] if token not in special][:count]


def _centered(logits: Tensor) -> Tensor:
    """Subtract the mean, which does not affect a softmax."""
    return logits.float() - logits.float().mean(-1, keepdim=True)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two sets of logits (..., V) differ only by rounding."""
    return bool((found - expected).norm() <= tolerance * expected.norm())
