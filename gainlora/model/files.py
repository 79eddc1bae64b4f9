"""Adapter files: safetensors and JSON, nothing else.

adapter_config.json         GainLoRAConfig
adapter_model.safetensors   <layer>.lora_A (T, r, d_in), <layer>.lora_B (T, d_out, r)
gate.safetensors            hidden.<l> (T, d_l, d_{l-1}), key (T, d); gated integration only
subspace.safetensors        gate.<l> (d_{l-1}, k), layer.<group>.<block> (d / b, k)
rule.safetensors            <layer>:<name>: what the branch rule keeps from task to task; where it keeps anything
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gainlora.errors import GainLoRAError, not_written
from gainlora.model.base import load_base, pick_device, pick_dtype
from gainlora.model.gate import GateWeights

if TYPE_CHECKING:
    from gainlora.model.gainlora_model import GainLoRAModel

FORMAT = "gainlora-2"


def save_adapter(model: GainLoRAModel, folder: Path) -> None:
    """Write the frozen branches, gates and bases of `model` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, **dataclasses.asdict(model.config)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    r = model.config.rank
    branches = {}
    for name, layer in model.layers.items():
        branches[f"{name}.lora_A"] = layer.A.unflatten(0, (-1, r))  # (T, r, d_in)
        branches[f"{name}.lora_B"] = layer.B.unflatten(1, (-1, r)).transpose(0, 1)  # (T, d_out, r)
    save_tensors(branches, folder / "adapter_model.safetensors")
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
    from gainlora.model.gainlora_model import GainLoRAConfig

    values = _read_config(folder)
    lists = {name: value and tuple(value) for name, value in values.items() if name in ("targets", "tasks")}
    config = GainLoRAConfig(**{**values, **lists})
    if base is None:
        base, _ = load_base(resolve_model(config.base_model), pick_dtype(dtype, pick_device()))
        base.to(pick_device())
    model = cls(base, config)
    branches = _load(folder / "adapter_model.safetensors")
    for name, layer in model.layers.items():
        A, B = branches.pop(f"{name}.lora_A", None), branches.pop(f"{name}.lora_B", None)
        expected = (config.rank, layer.base.in_features), (layer.base.out_features, config.rank)
        if A is None or B is None or (A.shape[1:], B.shape[1:]) != expected:
            raise GainLoRAError(
                f"{folder / 'adapter_model.safetensors'}: {name} is missing or of another shape; these branches belong "
                f"to another base model than {config.base_model!r}, or to another rank than {config.rank}."
            )
        layer.A = A.flatten(0, 1).to(model.device)  # (T*r, d_in)
        layer.B = B.transpose(0, 1).flatten(1).to(model.device)  # (d_out, T*r)
    if branches:
        raise GainLoRAError(
            f"{folder / 'adapter_model.safetensors'}: {next(iter(branches))} is no layer of base model "
            f"{config.base_model!r}."
        )
    if config.gated and config.tasks:
        gates = {name: w.to(model.device) for name, w in _load(folder / "gate.safetensors").items()}
        model.gates = GateWeights([gates[f"hidden.{i + 1}"] for i in range(config.gate_depth)], gates["key"])
    bases = _load(folder / "subspace.safetensors")
    model.gate_memory = [bases[f"gate.{i + 1}"].to(model.device) for i in range(len(model.gate_memory))]
    model.layer_memory = {
        group: tuple(bases[f"layer.{group}.{block}"].to(model.device) for block in range(len(basis)))
        for group, basis in model.layer_memory.items()
    }
    if (folder / "rule.safetensors").exists():
        for key, tensor in _load(folder / "rule.safetensors").items():
            name, _, kept = key.rpartition(":")
            model.layers[name].memory[kept] = tensor.to(model.device)
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GainLoRAError(
            f"{path}: not found; give a task folder of a run (runs/<run>/task_<k>_<name>) or adapters/<order>."
        ) from None
    except ValueError as error:
        raise GainLoRAError(f"{path}: not valid JSON: {error}") from None
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != FORMAT:
        older = " of an older version; learn it again" if str(found).startswith("gainlora-") else ""
        raise GainLoRAError(f"{path}: format {found!r}{older or ' is no GainLoRA adapter'}; this reads {FORMAT!r}.")
    return values


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
        raise GainLoRAError(f"{path}: not found; the adapter's folder is incomplete.") from None
    except SafetensorError as error:
        raise GainLoRAError(f"{path}: damaged: {error}; restore the folder from a copy.") from None
