"""Checkpoints within a task: training resumes from one with the same bits as an uninterrupted run.

    .task_02_<name>.partial/checkpoint_00050/    after 50 steps; renamed atomically when complete
      state.safetensors   branch.<layer>.A, .B         the branch as it is now
                          kept.<layer>:<name>          memory of the branch rule
                          gate.<name>                  start, memory and change of the gate
                          optimizer.<i>.<name>         AdamW's moments and step count of parameter i
                          best.<i>                     parameter i in the best state on the validation examples
                          random.<i>.cpu, .cuda0, ...  generators of process i (a base with dropout draws from them)
      progress.json       records of train.jsonl and validation.jsonl so far, learning rate schedule
      checksums.json

Everything else follows from the configuration, the data and the finished tasks.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gainlora import distributed
from gainlora.io import is_whole, read_json, seal, write_json
from gainlora.model.adapter_io import save_tensors
from gainlora.model.gate import Gate, GateWeights
from gainlora.model.modeling import GainLoRAModel
from gainlora.rules import BranchRule

if TYPE_CHECKING:
    from gainlora.training.validation import Validation

STATE, PROGRESS = "state.safetensors", "progress.json"
Records = list[dict[str, float]]
Tensors = dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one task in its partial folder; older ones are deleted.

    Args:
        partial: folder of the unfinished task; None: write no checkpoints.
        every: steps between checkpoints; None: only at the end of training.
    """

    def __init__(self, partial: Path | None, every: int | None) -> None:
        self.partial, self.every = partial, every

    def due(self, step: int, last: int) -> bool:
        """Whether to save after this step of `last`."""
        return self.partial is not None and (step == last or (self.every is not None and step % self.every == 0))

    def save(
        self, model: GainLoRAModel, optimizer: Any, scheduler: Any, records: Records, random: Tensors,
        validation: "Validation",
    ) -> None:  # fmt: skip
        """Write the state after `len(records)` steps, then remove older ones.

        Args:
            random: this process's `random_states` after these steps.
        """
        generators = distributed.all_gather([random])
        if distributed.index() or self.partial is None:
            return
        tensors: Tensors = {}
        for name, layer in model.layers.items():
            A, B = layer.learning
            tensors |= {f"branch.{name}.A": A, f"branch.{name}.B": B}
            tensors |= {f"kept.{name}:{key}": kept for key, kept in layer.memory.items()}
        if model.gate is not None:
            tensors |= {f"gate.{name}": value for name, value in model.gate.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        tensors |= {f"best.{index}": value for index, value in enumerate(validation.best)}
        for process, states in enumerate(generators):
            tensors |= {f"random.{process}.{device}": state for device, state in states.items()}
        target = self.partial / f"checkpoint_{len(records):05d}"
        new = self.partial / f".{target.name}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_tensors(tensors, new / STATE)
        rates = [group["lr"] for group in optimizer.param_groups]
        progress = {"records": records, "scheduler": scheduler.state_dict(), "rates": rates}
        write_json(new / PROGRESS, {**progress, "validation": validation.records})
        shutil.rmtree(target, ignore_errors=True)
        seal(new, target)
        for older in set(self.partial.glob("checkpoint_*")) - {target}:
            shutil.rmtree(older)


def random_states() -> Tensors:
    """States of torch's generators, by device."""
    return {"cpu": torch.get_rng_state()} | {f"cuda{i}": torch.cuda.get_rng_state(i) for i in _own_gpus()}


def set_random_states(states: Tensors) -> None:
    """Put torch's generators into these states; devices without a saved state are left unchanged."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"].clone())
    for i in _own_gpus():
        if f"cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda{i}"].clone(), i)


def _own_gpus() -> Sequence[int]:
    """The GPUs of this process: all of them with a device map, its own one with several processes."""
    if not torch.cuda.is_available():
        return []
    return range(torch.cuda.device_count()) if distributed.count() == 1 else [torch.cuda.current_device()]


def latest(partial: Path | None) -> Path | None:
    """The newest intact checkpoint of a task; None without one: the task then starts again."""
    if partial is None:
        return None
    return distributed.on_main(lambda: next(filter(is_whole, sorted(partial.glob("checkpoint_*"), reverse=True)), None))


def restore_branch(folder: Path, model: GainLoRAModel, rule: BranchRule) -> None:
    """Add the checkpoint's branch and gate, trainable, to `model`, which holds the finished tasks."""
    tensors = load_file(folder / STATE)
    gate = None
    if model.config.gated:
        state = _under(tensors, "gate.")
        layers = range(model.config.gate_depth + 1)
        *hidden, key = (state[f"start_{layer}"].unsqueeze(0) for layer in layers)
        memory = [state[f"memory_{layer}"].clone() for layer in layers]
        gate = Gate(GateWeights(hidden, key), memory, model.config.gate_score)
        gate.load_state_dict(state)
    if rule.shared and model.branches:
        model.pop_branch()
    branches = _under(tensors, "branch.")
    model.start_branch({n: (branches[f"{n}.A"], branches[f"{n}.B"]) for n in model.layers}, rule.train_A, gate)
    for name, kept in _under(tensors, "kept.").items():
        layer, _, key_name = name.rpartition(":")
        model.layers[layer].memory[key_name] = kept.clone().to(model.layers[layer].A.device)


def resume_training(folder: Path, optimizer: Any, scheduler: Any, validation: "Validation") -> Records:
    """Restore optimizer, schedule, validation and random generators; returns the training records."""
    tensors, progress = load_file(folder / STATE), read_json(folder / PROGRESS)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, Tensors] = {}
    for name, value in _under(tensors, "optimizer.").items():
        index, _, moment = name.partition(".")
        like = parameters[int(index)] if value.dim() else value  # fused updates need the parameter's order in memory
        moments.setdefault(int(index), {})[moment] = torch.empty_like(like).copy_(value)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    for group, rate in zip(optimizer.param_groups, progress["rates"], strict=True):
        group["lr"] = rate
    scheduler.load_state_dict(progress["scheduler"])
    best = _under(tensors, "best.")
    validation.restore(progress.get("validation", []), [best[str(index)].clone() for index in range(len(best))])
    set_random_states(_under(tensors, f"random.{distributed.index()}."))  # missing if the run had fewer processes then
    records: Records = progress["records"]
    return records


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
