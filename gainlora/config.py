"""One run as frozen dataclasses: what is learned, by which method, how.

Sections and options have the names that params.yaml gives them (`gainlora/params.py` reads it). Contradictions are
refused here, by the option's name, before anything is fetched, loaded or written.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gainlora import rules
from gainlora.errors import GainLoRAError
from gainlora.plain import build


def is_name(text: str) -> bool:
    """Whether it may stand for an order or task, and so be a part of paths: it never leads out of a folder."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text) is not None


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: str = "smollm2-135m"
    """A model of params.yaml's `models` (`smollm2-135m`, the embedded one, `t5-large`, ...), a hub id, or a folder."""
    source: str | None = None
    """Hub id or folder that `name` stands for; null: `name` itself."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base. `auto`: bfloat16 where the device computes in it, float32 elsewhere.
    Branches, gates, bases and covariances are float32 in every case."""
    device_map: Literal["auto"] | None = None
    """`auto`: one process spreads the base over its GPUs, some layers on each; null: all of it on the first."""

    @property
    def location(self) -> str:
        """Where the weights are."""
        return self.source or self.name


@dataclass(frozen=True)
class DataConfig:
    """How task files become examples and tokens."""

    max_prompt_tokens: int = 160
    """Longer prompts lose tokens at their start, so that "Output: " survives."""
    max_target_tokens: int = 50
    """Longer targets lose tokens at their end."""
    train_limit: int | None = 320
    """Training examples per task, the same for every seed; null takes all."""
    test_limit: int | None = 100
    """Test examples per task, the same for every seed; null takes all."""
    references: Literal["all", "first"] = "all"
    """Score against every reference of an instance (best match), or the first (the authors' protocol)."""
    skip_incomplete: bool = False
    """Run an order without the tasks whose files are missing, and record that."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank branches: e = W h + (alpha / rank) * sum_i a_i B_i A_i h."""

    rank: int = 8
    """Rows of A_i, columns of B_i."""
    alpha: float = 16.0
    """Scaling numerator."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers to adapt; null: q and v projections of every attention."""


@dataclass(frozen=True)
class GateConfig:
    """The gating module g_i, one per task (used by `gainlora-*` methods)."""

    hidden: int = 50
    """Width of the hidden layer(s): 100 for T5, 50 for Llama in the paper."""
    depth: int = 2
    """L, the number of hidden layers: shapes d -> hidden -> ... -> d."""
    score: Literal["cosine", "linear"] = "cosine"
    """`cosine`: b = 4 cos(p_L, key), the authors' code. `linear`: b = key . p_L, the paper's equation."""
    key_norm: float | None = None
    """Norm of a new key; null: sqrt(d / 3), the authors' T5."""
    initial_direction: Literal["svd", "random"] = "svd"
    """A new key's direction: top direction of the task's features outside the memory, or a Gaussian."""
    constrain_init: bool = True
    """False (ablation): the new key is not projected out of the memory."""
    constrain_update: bool = True
    """False (ablation): the gate trains without the memory's constraint."""


@dataclass(frozen=True)
class SubspaceConfig:
    """Gradient projection memory of gates and of InfLoRA's layers."""

    threshold: float = 0.995
    """Share of energy that a layer's basis keeps at task 1; rises to 1 over `horizon` tasks."""
    gate_threshold: float = 0.995
    """The same for the gate's bases."""
    energy: Literal["covariance", "representation"] = "covariance"
    """Energy of a direction: singular value of the covariance squared (the authors), or the value itself."""
    horizon: int | None = None
    """H of the schedule e_t = e + (1 - e) (t - 1) / H; null: the number of tasks of the order."""
    covariance_blocks: int = 1
    """Keep layer covariances block-diagonal, b blocks of d/b inputs (for d of several thousand)."""
    max_examples: int | None = None
    """Cap on the training examples of a pass for covariances (or EWC's Fisher); null: all that are trained on."""


@dataclass(frozen=True)
class TrainConfig:
    """Learning one task."""

    learning_rate: float = 1e-3
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    epochs: int = 1
    batch_size: int = 8
    """Examples per optimizer step."""
    micro_batch_size: int | None = None
    """Examples per forward pass (gradient accumulation); null: batch_size. Must divide batch_size."""
    weight_decay: float = 0.0
    penalty_weight: float | None = None
    """Factor of the rule's penalty in the loss (olora, nlora, clora, ewc); null: the rule's own (gainlora/rules)."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient's norm; null: never."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward (non-reentrant): less memory, more time."""
    checkpoint_every: int | None = 50
    """Steps between two checkpoints of a task in training: at most that many are repeated after a crash. null: none."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Generation on the seen tasks' test examples."""

    batch_size: int = 25
    num_beams: int = 1


@dataclass(frozen=True)
class OrderConfig:
    """A sequence of tasks."""

    name: str
    data: str
    """Folder with one folder per task, each with train.json and test.json."""
    template: Literal["superni", "long_sequence"]
    """Prompt template."""
    metric: Literal["rouge_l", "exact_match"]
    """Score of a task, 0 to 100."""
    tasks: tuple[str, ...]
    """Task folders in the order they are learned."""


