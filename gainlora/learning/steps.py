"""The two steps around a task's training: prepare its branch and gate, then update the memories.

prepare   the rule's start of branch t (inflora: covariance of its inputs under branches 1..t-1), key of gate t
update    the rule's finish; fold and freeze branch and gate t; covariances under 1..t -> expand U and M
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from gainlora import distributed
from gainlora.config import Config
from gainlora.data.batches import IGNORED, buckets, collate
from gainlora.learning.trainer import derive_seed, target_loss
from gainlora.model.gainlora_model import GainLoRAConfig, GainLoRAModel
from gainlora.model.gate import Gate, GateWeights, first_hidden, new_key, widths
from gainlora.model.inputs import gate_covariances, layer_covariances
from gainlora.model.subspace import design_A, expand_basis, expand_blocks, threshold_at
from gainlora.progress import track
from gainlora.rules import Start


class Examples:
    """A task's training examples as batches for covariance passes: similar lengths together, in a fixed order.

    Args:
        rows: tokenized training examples.
    """

    def __init__(self, rows: Any, model: GainLoRAModel, config: Config, pad_id: int) -> None:
        count = min(len(rows), config.subspace.max_examples or len(rows))
        # any `count` of them, not the first: a file may be sorted by label
        rows = rows.select(sorted(random.Random(0).sample(range(len(rows)), count)))
        lengths = [len(p) + len(t) for p, t in zip(rows["prompt_ids"], rows["target_ids"], strict=True)]
        self.rows, self.model, self.pad_id = rows, model, pad_id
        self.order = buckets(lengths, config.evaluate.batch_size)

    def batches(self, description: str, single: bool = False) -> Iterator[dict[str, Tensor]]:
        """This process's part of one pass; `single`: the whole pass, one example a batch."""
        every = [([i], True) for indices in self.order for i in indices]
        for indices, counts in track(every if single else distributed.share(self.order), description):
            batch = collate([self.rows[i] for i in indices], self.pad_id, self.model.encoder_decoder, targets=True)
            if not counts:
                batch["labels"].fill_(IGNORED)  # an example without an answer does not count
            yield {key: value.to(self.model.device) for key, value in batch.items()}


def new_adapter(config: Config, horizon: int, base_digest: str) -> GainLoRAConfig:
    """The adapter of a run that has learned nothing yet.

    Args:
        horizon: H of the threshold schedule.
        base_digest: of the base model's weights.
    """
    return GainLoRAConfig(
        base_model=config.model.location,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
        integration="gated" if config.gated else "single" if config.rule.task_known else "equal",
        gate_hidden=config.gate.hidden,
        gate_depth=config.gate.depth,
        gate_score=config.gate.score,
        covariance_blocks=config.subspace.covariance_blocks,
        horizon=horizon,
        base_digest=base_digest,
    )


def prepare_task(model: GainLoRAModel, examples: Examples, config: Config, task: int) -> None:
    """Start branch `task` (1-based) and its gate on `model`, which holds tasks 1..task-1."""
    rule, rank = config.rule, config.lora.rank
    generator = torch.Generator().manual_seed(derive_seed(config.seed, task, "prepare"))
    last = model.pop_branch() if rule.shared and task > 1 else {}
    covariances = layer_covariances(model, examples.batches("inputs")) if rule.input_memory else {}

    @cache  # layers that share an input share its free directions
    def free_directions(group: str, count: int) -> Tensor:
        return design_A(model.layer_memory[group], covariances[group], count, group)

    branch = {}
    for name, layer in model.layers.items():
        free = partial(free_directions, model.inputs[name].group) if rule.input_memory else None
        branch[name] = rule.start(Start(layer, rank, generator, last.get(name), free))
    gate = start_gate(model, examples, config, generator) if config.gated else None
    model.start_branch(branch, rule.train_A, gate)


def start_gate(model: GainLoRAModel, examples: Examples, config: Config, generator: torch.Generator) -> Gate:
    """Gate t: the last gate's hidden layers, a key outside the memory, and the memory as its constraint."""
    device = model.device
    if model.gates is None:
        shape = widths(model.width, config.gate.hidden, config.gate.depth)
        hidden = [w.to(device) for w in first_hidden(shape, generator)]
    else:
        hidden = model.gates.last().hidden
    nothing = [m[:, :0] for m in model.gate_memory]
    start = GateWeights(hidden, torch.zeros(1, model.width, device=device))
    # before training: the features that the copied hidden layers give the new task
    features = gate_covariances(model, Gate(start, nothing, config.gate.score).to(device), examples.batches("features"))
    key_memory = model.gate_memory[-1] if config.gate.constrain_init else nothing[-1]
    start.key = new_key(
        features[-1], key_memory, config.gate.key_norm, config.gate.initial_direction, generator
    ).unsqueeze(0)
    return Gate(start, model.gate_memory if config.gate.constrain_update else nothing, config.gate.score)


def update_memory(model: GainLoRAModel, examples: Examples, config: Config, task: int, name: str, horizon: int) -> None:
    """End task `task` (1-based): freeze its branch and gate, and add what it used to the memories."""
    rule, settings = config.rule, config.subspace
    rule.finish(model, partial(_gradients, model, examples))
    model.freeze_branch(name)
    if rule.input_memory:
        keep = threshold_at(settings.threshold, task, horizon)
        covariances = layer_covariances(model, examples.batches("inputs"))
        for group, basis in model.layer_memory.items():
            model.layer_memory[group] = expand_blocks(basis, covariances.pop(group), keep, settings.energy, group)
    if config.gated:
        assert model.gates is not None
        keep = threshold_at(settings.gate_threshold, task, horizon)
        gate = Gate(model.gates.last(), model.gate_memory, config.gate.score).to(model.device)
        features = gate_covariances(model, gate, examples.batches("features"))
        model.gate_memory = [
            expand_basis(memory, covariance, keep, settings.energy, f"gate layer {index}")
            for index, (memory, covariance) in enumerate(zip(model.gate_memory, features, strict=True), start=1)
        ]


def _gradients(model: GainLoRAModel, examples: Examples) -> Iterator[None]:
    """Example by example, the gradient of its log-likelihood in the trainable parameters' `grad`; eval mode."""
    model.eval()
    try:
        for batch in examples.batches("gradients", single=True):
            model.zero_grad(set_to_none=True)
            target_loss(model, batch, model.encoder_decoder).backward()
            yield
    finally:
        model.zero_grad(set_to_none=True)
        model.integration.coefficients = None


def basis_sizes(model: GainLoRAModel) -> dict[str, dict[str, int]]:
    """How full the memories are: directions kept, and of how many."""
    gate = {str(i): m for i, m in enumerate(model.gate_memory, start=1)} if model.config.gated else {}
    layers = {group: basis for group, basis in model.layer_memory.items() if sum(u.shape[1] for u in basis)}
    return {
        "gate": {i: m.shape[1] for i, m in gate.items()},
        "gate_width": {i: m.shape[0] for i, m in gate.items()},
        "layers": {group: sum(u.shape[1] for u in basis) for group, basis in layers.items()},
        "layers_width": {group: sum(u.shape[0] for u in basis) for group, basis in layers.items()},
    }
