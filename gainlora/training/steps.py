"""The two steps around a task's training: prepare its branch and gate, then update the memories.

prepare   the rule's start of branch t (inflora: covariance of its inputs under branches 1..t-1), key of gate t
update    the rule's finish; fold and freeze branch and gate t; covariances under 1..t -> expand U and M
"""

import random
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gainlora import distributed
from gainlora.config import RunConfig
from gainlora.data.collate import IGNORED, buckets, collate, lengths
from gainlora.data.tasks import Task
from gainlora.errors import GainLoRAError
from gainlora.model.adapter_config import GainLoRAConfig
from gainlora.model.covariance import gate_covariances, layer_covariances, routing_sums
from gainlora.model.gate import Gate, GateWeights, first_hidden, new_key, random_key, widths
from gainlora.model.modeling import GainLoRAModel
from gainlora.model.subspace import expand_basis, expand_blocks, inflora_A, threshold_at
from gainlora.progress import track
from gainlora.rules import Start
from gainlora.training.train import derive_seed, target_loss

PASS_BATCH = 25
"""Examples per forward pass for covariances: fixed, since the order of summation affects the last bits."""


class Unscored(NamedTuple):
    """What is known of the newest tasks before they are evaluated."""

    tasks: list[Task]
    entries: dict[str, dict[str, Any]]
    """What a run records of each in data.json."""
    before: dict[str, float]
    seconds: dict[str, float]


class Examples:
    """A task's training examples as batches for covariance passes: similar lengths together, in a fixed order.

    Args:
        rows: tokenized training examples.
    """

    def __init__(self, rows: Any, model: GainLoRAModel, config: RunConfig, pad_id: int) -> None:
        count = min(len(rows), config.subspace.max_examples or len(rows))
        # a random subset: a file may be sorted by label
        rows = rows.select(sorted(random.Random(0).sample(range(len(rows)), count)))
        self.rows, self.model, self.pad_id = rows, model, pad_id
        self.order = buckets(lengths(rows), PASS_BATCH)

    def batches(self, description: str, single: bool = False) -> Iterator[dict[str, Tensor]]:
        """This process's share of one pass; `single`: the entire pass, one example per batch."""
        every = [([i], True) for indices in self.order for i in indices]
        for indices, counts in track(every if single else distributed.split(self.order), f"measure {description}"):
            batch = collate([self.rows[i] for i in indices], self.pad_id, self.model.encoder_decoder, targets=True)
            if not counts:
                batch["labels"].fill_(IGNORED)  # examples without an answer are skipped
            yield batch


def new_adapter(config: RunConfig, horizon: int, base: Any) -> GainLoRAConfig:
    """The adapter of a run before its first task.

    Args:
        horizon: H of the threshold schedule.
        base: the base model, as `load_base` returns it.
    """
    return GainLoRAConfig(
        base_model=config.model.location,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
        integration=config.integration,
        gate_hidden=config.gate.hidden,
        gate_depth=config.gate.depth,
        gate_score=config.gate.score,
        covariance_blocks=config.subspace.covariance_blocks,
        horizon=horizon,
        base_digest=base.weights_fingerprint,
        base_setup=base.setup_digest,
    )


def prepare_task(model: GainLoRAModel, examples: Examples, config: RunConfig, task: int) -> None:
    """Start branch `task` (1-based) and its gate on `model`, which holds tasks 1..task-1."""
    rule, rank = config.rule, config.lora.rank
    generator = torch.Generator().manual_seed(derive_seed(config.seed, task, "prepare"))
    last = model.pop_branch() if rule.shared and task > 1 else {}
    covariances = layer_covariances(model, examples.batches("inputs")) if rule.input_memory else {}

    @cache  # layers that share an input share its free directions
    def free_directions(group: str, count: int) -> Tensor:
        return inflora_A(model.layer_memory[group], covariances[group], count, group)

    branch = {}
    for name, layer in model.layers.items():
        free = partial(free_directions, model.inputs[name].group) if rule.input_memory else None
        branch[name] = rule.start(Start(layer, rank, generator, last.get(name), free))
    if rule.input_memory and not any(A.any() for A, _ in branch.values()):
        raise GainLoRAError(
            f"input memory is full: none of the {len(branch)} adapted layers has an input direction that old tasks "
            "leave free, so nothing can be learned; lower subspace.threshold or raise subspace.horizon in a new run."
        )
    gate = start_gate(model, examples, config, generator) if config.gated else None
    model.start_branch(branch, rule.train_A, gate)


