"""Adapter files: safetensors and JSON, nothing else.

adapter_config.json         GainLoRAConfig
adapter_model.safetensors   <layer>.lora_A (T, r, d_in), <layer>.lora_B (T, d_out, r)
gate.safetensors            hidden.<l> (T, d_l, d_{l-1}), key (T, d); gated integration only
subspace.safetensors        gate.<l> (d_{l-1}, k), layer.<group>.<block> (d / b, k)
rule.safetensors            <layer>:<name>: what the branch rule keeps from task to task; where it keeps anything
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gainlora.errors import GainLoRAError, not_written
from gainlora.model.base import load_base, pick_device, pick_dtype
from gainlora.model.gate import GateWeights, widths
from gainlora.plain import build
from gainlora.reading import read_json, shown

if TYPE_CHECKING:
    from gainlora.model.gainlora_model import GainLoRAConfig, GainLoRAModel

FORMAT = "gainlora-2"
CONFIG, BRANCHES = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, BRANCHES, "gate.safetensors", "subspace.safetensors", "rule.safetensors")
PUBLISHED = ("*.json", "*.safetensors", "*.md")
"""All that goes to a hub or comes from it."""


def save_adapter(model: GainLoRAModel, folder: Path) -> None:
    """Write the frozen branches, gates and bases of `model` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, **dataclasses.asdict(model.config)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    r = model.config.rank
    branches = {}
    for name, layer in model.layers.items():
        branches[f"{name}.lora_A"] = layer.A.unflatten(0, (-1, r))  # (T, r, d_in)
        branches[f"{name}.lora_B"] = layer.B.unflatten(1, (-1, r)).transpose(0, 1)  # (T, d_out, r)
    save_tensors(branches, folder / BRANCHES)
    if model.gates is not None:
        gates = {f"hidden.{index}": w for index, w in enumerate(model.gates.hidden, start=1)}
        save_tensors({**gates, "key": model.gates.key}, folder / "gate.safetensors")
    bases = {f"gate.{index}": m for index, m in enumerate(model.gate_memory, start=1)}
    for group, basis in model.layer_memory.items():
        bases.update({f"layer.{group}.{block}": u for block, u in enumerate(basis)})
    save_tensors(bases, folder / "subspace.safetensors")
    kept = {f"{name}:{key}": t for name, layer in model.layers.items() for key, t in layer.memory.items()}
    if kept:
        save_tensors(kept, folder / "rule.safetensors")


def load_adapter(cls: type[GainLoRAModel], folder: Path, base: Any, dtype: str) -> GainLoRAModel:
    """The inverse of `save_adapter`; see `GainLoRAModel.from_pretrained`."""
    from gainlora.data.sources import resolve_model

    config = read_config(folder)
    if base is None:
        base, _ = load_base(resolve_model(config.base_model), pick_dtype(dtype, pick_device()))
        base.to(pick_device())
    found = getattr(base, "weights_digest", None)  # None: not loaded by `load_base`
    if config.base_digest and found and found != config.base_digest:
        raise GainLoRAError(
            f"{folder}: was learned on a base model {config.base_model!r} with other weights than {base.name_or_path} "
            "has; give the one that it was learned on, or learn again in a new run (another seed)."
        )
    model = cls(base, config)
    branches = _Tensors(folder / BRANCHES, config)
    first = next(iter(model.layers))
    stacked = branches.length(f"{first}.lora_A")
    for name, layer in model.layers.items():
        A = branches.take(f"{name}.lora_A", stacked, config.rank, layer.base.in_features)
        B = branches.take(f"{name}.lora_B", stacked, layer.base.out_features, config.rank)
        # memory of their own: as aligned as in the run that learned them, so that products have the same bits
        layer.A = A.flatten(0, 1).to(layer.A.device, copy=True)  # (T*r, d_in)
        layer.B = B.transpose(0, 1).flatten(1).to(layer.B.device, copy=True)  # (d_out, T*r)
    branches.finish()
    shape = widths(model.width, config.gate_hidden, config.gate_depth)
    if config.gated and config.tasks:
        gates = _Tensors(folder / "gate.safetensors", config)
        hidden = [
            gates.take(f"hidden.{i}", stacked, outputs, inputs)
            for i, (inputs, outputs) in enumerate(itertools.pairwise(shape), start=1)
        ]
        model.gates = GateWeights(hidden, gates.take("key", stacked, model.width)).to(model.device)
        gates.finish()
    bases = _Tensors(folder / "subspace.safetensors", config)
    model.gate_memory = [bases.take(f"gate.{i}", d, None).to(model.device) for i, d in enumerate(shape, start=1)]
    model.layer_memory = {
        group: tuple(
            bases.take(f"layer.{group}.{block}", len(empty), None).to(empty.device) for block, empty in enumerate(basis)
        )
        for group, basis in model.layer_memory.items()
    }
    bases.finish()
    if (folder / "rule.safetensors").exists():
        kept = _Tensors(folder / "rule.safetensors", config)
        for key in list(kept.left):
            name, _, what = key.rpartition(":")
            if name in model.layers:
                model.layers[name].memory[what] = kept.left.pop(key).to(model.layers[name].A.device)
        kept.finish()
    return model


