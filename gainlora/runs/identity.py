"""Step ids: a hash of everything that decides a step's numbers, and of nothing else.

    id_k = SHA-256(id_{k-1}, task k's name and data, options, H, seed, base model, learning version)

Two runs with k equal first ids learned the same k tasks, bit for bit on one machine, and share those steps. Options are
part of the id unless they are listed here as irrelevant, or unused by the method.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from gainlora.config import RunConfig
from gainlora.errors import GainLoRAError, reason
from gainlora.io import read_json, sha256, write_json
from gainlora.model.base import device_name, pick_device, pick_dtype
from gainlora.rules import ALL_TASKS, BranchRule
from gainlora.version import learning_version

PACKAGES = ("gainlora", "torch", "transformers", "accelerate", "datasets", "safetensors", "rouge-score")
BASE_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken")
"""Hashed files of a base model's folder: weights, configuration, tokenizer."""
NOT_BASE = ("generation_config.json",)
"""Replaced when the model is loaded (`gainlora.model.base.load_base`)."""
UNUSED = {
    "order": ("name", "data", "tasks", "sources"),
    "model": ("name", "source", "device_map"),
    "data": ("skip_incomplete",),
    "train": ("micro_batch_size", "gradient_checkpointing", "checkpoint_every", "epochs", "task_epochs", "min_steps"),
    "evaluate": ("batch_size",),
}
"""Options that affect nothing, or only rounding; and those covered otherwise: tasks and weights by content, epochs by
those of the step."""

DEFAULTS = (
    ("model", "tf32", False),
    ("model", "compile", False),
    ("data", "template", None),
    ("data", "instruction", "task"),
    ("data", "replay", 0.0),
    ("gate", "learning_rate", None),
    ("gate", "trained", "all"),
    ("train", "patience", None),
)
"""Options that earlier versions lacked, and the values with which nothing differs from these."""


def step_names(config: RunConfig, tasks: Sequence[str]) -> list[str]:
    """Names of a run's steps: one a task, or one for all."""
    return [ALL_TASKS] if config.rule.all_at_once else list(tasks)


def horizon(config: RunConfig, tasks: int) -> int:
    """H of the threshold schedule of a run of that many tasks."""
    return config.subspace.horizon or tasks


def uses_horizon(config: RunConfig) -> bool:
    """Whether the method keeps a memory, so that H decides numbers."""
    return config.gated or config.rule.input_memory


def step_ids(
    config: RunConfig, data: Mapping[str, Mapping[str, Any]], base: str, known: Sequence[str] = ()
) -> list[str]:
    """Ids of a run's steps, in order.

    Args:
        data: task -> its entry in data.json, of which `sha256` and `train`, the number of examples, count.
        base: `base_fingerprint` of the base model.
        known: ids of the first steps, if already known.
    """
    ids = list(known)
    options, version_of = number_options(config, len(data)), learning_version(config.method)
    for name in step_names(config, list(data))[len(ids) :]:
        step = data if config.rule.all_at_once else {name: data[name]}
        epochs = config.epochs(name, sum(entry["train"] for entry in step.values()))
        digests = [(task, entry["sha256"]) for task, entry in step.items()]
        content = [ids[-1] if ids else "", digests, options, epochs, base, version_of]
        ids.append(hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())
    return ids


def common_steps(ids: Sequence[str], other: Sequence[str]) -> int:
    """Number of first steps that two runs share."""
    return sum(one == two for one, two in zip(ids, other, strict=False))  # each id covers all steps before it


def number_options(config: RunConfig, tasks: int) -> dict[str, Any]:
    """The options that affect what the method learns and how it is scored, resolved.

    Args:
        tasks: number of the run's tasks.
    """
    options = config.learning()
    for section, names in UNUSED.items():
        for name in names:
            options[section].pop(name, None)
    rule, subspace, train = config.rule, options["subspace"], options["train"]
    options["model"]["dtype"] = dtype_name(config)
    subspace["horizon"] = horizon(config, tasks)
    if not config.gated:
        del options["gate"], subspace["gate_threshold"]
    elif config.gate.initial_key == "random":
        del options["gate"]["initial_direction"]
    if not rule.input_memory:
        del subspace["threshold"], subspace["covariance_blocks"]
    if not uses_horizon(config):
        del subspace["horizon"], subspace["energy"]
        if type(rule).finish is BranchRule.finish:  # no pass over the examples besides training
            del subspace["max_examples"]
    for section, option, default in DEFAULTS:
        if options.get(section, {}).get(option, ...) == default:
            del options[section][option]
    if not config.data.validation:
        del options["data"]["validation_limit"]
    if type(rule).penalty is BranchRule.penalty:
        del train["penalty_weight"]
    elif train["penalty_weight"] is None:
        train["penalty_weight"] = rule.penalty_weight
    return options


