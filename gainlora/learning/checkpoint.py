"""A task half learned, on disk: enough to go on as if training had never stopped, bit for bit.

    .task_02_<name>.partial/checkpoint_00050/    after 50 steps; the folder appears by one rename, whole
      state.safetensors   branch.<layer>.A, .B         the branch as it is now
                          kept.<layer>:<name>          what the branch rule keeps
                          gate.<name>                  start, memory and change of the gate
                          optimizer.<i>.<name>         AdamW's moments and step count of parameter i
                          random.<i>.cpu, .cuda0, ...  generators of process i (a base with dropout draws from them)
      progress.json       records of train.jsonl so far, learning rate schedule, seconds
      checksums.json

All else follows from the configuration, the data and the finished tasks.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gainlora import distributed
from gainlora.errors import GainLoRAError
from gainlora.learning.files import read_json, seal, verify_checksums, write_json
from gainlora.model.files import save_tensors
from gainlora.model.gainlora_model import GainLoRAModel
from gainlora.model.gate import Gate, GateWeights
from gainlora.rules import BranchRule

STATE, PROGRESS = "state.safetensors", "progress.json"
Records = list[dict[str, float]]


class Checkpoints:
    """The checkpoints of one task in its partial folder; only the newest is kept.

    Args:
        partial: the task's folder while it is learned.
        every: steps between two; None: only at the end of training.
        seconds: of the phases before training.
    """

    def __init__(self, partial: Path, every: int | None, seconds: dict[str, float]) -> None:
        self.partial, self.every, self.seconds = partial, every, seconds

    def due(self, step: int, last: int) -> bool:
        """Whether to save after this step of `last`."""
        return step == last or (self.every is not None and step % self.every == 0)

    def save(
        self, model: GainLoRAModel, optimizer: Any, scheduler: Any, records: Records, random: dict[str, Tensor]
    ) -> None:
        """Write the state after `len(records)` steps, then remove older ones.

        Args:
            random: this process's `random_states` after these steps.
        """
        generators = distributed.gather([random])
        if distributed.index():
            return
        tensors: dict[str, Tensor] = {}
        for name, layer in model.layers.items():
            A, B = layer.learning
            tensors |= {f"branch.{name}.A": A, f"branch.{name}.B": B}
            tensors |= {f"kept.{name}:{key}": kept for key, kept in layer.memory.items()}
        if model.gate is not None:
            tensors |= {f"gate.{name}": value for name, value in model.gate.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        for process, states in enumerate(generators):
            tensors |= {f"random.{process}.{device}": state for device, state in states.items()}
        target = self.partial / f"checkpoint_{len(records):05d}"
        new = self.partial / f".{target.name}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_tensors(tensors, new / STATE)
        rates = [group["lr"] for group in optimizer.param_groups]
        progress = {"records": records, "scheduler": scheduler.state_dict(), "rates": rates, "seconds": self.seconds}
        write_json(new / PROGRESS, progress)
        shutil.rmtree(target, ignore_errors=True)
        seal(new, target)
        for older in set(self.partial.glob("checkpoint_*")) - {target}:
            shutil.rmtree(older)


def random_states() -> dict[str, Tensor]:
    """States of torch's generators, by device."""
    return {"cpu": torch.get_rng_state()} | {f"cuda{i}": torch.cuda.get_rng_state(i) for i in _own_gpus()}


def _own_gpus() -> Sequence[int]:
    """Those that this process computes on: with a device map all, one of several processes its own."""
    if not torch.cuda.is_available():
        return []
    return range(torch.cuda.device_count()) if distributed.count() == 1 else [torch.cuda.current_device()]


def latest(partial: Path) -> Path | None:
    """The newest whole checkpoint of a task. A damaged one counts as none: the task starts again."""
    return distributed.first(lambda: _latest(partial))


def _latest(partial: Path) -> Path | None:
    for folder in sorted(partial.glob("checkpoint_*"), reverse=True):
        try:
            verify_checksums(folder)
        except GainLoRAError:
            continue
        return folder
    return None


def restore_branch(folder: Path, model: GainLoRAModel, rule: BranchRule) -> None:
    """Make `model`, which holds the finished tasks, learn the checkpoint's branch and gate."""
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


def restore_training(folder: Path, optimizer: Any, scheduler: Any) -> Records:
    """Give optimizer, schedule and random generators the checkpoint's state; its records."""
    tensors, progress = load_file(folder / STATE), read_json(folder / PROGRESS)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _under(tensors, "optimizer.").items():
        index, _, moment = name.partition(".")
        moments.setdefault(int(index), {})[moment] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    for group, rate in zip(optimizer.param_groups, progress["rates"], strict=True):
        group["lr"] = rate
    scheduler.load_state_dict(progress["scheduler"])
    states = _under(tensors, f"random.{distributed.index()}.")  # none where there were fewer processes
    if "cpu" in states:
        torch.set_rng_state(states["cpu"].clone())
    for i in _own_gpus():
        if f"cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda{i}"].clone(), i)
    records: Records = progress["records"]
    return records


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
