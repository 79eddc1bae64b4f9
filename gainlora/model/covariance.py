"""Covariances of the inputs of a model's layers, gates and router on a task's training examples, in eval mode."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from gainlora import distributed
from gainlora.model.base import to_device
from gainlora.model.gate import Gate
from gainlora.model.modeling import GainLoRAModel
from gainlora.model.subspace import Covariance

Batch = dict[str, Tensor]


@torch.no_grad()
def layer_covariances(model: GainLoRAModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """C of every adapted layer's input over the real tokens of the teacher-forced examples.

    Layers that share an input share its covariance, by the name of their group.

    Args:
        batches: this process's collated examples with labels, on the CPU; examples without labels do not count.
    Returns:
        group -> (b, d/b, d/b) blocks of C, float32.
    """
    blocks = model.config.covariance_blocks
    layers = {group: model.layers[group] for group in model.groups}
    found = {group: Covariance(layer.in_features, blocks, layer.A.device) for group, layer in layers.items()}
    real: dict[str, Tensor] = {}  # per side, the indices of real tokens in a flattened batch

    def observe(group: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not model.integration.off:  # the router reads the prompts
            x = args[0].flatten(0, -2)  # (B * S, d)
            found[group].update(x[real[model.inputs[group].side].to(x.device)])  # (tokens, d)

    with ExitStack() as ends:
        for group, layer in layers.items():
            ends.enter_context(layer.register_forward_pre_hook(partial(observe, group)))
        ends.callback(model.train, model.training)
        model.eval()
        for batch in batches:
            target = batch["labels"] != -100
            source = batch["attention_mask"].bool() & target.any(1, keepdim=True)
            sides = {"target": target, "source": source}
            indices = {side: mask.flatten().nonzero().squeeze(1) for side, mask in sides.items()}
            real.update(to_device(indices, model.device))
            # logits are not needed: one position is the minimum for a decoder-only model
            least = {} if model.encoder_decoder else {"logits_to_keep": 1}
            model(**to_device(batch, model.device), use_cache=False, **least)
    _add_up(found.values())
    # one at a time, to avoid a second copy of all
    return {group: found.pop(group).matrices(group) for group in model.groups}


@torch.no_grad()
def gate_covariances(model: GainLoRAModel, gate: Gate, batches: Iterable[Batch]) -> list[Tensor]:
    """C of p_0..p_L of one gate over the prompts: [(d_0, d_0), ..., (d_L, d_L)], float32."""
    found: list[Covariance] = []
    for input_ids, mask, counted in _prompts(model, batches):
        features = gate.features(model.pool(input_ids, mask))
        found = found or [Covariance(p.shape[1], device=p.device) for p in features]
        for c, p in zip(found, features, strict=True):
            c.update(p[counted])
    _add_up(found)
    return [c.matrices(f"gate layer {index}")[0] for index, c in enumerate(found, start=1)]


@torch.no_grad()
def routing_sums(model: GainLoRAModel, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """`gainlora.model.router.Router.sums` over the prompts."""
    assert model.router is not None
    gram, target = torch.zeros_like(model.router.gram), torch.zeros_like(model.router.gram[0])
    for input_ids, mask, counted in _prompts(model, batches):
        hidden = model.prompt_features(input_ids, mask)  # (B, d)
        more = model.router.sums(hidden[counted.to(hidden.device)])
        gram, target = gram + more[0], target + more[1]
    distributed.all_reduce_sum([gram, target])
    return gram, target


def _prompts(model: GainLoRAModel, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each batch, on the device: input_ids (B, S), the prompts' mask (B, S), indices of the examples that count."""
    for batch in batches:
        counted = (batch["labels"] != -100).any(1).nonzero().squeeze(1)
        placed = to_device({**batch, "counted": counted}, model.device)
        yield placed["input_ids"], model.prompt_mask(placed["attention_mask"], placed["labels"]), placed["counted"]


def _add_up(found: Iterable[Covariance]) -> None:
    """Sum over all processes' examples."""
    for c in found if distributed.count() > 1 else ():
        count = c.total.new_tensor([c.count])
        distributed.all_reduce_sum([c.total, count])
        c.count = round(count.item())
