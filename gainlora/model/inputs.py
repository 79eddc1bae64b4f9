"""Covariances of what a model's layers and gates see on a task's training examples, in eval mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gainlora import distributed
from gainlora.model.gainlora_model import GainLoRAModel
from gainlora.model.gate import Gate
from gainlora.model.subspace import Covariance

Batch = dict[str, Tensor]


@torch.no_grad()
def layer_covariances(model: GainLoRAModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """C of every adapted layer's input over the real tokens of the teacher-forced examples.

    Layers that share an input share its covariance, by the name of their group.

    Args:
        batches: this process's collated examples with labels; those without a label do not count.
    Returns:
        group -> (b, d/b, d/b) blocks of C, float32.
    """
    blocks = model.config.covariance_blocks
    layers = {group: model.layers[group] for group in model.groups}
    found = {group: Covariance(layer.base.in_features, blocks, layer.A.device) for group, layer in layers.items()}
    masks: dict[str, Tensor] = {}

    def observe(group: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            found[group].update(x[masks[model.inputs[group].side].to(x.device)])  # (tokens, d)

        return hook

    handles = [model.layers[group].register_forward_pre_hook(observe(group)) for group in model.groups]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            masks["target"] = batch["labels"] != -100
            masks["source"] = batch["attention_mask"].bool() & masks["target"].any(1, keepdim=True)
            # logits are not needed: one position is the least that a decoder-only model will compute
            least = {} if model.encoder_decoder else {"logits_to_keep": 1}
            model(**batch, use_cache=False, **least)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    _add_up(found.values())
    return {group: found.pop(group).matrices(group) for group in model.groups}  # one at a time: no second copy of all


@torch.no_grad()
def gate_covariances(model: GainLoRAModel, gate: Gate, batches: Iterable[Batch]) -> list[Tensor]:
    """C of p_0..p_L of one gate over the prompts: [(d_0, d_0), ..., (d_L, d_L)], float32."""
    found: list[Covariance] = []
    for batch in batches:
        mask = model.prompt_mask(batch["attention_mask"], batch["labels"])
        features = gate.features(model.pool(batch["input_ids"], mask))
        found = found or [Covariance(p.shape[1], device=p.device) for p in features]
        for c, p in zip(found, features, strict=True):
            c.update(p[(batch["labels"] != -100).any(1)])
    _add_up(found)
    return [c.matrices(f"gate layer {index}")[0] for index, c in enumerate(found, start=1)]


def _add_up(found: Iterable[Covariance]) -> None:
    """Make the sums those of all processes' examples."""
    for c in found:
        c.count = round(distributed.add([c.total], [c.count])[0])
