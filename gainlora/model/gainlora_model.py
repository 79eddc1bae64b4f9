"""GainLoRAModel: a frozen transformers model, one LoRA branch and one gate per task.

    prompt --frozen embeddings, mean over its tokens--> p_0 --gates--> a (B, T)
    prompt --base model, every adapted layer adds s * sum_i a_i B_i A_i h--> logits

Coefficients are computed once per sample, from the prompt alone, and shared by all layers. In generation
they are computed at the start and kept for every new token, so no task id is ever needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gainlora.errors import GainLoRAError
from gainlora.model.base import Inputs, find_targets, trace_inputs
from gainlora.model.gate import Gate, GateWeights, Score, widths
from gainlora.model.layers import GatedLoRALinear, Integration
from gainlora.model.subspace import Basis, empty_basis


@dataclass(frozen=True)
class GainLoRAConfig:
    """What defines the adapter; saved as adapter_config.json."""

    base_model: str
    """Folder or hub id of the base model."""
    rank: int
    alpha: float
    targets: tuple[str, ...] | None = None
    """Last parts of the adapted layers' names; None: query and value projections."""
    integration: Literal["gated", "equal", "single"] = "gated"
    """Coefficients: of the gates; all 1; 1 for the branch of `GainLoRAModel.task` alone."""
    gate_hidden: int = 50
    gate_depth: int = 2
    gate_score: Score = "cosine"
    covariance_blocks: int = 1
    tasks: tuple[str, ...] = ()
    """Tasks learned so far, in order."""
    horizon: int = 1
    """H of the threshold schedule that the bases were built with."""
    base_digest: str | None = None
    """`gainlora.model.base.weights_digest` of the base model; None: not known."""

    def __post_init__(self) -> None:
        for name in ("rank", "gate_hidden", "gate_depth", "covariance_blocks", "horizon"):
            if getattr(self, name) < 1:
                raise GainLoRAError(f"{name}: {getattr(self, name)} is too small; give at least 1.")
        if not 0 < self.alpha < float("inf"):
            raise GainLoRAError(f"alpha: {self.alpha} must be a finite number above 0.")

    @property
    def gated(self) -> bool:
        """Whether there are gates."""
        return self.integration == "gated"

    def check_mergeable(self) -> None:
        """Whether W + s * sum_i B_i A_i stands for the model on every prompt.

        Raises:
            GainLoRAError: it does not, as coefficients are not all 1.
        """
        if self.integration == "equal":
            return
        why = {
            "gated": "its gates give every branch a coefficient that depends on the prompt, so no one weight stands "
            "for all prompts; serve the model as it is",
            "single": "every task has a branch of its own, and which one counts is told with the prompt",
        }[self.integration]
        raise GainLoRAError(f"merge: {why}; or take one branch out, with coefficient 1: `gainlora export --branch`.")


