"""Adapter files: safetensors and JSON, nothing else.

adapter_config.json         GainLoRAConfig
adapter_model.safetensors   <layer>.lora_A (T, r, d_in), <layer>.lora_B (T, d_out, r)
gate.safetensors            hidden.<l> (T, d_l, d_{l-1}), key (T, d); gated integration only
router.safetensors          gram (e, e), targets (e, T), float64; routed integration only
subspace.safetensors        gate.<l> (d_{l-1}, k), layer.<group>.<block> (d / b, k)
rule.safetensors            <layer>:<name>: memory of the branch rule, if it has one
"""

import dataclasses
import itertools
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gainlora.errors import GainLoRAError, not_written, reason, short_repr
from gainlora.io import read_json, write_json
from gainlora.model.adapter_config import GainLoRAConfig
from gainlora.model.base import load_base, pick_device, pick_dtype
from gainlora.model.gate import GateWeights, widths
from gainlora.model.modeling import GainLoRAModel
from gainlora.model.router import Router
from gainlora.parsing import parse

FORMAT = "gainlora-2"
CONFIG, BRANCHES = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, BRANCHES, "gate.safetensors", "router.safetensors", "subspace.safetensors", "rule.safetensors")
PUBLISHED = ("*.json", "*.safetensors", "*.md")
"""The files exchanged with a hub."""


def save_adapter(model: GainLoRAModel, folder: Path) -> None:
    """Write the frozen branches, gates and bases of `model` into `folder`."""
    config = {"format": FORMAT, **dataclasses.asdict(model.config)}
    write_json(folder / CONFIG, config)
    r = model.config.rank
    branches = {}
    for name, layer in model.layers.items():
        branches[f"{name}.lora_A"] = layer.A.unflatten(0, (-1, r))  # (T, r, d_in)
        branches[f"{name}.lora_B"] = layer.B.unflatten(1, (-1, r)).transpose(0, 1)  # (T, d_out, r)
    save_tensors(branches, folder / BRANCHES)
    if model.gates is not None:
        gates = {f"hidden.{index}": w for index, w in enumerate(model.gates.hidden, start=1)}
        save_tensors({**gates, "key": model.gates.key}, folder / "gate.safetensors")
    if model.router is not None:
        save_tensors({"gram": model.router.gram, "targets": model.router.targets}, folder / "router.safetensors")
    bases = {f"gate.{index}": m for index, m in enumerate(model.gate_memory, start=1)}
    for group, basis in model.layer_memory.items():
        bases |= {f"layer.{group}.{block}": u for block, u in enumerate(basis)}
    save_tensors(bases, folder / "subspace.safetensors")
    kept = {f"{name}:{key}": t for name, layer in model.layers.items() for key, t in layer.memory.items()}
    if kept:
        save_tensors(kept, folder / "rule.safetensors")


def load_adapter(
    cls: type[GainLoRAModel], folder: Path, base: Any, dtype: str, device_map: str | None = None
) -> GainLoRAModel:
    """The inverse of `save_adapter`; see `GainLoRAModel.from_pretrained`."""
    from gainlora.data.sources import resolve_model

    config = read_config(folder)
    if base is None:
        base, _ = load_base(resolve_model(config.base_model), pick_dtype(dtype, pick_device()), device_map)
    for what, known, name in (
        ("other weights", config.base_digest, "weights_fingerprint"),
        ("another configuration or tokenizer", config.base_setup, "setup_digest"),
    ):
        found = getattr(base, name, None)  # None: not loaded by `load_base`
        if known and found and found != known:
            raise GainLoRAError(
                f"{folder}: was learned on a base model {config.base_model!r} with {what} than {base.name_or_path} "
                "has; give the one that it was learned on, or learn again in a new run (another seed)."
            )
    model = cls(base, config)
    with _Tensors(folder / BRANCHES, config) as branches:
        stacked = branches.length(f"{next(iter(model.layers))}.lora_A")
        for name, layer in model.layers.items():
            A = branches.take(f"{name}.lora_A", stacked, config.rank, layer.in_features)
            B = branches.take(f"{name}.lora_B", stacked, layer.out_features, config.rank)
            layer.stack(A.flatten(0, 1), B.transpose(0, 1).flatten(1))  # (T*r, d_in), (d_out, T*r)
    shape = widths(model.width, config.gate_hidden, config.gate_depth)
    if config.gated and config.tasks:
        layers = enumerate(itertools.pairwise(shape), start=1)
        with _Tensors(folder / "gate.safetensors", config) as gates:
            hidden = [gates.take(f"hidden.{i}", stacked, outputs, inputs) for i, (inputs, outputs) in layers]
            model.gates = GateWeights(hidden, gates.take("key", stacked, model.width)).to(model.device)
    if model.router is not None and config.tasks:
        with _Tensors(folder / "router.safetensors", config, torch.float64) as sums:
            gram = sums.take("gram", *model.router.gram.shape)
            targets = sums.take("targets", len(gram), stacked)
        model.router = Router(model.router.expansion.shape[1], model.device, gram, targets)
    with _Tensors(folder / "subspace.safetensors", config) as bases:
        model.gate_memory = [bases.take(f"gate.{i}", d, None).to(model.device) for i, d in enumerate(shape, start=1)]
        for group, basis in model.layer_memory.items():
            blocks = [bases.take(f"layer.{group}.{block}", len(u), None).to(u.device) for block, u in enumerate(basis)]
            model.layer_memory[group] = tuple(blocks)
    if (folder / "rule.safetensors").exists():
        with _Tensors(folder / "rule.safetensors", config) as kept:
            for key in list(kept.left):
                name, _, what = key.rpartition(":")
                if name in model.layers:
                    model.layers[name].memory[what] = kept.left.pop(key).to(model.layers[name].A.device)
    return model