def zero_rows(model: GainLoRAModel) -> dict[str, int]:
    """Layer -> number of zero rows in the newest branch's A, where the layer had fewer free input directions than the
    rank; other layers are omitted. With `covariance_blocks`, a row counts once per block."""
    found = {}
    for name, layer in model.layers.items():
        blocks = layer.A[-layer.rank :].unflatten(1, (model.config.covariance_blocks, -1))  # (r, b, d/b)
        if count := int((~blocks.any(-1)).sum()):
            found[name] = count
    return found


def start_gate(model: GainLoRAModel, examples: Examples, config: RunConfig, generator: torch.Generator) -> Gate:
    """Gate t: the last gate's hidden layers, its key (`gate.initial_key`), and the memory as its constraint."""
    device = model.device
    if model.gates is None:
        shape = widths(model.width, config.gate.hidden, config.gate.depth)
        hidden = [w.to(device) for w in first_hidden(shape, generator)]
    else:
        hidden = model.gates.last().hidden
    nothing = [m[:, :0] for m in model.gate_memory]
    start = GateWeights(hidden, torch.zeros(1, model.width, device=device))
    if config.gate.initial_key == "random":
        start.key = random_key(model.width, config.gate.key_norm, generator).unsqueeze(0).to(device)
    else:
        # before training: the features that the copied hidden layers give the new task
        gate = Gate(start, nothing, config.gate.score).to(device)
        features = gate_covariances(model, gate, examples.batches("features"))
        memory = model.gate_memory[-1] if config.gate.initial_key == "orthogonal" else nothing[-1]
        key = new_key(features[-1], memory, config.gate.key_norm, config.gate.initial_direction, generator)
        start.key = key.unsqueeze(0)
    return Gate(start, model.gate_memory if config.gate.constrain_update else nothing, config.gate.score)


def update_memory(
    model: GainLoRAModel, examples: Examples, config: RunConfig, task: int, name: str, horizon: int
) -> None:
    """End task `task` (1-based): freeze its branch and gate, and expand the memories by its directions."""
    rule, settings = config.rule, config.subspace
    rule.finish(model, partial(_gradients, model, examples))
    model.freeze_branch(name)
    if model.router is not None:
        model.router.add(*routing_sums(model, examples.batches("routing")))
    if rule.input_memory:
        keep = threshold_at(settings.threshold, task, horizon)
        covariances = layer_covariances(model, examples.batches("inputs"))
        mine = {}  # each process decomposes its share, and all get the same bases, however their devices round
        for group in model.groups[distributed.index() :: distributed.count()]:
            old = model.layer_memory[group]
            basis = expand_blocks(old, covariances.pop(group), keep, settings.energy, group)
            mine[group] = basis if distributed.count() == 1 else tuple(u.cpu() for u in basis)
        for group, basis in distributed.all_gather(list(mine.items())):
            model.layer_memory[group] = tuple(u.to(model.layers[group].A.device) for u in basis)
    if config.gated:
        assert model.gates is not None
        keep = threshold_at(settings.gate_threshold, task, horizon)
        gate = Gate(model.gates.last(), model.gate_memory, config.gate.score).to(model.device)
        features = gate_covariances(model, gate, examples.batches("features"))
        expanded = [
            expand_basis(memory, covariance, keep, settings.energy, f"gate layer {index}")
            for index, (memory, covariance) in enumerate(zip(model.gate_memory, features, strict=True), start=1)
        ]
        if distributed.count() > 1:  # the first process's
            expanded = distributed.on_main(lambda: [basis.cpu() for basis in expanded])
        model.gate_memory = [basis.to(model.device) for basis in expanded]


def _gradients(model: GainLoRAModel, examples: Examples) -> Iterator[None]:
    """Yield once per example, with the gradient of its log-likelihood in the parameters' `grad`; eval mode."""
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
    """Stored directions and widths of the memories."""
    gate = {str(i): m for i, m in enumerate(model.gate_memory, start=1)} if model.config.gated else {}
    layers = {group: basis for group, basis in model.layer_memory.items() if sum(u.shape[1] for u in basis)}
    return {
        "gate": {i: m.shape[1] for i, m in gate.items()},
        "gate_width": {i: m.shape[0] for i, m in gate.items()},
        "layers": {group: sum(u.shape[1] for u in basis) for group, basis in layers.items()},
        "layers_width": {group: sum(u.shape[0] for u in basis) for group, basis in layers.items()},
    }