def find_adapter(place: str | Path) -> Path:
    """The adapter's own folder.

    Args:
        place: that folder, a run folder (the last finished task's state counts), or a hub id.

    Raises:
        GainLoRAError: there is none.
    """
    folder = Path(place)
    if (folder / CONFIG).exists():
        return folder
    tasks = [path for path in folder.glob("task_*_*") if (path / CONFIG).exists()]
    if tasks and (folder / "config.json").exists():  # a task that the run is about to learn or to forget is none of it
        described = read_json(folder / "config.json", "restore the run", "restore the run's folder from a copy")
        known = described.get("steps") or described.get("tasks") or [] if isinstance(described, dict) else []
        tasks = [path for path in tasks if int(path.name.split("_")[1]) <= len(known)]
    if tasks:
        return max(tasks, key=lambda path: int(path.name.split("_")[1]))
    if not folder.is_dir() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(place)) and not folder.parent.is_dir():
        return _download(str(place))
    kinds = "a run folder with a finished task, a task folder, adapters/<order>, or a hub id"
    raise GainLoRAError(f"{folder / CONFIG}: not found; give {kinds}.")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(PUBLISHED)))
    except Exception as error:  # of the hub, the network, or the disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise GainLoRAError(
            f"{hub_id}: no such folder, and not on the hub ({reason}); give one or the other."
        ) from None
    if not (folder / CONFIG).exists():
        raise GainLoRAError(f"{hub_id}: this model of the hub has no {CONFIG}; give one that `gainlora push` wrote.")
    return folder


def read_branches(folder: Path) -> tuple[GainLoRAConfig, dict[str, tuple[Tensor, Tensor]]]:
    """An adapter without its base model: config, and A (T, r, d_in), B (T, d_out, r) per adapted layer.

    Raises:
        GainLoRAError: a file is missing or damaged.
    """
    config = read_config(folder)
    tensors = _Tensors(folder / BRANCHES, config)
    layers = dict.fromkeys(name.rpartition(".")[0] for name in tensors.left)
    found = {
        name: (
            tensors.take(f"{name}.lora_A", None, config.rank, None),
            tensors.take(f"{name}.lora_B", None, None, config.rank),
        )
        for name in layers
    }
    tensors.finish()
    return config, found


class _Tensors:
    """A file's tensors, taken one by one: each must be there, of the shape that config and base model ask for."""

    def __init__(self, path: Path, config: GainLoRAConfig) -> None:
        self.path, self.left = path, _load(path)
        self.other = (
            f"belongs to another base model than {config.base_model!r} or another rank than {config.rank}; give its "
            "own base model, or restore the folder from a copy"
        )

    def length(self, name: str) -> int:
        """Number of branches in a tensor, 0 where it is not there."""
        return len(self.left[name]) if name in self.left and self.left[name].dim() else 0

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of that name; None stands for any size."""
        found = self.left.pop(name, None)
        sizes = list(found.shape) if found is not None else []
        if len(sizes) != len(shape) or any(s not in (None, n) for s, n in zip(shape, sizes, strict=True)):
            what = "missing" if found is None else f"of shape {sizes}, expected {list(shape)}"
            raise GainLoRAError(f"{self.path}: {name} is {what}; the file {self.other}.")
        assert found is not None
        if found.dtype != torch.float32:
            raise GainLoRAError(f"{self.path}: {name} is {found.dtype}, expected float32; learn the adapter again.")
        return found

    def finish(self) -> None:
        """Nothing may be left over."""
        for name in self.left:
            raise GainLoRAError(f"{self.path}: {name} has no place; the file {self.other}.")


def read_config(folder: Path) -> GainLoRAConfig:
    """adapter_config.json, checked.

    Raises:
        GainLoRAError: not there, of another format, or wrong.
    """
    from gainlora.model.gainlora_model import GainLoRAConfig

    path, damaged = folder / CONFIG, "restore the folder from a copy"
    absent = "give a task folder of a run (runs/<run>/task_<k>_<name>) or adapters/<order>"
    values = read_json(path, absent, damaged)
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != FORMAT:
        older = " of an older version; learn it again" if str(found).startswith("gainlora-") else ""
        raise GainLoRAError(
            f"{path}: format {shown(found)}{older or ' is no GainLoRA adapter'}; this reads {FORMAT!r}; {absent}."
        )
    try:
        return cast(GainLoRAConfig, build(GainLoRAConfig, values, ""))
    except GainLoRAError as error:
        raise GainLoRAError(f"{path}: {error} Or {damaged}.") from None


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors, from whichever device, as safetensors.

    Raises:
        GainLoRAError: the file cannot be written.
    """
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from None


def _load(path: Path) -> dict[str, Tensor]:
    try:
        # cloned: a memory-mapped tensor's alignment differs from an allocated one's, and with it BLAS's last bit
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise GainLoRAError(f"{path}: not found; the adapter's folder is incomplete; restore it from a copy.") from None
    except (OSError, SafetensorError) as error:
        raise GainLoRAError(f"{path}: damaged: {error}; restore the folder from a copy.") from None
