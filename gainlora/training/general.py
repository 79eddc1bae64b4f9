"""General ability: how well a model still continues plain text that no task contains.

The text is general.txt: sentences written for this purpose, one a line. The model reads the first half of each and
predicts the second, as an answer; so encoder-decoders are measured like decoder-only models.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F

from gainlora.data.collate import collate, encode_prompts
from gainlora.data.prompts import Prompt
from gainlora.model.modeling import GainLoRAModel
from gainlora.sections import DataConfig
from gainlora.training.train import target_logits

BATCH = 10


@cache
def sentences() -> tuple[str, ...]:
    """The text, a sentence each."""
    return tuple(files("gainlora.training").joinpath("general.txt").read_text(encoding="utf-8").splitlines())


@torch.no_grad()
def general_ability(model: GainLoRAModel, tokenizer: Any) -> dict[str, Any]:
    """Mean per predicted token, in nats, in eval mode.

    Returns:
        loss, base_loss: cross-entropy under the model, and under its base alone (all branches off).
        kl: divergence KL(base || model) of the predicted distributions. text: SHA-256 of the sentences.
        Empty if the tokenizer cannot write any of them.
    """
    model.eval()
    sums, tokens = torch.zeros(3, dtype=torch.float64, device=model.device), 0
    rows = _rows(model, tokenizer)
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH], tokenizer.pad_token_id, model.encoder_decoder, targets=True)
        logits, labels = target_logits(model, batch, model.encoder_decoder)  # (n, V), (n,)
        with model.branches_off():
            base, _ = target_logits(model, batch, model.encoder_decoder)
        predicted = labels != -100
        ours, theirs = (found[predicted].float().log_softmax(-1) for found in (logits, base))
        losses = [F.nll_loss(found, labels[predicted], reduction="sum") for found in (ours, theirs)]
        sums += torch.stack((*losses, F.kl_div(ours, theirs, reduction="sum", log_target=True)))
        tokens += int(predicted.sum())
    if not tokens:
        return {}
    loss, base_loss, kl = (sums / tokens).tolist()
    text = hashlib.sha256("\n".join(sentences()).encode()).hexdigest()
    return {"loss": loss, "base_loss": base_loss, "kl": kl, "text": text}


def _rows(model: GainLoRAModel, tokenizer: Any) -> Sequence[dict[str, Any]]:
    halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, sentences())]
    plain = [Prompt("", "", "", " ".join(first), "") for first, _ in halves]
    prompts, _ = encode_prompts(plain, tokenizer, DataConfig(), model.encoder_decoder)
    rests = [" ".join(rest) if model.encoder_decoder else " " + " ".join(rest) for _, rest in halves]
    targets = tokenizer(rests, add_special_tokens=False)["input_ids"]
    return [{"prompt_ids": p, "target_ids": t} for p, t in zip(prompts, targets, strict=True) if p and t]