def run_name(config: RunConfig, ids: Sequence[str]) -> str:
    """<order>-<method>-<model>-<seed>-<first digits of the last step's id>."""
    model = re.sub("[^A-Za-z0-9_.-]", "_", Path(config.model.name).name)
    return f"{config.order.name}-{config.method}-{model}-{config.seed}-{ids[-1][:8]}"


def dtype_name(config: RunConfig) -> str:
    """The base's dtype on this machine: float32 or bfloat16."""
    return str(pick_dtype(config.model.dtype, pick_device())).removeprefix("torch.")


def environment(method: str) -> dict[str, Any]:
    """This machine's device and package versions, and the present code's version, as in config.json."""
    return {"device": device_name(), "versions": {name: version(name) for name in PACKAGES}, **code_version(method)}


def code_version(method: str) -> dict[str, str]:
    """The present code's version."""
    return {"learning_version": learning_version(method), "code": code_digest()}


def environment_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of device and packages between two environments, which may change rounding."""
    before = then.get("versions", {})
    pairs = {"device": (then.get("device"), now["device"])}
    pairs |= {name: (before.get(name), found) for name, found in now["versions"].items() if name != "gainlora"}
    return [f"{name} {old} then, {new} now" for name, (old, new) in pairs.items() if old != new]


def base_fingerprint(location: str, root: Path) -> str:
    """Fingerprint of a base model: SHA-256 over its weights, configuration and tokenizer files; for a hub id the
    commit.

    Hashes are cached in .cache/fingerprints.json and recomputed when a file's size or modification time changes.

    Args:
        location: folder or hub id, as `resolve_model` returns it.
    """
    folder = Path(location)
    if not folder.is_dir():
        return hub_commit(location)
    store = root / ".cache" / "fingerprints.json"
    files = {path for pattern in BASE_FILES for path in folder.resolve().glob(pattern) if path.name not in NOT_BASE}
    hashes = []
    with FileLock(store.with_suffix(".lock")):  # runs that start together: one hashes, the others read
        try:
            kept = read_json(store)
        except GainLoRAError:  # missing or damaged: computed again
            kept = {}
        known = dict(kept)
        for path in sorted(files):
            stat = [path.stat().st_size, path.stat().st_mtime_ns]
            if known.get(str(path), [])[:2] != stat:
                known[str(path)] = [*stat, sha256(path)]
            hashes.append(f"{path.name} {known[str(path)][2]}")
        if known != kept:
            write_json(store, known)
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def revision(location: str, fingerprint: str) -> str | None:
    """The commit to load of a hub id, None for a folder."""
    return None if Path(location).is_dir() else fingerprint


def hub_commit(hub_id: str) -> str:
    """The newest commit of a model on the hub.

    Raises:
        GainLoRAError: it cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json")).parent.name  # .../snapshots/<commit>/config.json
    except Exception as error:  # of the hub, the network, or the disk
        raise GainLoRAError(
            f"model.name: {hub_id!r}: its config.json cannot be loaded from the hub ({reason(error)}); give a hub id "
            "that you have access to, or a folder with config.json, safetensors weights and a tokenizer."
        ) from None


def describe(
    config: RunConfig, tasks: Sequence[str], skipped: Sequence[str], ids: Sequence[str], base: str
) -> dict[str, Any]:
    """The content of a new run's config.json."""
    name = run_name(config, ids)
    return {
        "run_id": name,
        "order": config.order.name,
        "method": config.method,
        "model": config.model.name,
        "seed": config.seed,
        "tasks": list(tasks),
        "steps": step_names(config, tasks),
        "skipped": list(skipped),
        "ids": list(ids),
        "lineage": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.learning(),
        **({"note": config.note} if config.note else {}),
        **({"overridden_limits": config.overridden_limits} if config.overridden_limits else {}),
        "dtype": dtype_name(config),
        "base": base,
        **environment(config.method),
    }


def code_digest() -> str:
    """SHA-256 of the package's source code that takes part in learning, for the record."""
    package, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for part in ("config.py", "parsing.py", "sections.py", "distributed.py", "data", "model", "rules", "training"):
        path = package / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(str(file.relative_to(package)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