@dataclass(frozen=True)
class Config:
    """One run: what is learned, by which method, how."""

    order: OrderConfig
    method: str = "gainlora-inflora"
    """A branch rule, or `gainlora-` and a branch rule."""
    seed: int = 42
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    subspace: SubspaceConfig = field(default_factory=SubspaceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        if self.method not in rules.methods():
            bare = self.method.removeprefix("gainlora-")
            why = f"; gates cannot weigh the branches of {bare!r}" if bare in rules.names() else ""
            raise GainLoRAError(f"method: {self.method!r} is unknown{why}; choose from {', '.join(rules.methods())}.")
        at_least = {
            "seed": (self.seed, 0),
            "data.max_prompt_tokens": (self.data.max_prompt_tokens, 8),
            "data.max_target_tokens": (self.data.max_target_tokens, 1),
            "data.train_limit": (self.data.train_limit, 1),
            "data.test_limit": (self.data.test_limit, 1),
            "lora.rank": (self.lora.rank, 1),
            "gate.hidden": (self.gate.hidden, 1),
            "gate.depth": (self.gate.depth, 1),
            "subspace.horizon": (self.subspace.horizon, 1),
            "subspace.covariance_blocks": (self.subspace.covariance_blocks, 1),
            "subspace.max_examples": (self.subspace.max_examples, 1),
            "train.epochs": (self.train.epochs, 1),
            "train.batch_size": (self.train.batch_size, 1),
            "train.micro_batch_size": (self.train.micro_batch_size, 1),
            "train.checkpoint_every": (self.train.checkpoint_every, 1),
            "evaluate.batch_size": (self.evaluate.batch_size, 1),
            "evaluate.num_beams": (self.evaluate.num_beams, 1),
        }
        for option, (value, minimum) in at_least.items():
            if value is not None and not value >= minimum:
                raise GainLoRAError(f"{option}: {value} is too small; give at least {minimum}.")
        above_zero = {
            "lora.alpha": self.lora.alpha,
            "gate.key_norm": self.gate.key_norm,
            "train.learning_rate": self.train.learning_rate,
            "train.max_grad_norm": self.train.max_grad_norm,
        }
        for option, number in above_zero.items():
            if number is not None and not 0 < number < float("inf"):
                raise GainLoRAError(f"{option}: {number} must be a finite number above 0.")
        not_negative = {
            "train.weight_decay": self.train.weight_decay,
            "train.penalty_weight": self.train.penalty_weight,
        }
        for option, number in not_negative.items():
            if number is not None and not 0 <= number < float("inf"):
                raise GainLoRAError(f"{option}: {number} must be finite and not negative.")
        for option, text in (
            ("model.name", self.model.name),
            ("model.source", self.model.location),
            ("order.data", self.order.data),
        ):
            if not text:
                raise GainLoRAError(f"{option}: empty; name a folder or, for the model, a hub id.")
        for option, share in (
            ("subspace.threshold", self.subspace.threshold),
            ("subspace.gate_threshold", self.subspace.gate_threshold),
        ):
            if not 0 < share <= 1:
                raise GainLoRAError(f"{option}: {share} is no share of energy; give a number in (0, 1].")
        micro = self.train.micro_batch_size
        if micro is not None and self.train.batch_size % micro:
            raise GainLoRAError(
                f"train.micro_batch_size: {micro} does not divide train.batch_size ({self.train.batch_size})."
            )
        names = self.order.tasks
        if not names:
            raise GainLoRAError(f"orders.{self.order.name}.tasks: empty; name at least one task folder.")
        for name in (self.order.name, *names):  # they become parts of paths
            if not is_name(name):
                raise GainLoRAError(
                    f"orders.{self.order.name}: {name!r} is no name of an order or task; use letters, digits, _ - and ."
                )
        for name in names:
            if names.count(name) > 1:
                raise GainLoRAError(f"orders.{self.order.name}.tasks: {name!r} appears more than once.")

    @property
    def rule(self) -> rules.BranchRule:
        """The branch rule."""
        return rules.get(self.method)

    @property
    def gated(self) -> bool:
        """Whether branches are weighed by gates (`gainlora-*`) or all by 1."""
        return self.method.startswith("gainlora-")

    def check_processes(self, count: int) -> None:
        """Refuse more processes than a step has examples, and several that each would take all GPUs."""
        if count > 1 and self.model.device_map:
            raise GainLoRAError(
                f"launch.num_processes: {count} processes cannot each use all GPUs; set model.device_map to null, and "
                "launch.config to configs/fsdp.yaml where the base does not fit into one."
            )
        if count > self.train.batch_size:
            raise GainLoRAError(
                f"launch.num_processes: {count} cannot share the {self.train.batch_size} examples of train.batch_size; "
                "start fewer."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` is the inverse."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def from_dict(values: Mapping[str, Any]) -> Config:
    """The Config of `Config.to_dict()`'s output, as a run's config.json holds it."""
    return typing.cast(Config, build(Config, values, ""))
