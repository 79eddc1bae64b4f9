"""GainLoRAModel: a frozen transformers model, one LoRA branch and one gate per task.

    prompt --frozen embeddings, mean over its tokens--> p_0 --gates--> a (B, T)
    prompt --base model, every adapted layer adds s * sum_i a_i B_i A_i h--> logits

Coefficients are computed once per sample, from the prompt alone, and shared by all layers. Generation
computes them once and reuses them for every new token. No task id is needed.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gainlora.errors import GainLoRAError
from gainlora.model.adapter_config import GainLoRAConfig
from gainlora.model.gate import Gate, GateWeights, widths
from gainlora.model.layers import GatedLoRALinear, Group, Integration, update_casts
from gainlora.model.precision import float32_products
from gainlora.model.router import Router
from gainlora.model.subspace import Basis, empty_basis
from gainlora.model.targets import Inputs, find_targets, group_layers_by_input

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Of a base model's weights."""


class GainLoRAModel(nn.Module):
    """Wraps `base`, whose target layers it replaces in place.

    Args:
        base: a transformers encoder-decoder or causal language model.
        config: the adapter's shape.
    """

    def __init__(self, base: Any, config: GainLoRAConfig) -> None:
        super().__init__()
        if any(isinstance(module, GatedLoRALinear) for module in base.modules()):
            raise GainLoRAError("base: this model holds the branches of another learner; load it anew.")
        base.requires_grad_(False)
        _tell_transformers()
        self.config = config
        self.integration = Integration(config.integration != "equal")
        self.inputs: dict[str, Inputs] = group_layers_by_input(base, targets := find_targets(base, config.targets))
        self.layers: dict[str, GatedLoRALinear] = {}  # name in the base -> the layer that replaced it
        for name in filter(self.inputs.__contains__, targets):
            parent, _, child = name.rpartition(".")
            layer = GatedLoRALinear(base.get_submodule(name), config.rank, config.alpha / config.rank, self.integration)
            if layer.weight.dtype not in DTYPES:
                raise GainLoRAError(
                    f"model: {name} holds {str(layer.weight.dtype).removeprefix('torch.')} weights: a float16 base "
                    "overflows in training, and branches cannot be added to a quantized one; load it in float32 or "
                    "bfloat16."
                )
            setattr(base.get_submodule(parent), child, layer)
            self.layers[name] = layer
        together: dict[tuple[str, str], list[GatedLoRALinear]] = {}  # of one module, on one input
        for name, layer in self.layers.items():
            together.setdefault((name.rpartition(".")[0], self.inputs[name].group), []).append(layer)
        self._groups = [Group(layers) for layers in together.values()]
        # Logits are needed at the last positions only, a strided slice, for which a linear layer copies its weight once
        # per sample. Contiguous rows make it a plain product.
        if (output := base.get_output_embeddings()) is not None:
            output.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
        self.base = base
        self._accepted = frozenset(signature(base.forward).parameters)
        self.encoder_decoder: bool = base.config.is_encoder_decoder
        self.gate: Gate | None = None  # the gate being learned
        self.gates: GateWeights | None = None  # frozen gates of learned tasks
        self._compiled: Any = None  # the base's forward for training, see `compile_base`
        self.tf32 = False  # on GPUs, float32 products of the base as TF32; branches, gates and bases stay exact
        self.task: int | None = None  # integration `single`: 0-based index of the branch to use
        self.router: Router | None = None
        if config.integration == "routed":
            self.router = Router(base.config.get_text_config().hidden_size, self.device)
        shape = widths(self.width, config.gate_hidden, config.gate_depth)
        # M_1..M_{L+1}: bases of each gate layer's inputs on learned tasks; M_{L+1} is the key's
        self.gate_memory: list[Tensor] = [torch.zeros(d, 0, device=self.device) for d in shape]
        self.layer_memory: dict[str, Basis] = {
            group: empty_basis(self.layers[group].in_features, config.covariance_blocks, self.layers[group].A.device)
            for group in self.groups
        }

        self.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.gates is not None:
            self.gates = self.gates.to(self.device)
        if self.router is not None:
            self.router = self.router.to(self.device)
        self.gate_memory = [m.to(self.device) for m in self.gate_memory]
        for group, basis in self.layer_memory.items():
            self.layer_memory[group] = tuple(u.to(self.layers[group].A.device) for u in basis)
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
        """Names of the adapted layers' distinct inputs."""
        return list(dict.fromkeys(inputs.group for inputs in self.inputs.values()))

    @property
    def branches(self) -> int:
        """T, the number of branches, including the one being learned."""
        return next(iter(self.layers.values())).branches

    def get_base_model(self) -> Any:
        """The transformers model, its adapted layers in place."""
        return self.base

    @torch.no_grad()
    def merge_and_unload(self) -> Any:
        """The transformers model with all branches added to its weights, W + s * sum_i B_i A_i. Invalidates self.

        Raises:
            GainLoRAError: see `GainLoRAConfig.check_mergeable`; or two modules share an adapted weight.
        """
        self.config.check_mergeable()
        self._check_weights_unshared()
        for name, layer in self.layers.items():
            change = layer.scaling * layer.B @ layer.A  # (d_out, d_in)
            layer.base.weight += (change if isinstance(layer.base, nn.Linear) else change.T).to(layer.weight.dtype)
            parent, _, child = name.rpartition(".")
            setattr(self.base.get_submodule(parent), child, layer.base)
        return self.base

    def _check_weights_unshared(self) -> None:
        """A weight that two modules share (Zamba2's attention blocks) cannot hold the branches of one of them."""
        users: dict[Tensor, list[str]] = {}
        for name, parameter in self.base.named_parameters(remove_duplicate=False):
            users.setdefault(parameter, []).append(name.replace(".base.", "."))
        for name, layer in self.layers.items():
            if len(shared := users[layer.base.weight]) > 1:
                raise GainLoRAError(
                    f"merge: {name} shares its weight with {len(shared) - 1} other layers of the base model, each with "
                    "its own branches, so no single weight is equivalent; serve the model unmerged, or export it."
                )

    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @contextmanager
    def branches_off(self) -> Iterator[None]:
        """The base model alone, during the block."""
        self.integration.off = True
        try:
            yield
        finally:
            self.integration.off = False

    def base_products(self) -> AbstractContextManager[None]:
        """For passes through the base, forward and backward: its products as TF32 if `tf32` is set."""
        return float32_products("ieee", "tf32") if self.tf32 else nullcontext()

    def compile_base(self, backend: str = "inductor") -> None:
        """Compile the base with its branches for passes with gradients, by torch.compile, as they are now: again after
        `start_branch`. All that torch has compiled in this process is dropped, since its number is limited. Not with
        `tf32`: compiled products have one precision."""
        torch.compiler.reset()
        self._compiled = torch.compile(self.base.forward, dynamic=True, backend=backend)

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

    @torch.no_grad()
    def prompt_features(self, input_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Mean (B, d), float32, of the base model's last hidden states over the prompt's tokens, without branches.

        Args: of `pool`.
        """
        extra: dict[str, Any] = {"output_hidden_states": True, "use_cache": False}
        if self.encoder_decoder:
            extra["decoder_input_ids"] = self._decoder_inputs(input_ids[:, :1])
        elif "position_ids" in self._accepted:
            extra["position_ids"] = (prompt_mask.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in self._accepted:
            extra["logits_to_keep"] = 1
        with self.branches_off(), self.base_products():
            output = self.base(input_ids=input_ids, attention_mask=prompt_mask, **extra)
        hidden = output.encoder_last_hidden_state if self.encoder_decoder else output.hidden_states[-1]
        mask = prompt_mask.unsqueeze(-1).float()  # (B, S, 1)
        return (hidden.float() * mask).sum(1) / mask.sum(1).clamp_min(1)

    def coefficients(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """a (B, T) of every branch for each prompt, or None with equal integration or without branches.

        Args:
            input_ids: (B, S). attention_mask: (B, S), 1 on the prompt's real tokens.

        Raises:
            GainLoRAError: integration `single`, and `task` does not name a branch.
        """
        if self.config.integration == "equal" or not self.branches or self.integration.off:
            return None
        if self.router is not None and self.router.branches == self.branches:
            return self.router.coefficients(self.prompt_features(input_ids, attention_mask))
        if not self.config.gated:
            chosen = self.task if self.router is None else self.branches - 1  # the branch being learned
            if chosen is None or not 0 <= chosen < self.branches:
                raise GainLoRAError(f"model.task: {chosen}: name one of the {self.branches} branches, from 0.")
            a = torch.zeros(len(input_ids), self.branches, device=self.device)
            a[:, chosen] = 1
            return a
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
            labels: the answers, -100 elsewhere. Encoder-decoder: (B, S_target), fed to the decoder shifted
                by one, after the token from which generation starts. Decoder-only: (B, S); they separate the answer
                from the prompt. No loss is computed here.
            kwargs: for the base model; position_ids and logits_to_keep work for models that do not accept them, too.
        """
        self.integration.coefficients = self.coefficients(input_ids, self.prompt_mask(attention_mask, labels))
        if self.encoder_decoder and labels is not None:
            kwargs["decoder_input_ids"] = self._decoder_inputs(labels)
        if "position_ids" not in self._accepted:  # positions from the mask, or none (ALiBi, state spaces)
            kwargs.pop("position_ids", None)
        keep = 0 if "logits_to_keep" in self._accepted else kwargs.pop("logits_to_keep", 0)
        run = self.base
        update_casts(self._groups)
        if self._compiled is not None and torch.is_grad_enabled():
            run = self._compiled
            for layer in self.layers.values():
                layer.group.weights(layer.weight, layer.weight.dtype)
        with self.base_products():
            output = run(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if keep:
            output.logits = output.logits[:, -keep:]
        if not torch.is_grad_enabled():  # kept for backward: gradient checkpointing needs them again
            self.integration.coefficients = None
        return output

    def _decoder_inputs(self, labels: Tensor) -> Tensor:
        """The labels (B, S_target) shifted right by one, after the token from which `generate` starts."""
        settings = self.base.generation_config
        start, pad = settings.decoder_start_token_id, settings.pad_token_id
        shifted = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), dim=1)
        return shifted.masked_fill(shifted == -100, start if pad is None else pad)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """transformers' `generate` under all branches. Decoder-only prompts are padded on the left."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.integration.coefficients = self.coefficients(input_ids, attention_mask)
        try:
            with self.base_products():
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
        """Remove the newest frozen branch, to train it further (rules with one shared branch)."""
        return {name: layer.pop_branch() for name, layer in self.layers.items()}

    # -- files ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter's files (`gainlora/model/adapter_io.py` lists them)."""
        from gainlora.model.adapter_io import save_adapter

        save_adapter(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: Any = None, dtype: str = "auto", device_map: str | None = None
    ) -> "GainLoRAModel":
        """Load a learned adapter and its base model.

        Args:
            folder: a run folder (for its last finished task), a task folder, adapters/<order>, any folder written by
                `save_pretrained`, or a hub id written by `gainlora push`.
            base: an already loaded base model; None loads the one that the adapter names.
            dtype: of the base, if it is loaded here: auto, float32 or bfloat16.
            device_map: `auto` spreads the base over the GPUs, if it is loaded here; None: the first GPU.

        Raises:
            GainLoRAError: a file is missing, or does not belong to this base model.
        """
        from gainlora.model.adapter_io import find_adapter, load_adapter

        return load_adapter(cls, find_adapter(folder), base, dtype, device_map)


@cache
def _tell_transformers() -> None:
    """Without it pipeline("text-generation") warns that the model is unsupported."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.register(GainLoRAConfig, GainLoRAModel)