class GainLoRAModel(nn.Module):
    """Wraps `base`, whose target layers it replaces in place.

    Args:
        base: a transformers encoder-decoder or causal language model.
        config: the adapter's shape.
    """

    def __init__(self, base: Any, config: GainLoRAConfig) -> None:
        super().__init__()
        base.requires_grad_(False)
        _tell_transformers()
        self.config = config
        self.integration = Integration(config.integration != "equal")
        targets = find_targets(base, config.targets)
        self.inputs: dict[str, Inputs] = trace_inputs(base, targets)
        self.layers: dict[str, GatedLoRALinear] = {}  # name in the base -> the layer that took its place
        for name in targets:
            parent, _, child = name.rpartition(".")
            layer = GatedLoRALinear(base.get_submodule(name), config.rank, config.alpha / config.rank, self.integration)
            setattr(base.get_submodule(parent), child, layer)
            self.layers[name] = layer
        # Logits are asked for at the last positions only, a strided slice: a linear layer copies its whole weight
        # once per sample for it. In one block of rows it is a plain product.
        base.get_output_embeddings().register_forward_pre_hook(_contiguous)
        self.base = base
        self.encoder_decoder: bool = base.config.is_encoder_decoder
        self.gate: Gate | None = None  # the gate being learned
        self.gates: GateWeights | None = None  # frozen gates of learned tasks
        self.task: int | None = None  # integration `single`: 0-based index of the only branch that counts
        shape = widths(self.width, config.gate_hidden, config.gate_depth)
        # M_1..M_{L+1}: what each gate layer saw on learned tasks; M_{L+1} is the key's
        self.gate_memory: list[Tensor] = [torch.zeros(d, 0, device=self.device) for d in shape]
        self.layer_memory: dict[str, Basis] = {
            group: empty_basis(
                self.layers[group].base.in_features, config.covariance_blocks, self.layers[group].A.device
            )
            for group in self.groups
        }

        self.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.gates is not None:
            self.gates = self.gates.to(self.device)
        self.gate_memory = [m.to(self.device) for m in self.gate_memory]
        self.layer_memory = {
            g: tuple(u.to(self.layers[g].A.device) for u in basis) for g, basis in self.layer_memory.items()
        }
        return self

    @property
    def device(self) -> torch.device:
        return cast(Tensor, self.base.get_input_embeddings().weight).device

    @property
    def generation_config(self) -> Any:
        """transformers' settings of `generate`, the base model's."""
        return self.base.generation_config

    def can_generate(self) -> bool:
        """For transformers' pipelines."""
        return True

    @property
    def width(self) -> int:
        """d, the width of the token embeddings."""
        return int(self.base.get_input_embeddings().weight.shape[1])

    @property
    def groups(self) -> list[str]:
        """Names of the inputs that adapted layers see, each once."""
        return list(dict.fromkeys(inputs.group for inputs in self.inputs.values()))

    @property
    def branches(self) -> int:
        """T, the number of branches, the one being learned included."""
        return next(iter(self.layers.values())).branches

    def get_base_model(self) -> Any:
        """The transformers model, its adapted layers in place."""
        return self.base

    @torch.no_grad()
    def merge_and_unload(self) -> Any:
        """The transformers model with all branches added to its weights, W + s * sum_i B_i A_i; this one is used up.

        Raises:
            GainLoRAError: see `GainLoRAConfig.check_mergeable`.
        """
        self.config.check_mergeable()
        for name, layer in self.layers.items():
            change = layer.scaling * layer.B @ layer.A  # (d_out, d_in)
            layer.base.weight += change.to(layer.weight.dtype)
            parent, _, child = name.rpartition(".")
            setattr(self.base.get_submodule(parent), child, layer.base)
        return self.base

    def trainable_parameters(self) -> int:
        """Number of parameters that train now."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """As peft prints it."""
        trainable, total = self.trainable_parameters(), sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # -- coefficients ---------------------------------------------------------------------------------------

    def pool(self, input_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """p_0 (B, d), float32: mean of the frozen embeddings over the prompt's real tokens.

        Args:
            input_ids: (B, S).
            prompt_mask: (B, S), 1 on the prompt's tokens, 0 on padding and label tokens.
        """
        embedded = self.base.get_input_embeddings()(input_ids).detach()  # (B, S, d)
        dtype = torch.promote_types(embedded.dtype, torch.float32)
        mask = prompt_mask.to(dtype).unsqueeze(-1)  # (B, S, 1)
        return (embedded.to(dtype) * mask).sum(1) / mask.sum(1).clamp_min(1)

    def coefficients(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """a (B, T) of every branch for each prompt, or None with equal integration.

        Args:
            input_ids: (B, S). attention_mask: (B, S), 1 on the prompt's real tokens.

        Raises:
            GainLoRAError: integration `single`, and `task` does not name a branch.
        """
        if self.config.integration == "equal" or not self.branches:
            return None
        if self.config.integration == "single":
            if self.task is None or not 0 <= self.task < self.branches:
                raise GainLoRAError(f"model.task: {self.task}: name one of the {self.branches} branches, from 0.")
            chosen = torch.zeros(len(input_ids), self.branches, device=self.device)
            chosen[:, self.task] = 1
            return chosen
        pooled = self.pool(input_ids, attention_mask)
        parts = []
        if self.gates is not None:
            parts.append(self.gates.coefficients(pooled, self.config.gate_score))
        if self.gate is not None:
            parts.append(self.gate(pooled).unsqueeze(1))
        return torch.cat(parts, dim=1)

    def prompt_mask(self, attention_mask: Tensor, labels: Tensor | None) -> Tensor:
        """1 on the prompt's real tokens (B, S). A decoder-only model's label tokens are not prompt."""
        if self.encoder_decoder or labels is None:
            return attention_mask
        return attention_mask * (labels == -100)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's output under all branches.

        Args:
            input_ids: (B, S). attention_mask: (B, S), 0 on padding.
            labels: the answers, -100 on everything else. Encoder-decoder: (B, S_target), fed to the decoder shifted
                by one. Decoder-only: (B, S); they tell the answer from the prompt. No loss is computed here.
        """
        self.integration.coefficients = self.coefficients(input_ids, self.prompt_mask(attention_mask, labels))
        if self.encoder_decoder and labels is not None:
            kwargs["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(labels=labels)
        output = self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if not torch.is_grad_enabled():  # with gradients, checkpointing needs them again in backward
            self.integration.coefficients = None
        return output

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """transformers' `generate` under all branches. Decoder-only prompts are padded on the left."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.integration.coefficients = self.coefficients(input_ids, attention_mask)
        try:
            return cast(Tensor, self.base.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs))
        finally:
            self.integration.coefficients = None

    # -- the life of a branch -------------------------------------------------------------------------------

    def start_branch(self, branch: Mapping[str, tuple[Tensor, Tensor]], train_A: bool, gate: Gate | None) -> None:
        """Begin a task: (A (r, d_in), B (d_out, r)) per layer, and its gate if integration is gated."""
        assert self.gate is None and (gate is not None) == self.config.gated
        for name, layer in self.layers.items():
            layer.start_branch(*branch[name], train_A)
        self.gate = gate.to(self.device) if gate else None

    def freeze_branch(self, task: str) -> None:
        """End a task: fold its gate and stack its branch with the frozen ones."""
        for layer in self.layers.values():
            layer.freeze_branch()
        if self.gate is not None:
            folded = self.gate.fold()
            self.gates = folded if self.gates is None else self.gates.append(folded)
            self.gate = None
        self.config = replace(self.config, tasks=(*self.config.tasks, task))

    def pop_branch(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Take the newest frozen branch out, to train it on (rules with one shared branch)."""
        return {name: layer.pop_branch() for name, layer in self.layers.items()}

    # -- files ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter's files (`gainlora/model/files.py` lists them)."""
        from gainlora.model.files import save_adapter

        save_adapter(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: Any = None, dtype: str = "auto") -> GainLoRAModel:
        """Load a learned adapter and its base model.

        Args:
            folder: a run folder (its last finished task counts), a task folder of it, adapters/<order>, what else
                `save_pretrained` wrote, or a hub id that `gainlora push` wrote to.
            base: an already loaded base model; None loads the one that the adapter names.
            dtype: of the base, when it is loaded here: auto, float32 or bfloat16.

        Raises:
            GainLoRAError: a file is missing, or does not belong to this base model.
        """
        from gainlora.model.files import find_adapter, load_adapter

        return load_adapter(cls, find_adapter(folder), base, dtype)


@cache
def _tell_transformers() -> None:
    """Without it pipeline("text-generation") works and calls the model unsupported."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.register(GainLoRAConfig, GainLoRAModel)


def _contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(),)