def find_adapter(place: str | Path) -> Path:
    """The adapter's own folder.

    Args:
        place: that folder, a run folder (for its last finished task), or a hub id.

    Raises:
        GainLoRAError: there is none.
    """
    folder = Path(place)
    if (folder / CONFIG).exists():
        return folder
    tasks = [path for path in folder.glob("task_*_*") if (path / CONFIG).exists()]
    if tasks and (folder / "config.json").exists():  # tasks that are being learned or forgotten do not count
        described = read_json(folder / "config.json", damaged="restore the run's folder from a copy")
        known = described.get("steps") or described.get("tasks") or []
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
        raise GainLoRAError(
            f"{hub_id}: no such folder, and not on the hub ({reason(error)}); give one or the other."
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
    found = {}
    with _Tensors(folder / BRANCHES, config) as tensors:
        for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors.left):
            A = tensors.take(f"{name}.lora_A", None, config.rank, None)
            found[name] = A, tensors.take(f"{name}.lora_B", None, None, config.rank)
    return config, found


class _Tensors(AbstractContextManager["_Tensors"]):
    """A file's tensors, read one by one: each must exist, with the shape that config and base model require, and at the
    end none may be left."""

    def __init__(self, path: Path, config: GainLoRAConfig, dtype: torch.dtype = torch.float32) -> None:
        self.path, self.left, self.dtype = path, _load(path), dtype
        self.other = (
            f"belongs to another base model than {config.base_model!r} or another rank than {config.rank}; give its "
            "own base model, or restore the folder from a copy"
        )

    def length(self, name: str) -> int:
        """Number of branches in a tensor, 0 if it is missing."""
        return len(self.left[name]) if name in self.left and self.left[name].dim() else 0

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of that name; None in a shape matches any size."""
        found = self.left.pop(name, None)
        sizes = list(found.shape) if found is not None else []
        if len(sizes) != len(shape) or any(s not in (None, n) for s, n in zip(shape, sizes, strict=True)):
            what = "missing" if found is None else f"of shape {sizes}, expected {list(shape)}"
            raise GainLoRAError(f"{self.path}: {name} is {what}; the file {self.other}.")
        assert found is not None
        if found.dtype != self.dtype:
            expected = str(self.dtype).removeprefix("torch.")
            raise GainLoRAError(f"{self.path}: {name} is {found.dtype}, expected {expected}; learn the adapter again.")
        return found

    def __exit__(self, error: object, *_: object) -> None:
        if error is None and self.left:
            raise GainLoRAError(f"{self.path}: {next(iter(self.left))} has no place; the file {self.other}.")


def read_config(folder: Path) -> GainLoRAConfig:
    """adapter_config.json, checked.

    Raises:
        GainLoRAError: missing, of another format, or invalid.
    """
    path, damaged = folder / CONFIG, "restore the folder from a copy"
    absent = "give a task folder of a run (runs/<run>/task_<k>_<name>) or adapters/<order>"
    values = read_json(path, absent=absent, damaged=damaged)
    found = values.pop("format", None)
    if found != FORMAT:
        older = " of an older version; learn it again" if str(found).startswith("gainlora-") else ""
        raise GainLoRAError(
            f"{path}: format {short_repr(found)}{older or ' is no GainLoRA adapter'}; this reads {FORMAT!r}; {absent}."
        )
    try:
        return parse(GainLoRAConfig, values)
    except GainLoRAError as error:
        raise GainLoRAError(f"{path}: {error} Or {damaged}.") from None


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors from any device as safetensors.

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
