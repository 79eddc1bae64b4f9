"""How much memory a run's phases need, counted on a copy of its model without weights (torch's meta device).

Counted are all tensors that live at once: weights, adapter, gradients, optimizer state, activations, caches, and one
batch of the longest examples. A GPU's library workspaces and the allocator's gaps come on top.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gainlora.config import RunConfig
from gainlora.data.collate import collate
from gainlora.model.adapter_config import GainLoRAConfig
from gainlora.model.base import auto_class
from gainlora.model.gate import Gate, GateWeights, widths
from gainlora.model.modeling import GainLoRAModel

VALUES = {"_local_scalar_dense": 1, "is_nonzero": True, "equal": True}
"""What reads a value gets: there is none on the meta device. No padding, then."""


class WithoutValues(TorchDispatchMode):
    """Operations on the meta device, where what reads a value gets 1; a fused attention stays one operation."""

    def __enter__(self) -> Any:
        self._attention = patch.object(F, "scaled_dot_product_attention", self._attend)
        self._attention.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in VALUES and args[0].is_meta:
            return VALUES[name]
        return self.observe(func, args, func(*args, **(kwargs or {})))

    def observe(self, func: Any, args: Any, made: Any) -> Any:
        """Look at an operation that is done."""
        return made

    def attended(self, operands: list[Tensor], products: float) -> None:
        """A fused attention is done: its operands and results, and its multiplications."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, is_causal: bool = False, **__: Any) -> Tensor:
        made: Tensor = _Attention.apply(q, k, v, (0.5 if is_causal else 1.0) * 2 * q.nelement() * k.shape[-2], self)
        return made


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, products: float, mode: WithoutValues) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        ctx.products, ctx.mode = products, mode
        mode.attended([q, k, v, out], products)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors
        made = [torch.empty_like(t) for t in saved[:3]]
        ctx.mode.attended([*saved, grad, *made], 2.5 * ctx.products)  # computes the scores again
        return *made, None, None


class Peak(WithoutValues):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.most, self._known = 0, 0, set[int]()

    def observe(self, func: Any, args: Any, made: Any) -> Any:
        """Count new storages, until they are freed."""
        old = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}  # views of weights
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in old:
                    self._known.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.bytes)
        return made

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def without_weights(base_config: Any, dtype: torch.dtype) -> Any:
    """The transformers model of a configuration, on the meta device."""
    with torch.device("meta"):
        model = auto_class(base_config).from_config(base_config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = 0  # any
    return model


def learning_model(config: RunConfig, base: Any, tasks: int) -> GainLoRAModel:
    """A GainLoRAModel on the meta device that learns the last of `tasks` tasks."""
    lora = config.lora
    integration: Literal["gated", "equal"] = "gated" if config.gated else "equal"
    shape = (config.gate.hidden, config.gate.depth)
    adapter = GainLoRAConfig("", lora.rank, lora.alpha, lora.targets, integration, *shape)
    model, older = GainLoRAModel(base, adapter), 0 if config.rule.shared else tasks - 1
    with torch.device("meta"):
        branch = {}
        for name, layer in model.layers.items():
            r, d_in, d_out = layer.rank, layer.in_features, layer.out_features
            layer.stack(torch.empty(older * r, d_in), torch.empty(d_out, older * r))
            branch[name] = torch.empty(r, d_in), torch.empty(d_out, r)
        d = widths(model.width, *shape)

        def gates(count: int) -> GateWeights:
            hidden = [torch.empty(count, outputs, inputs) for inputs, outputs in itertools.pairwise(d)]
            return GateWeights(hidden, torch.empty(count, model.width))

        model.gates = gates(older) if config.gated and older else None
        gate = Gate(gates(1), [torch.empty(width, 0) for width in d], config.gate.score) if config.gated else None
    model.start_branch(branch, config.rule.train_A, gate)
    return model


def estimate(config: RunConfig, base_config: Any, dtype: torch.dtype) -> dict[str, int]:
    """Phase -> bytes at its peak, for the last task of the order: train, update (covariances) and evaluate."""
    from gainlora.training.steps import PASS_BATCH
    from gainlora.training.train import target_loss

    with WithoutValues():
        model = learning_model(config, without_weights(base_config, dtype), len(config.order.tasks))
    layers = model.layers.values()
    stacks = [*(layer.stacked_B for layer in layers), *(group.A for group in {layer.group for layer in layers})]
    weights = sum(tensor.nbytes for tensor in (*model.base.parameters(), *stacks))
    learned = [p for p in model.parameters() if p.requires_grad]
    covariances = sum(model.layers[g].in_features ** 2 for g in model.groups) * 4 // config.subspace.covariance_blocks

    def peak(size: int, work: Callable[[dict[str, Tensor]], Any]) -> int:
        row = {"prompt_ids": [3] * config.data.max_prompt_tokens, "target_ids": [3] * config.data.max_target_tokens}
        batch = collate([row] * size, 0, model.encoder_decoder, targets=True)
        with Peak() as counted:
            work(batch)
        return counted.most

    def train(batch: dict[str, Tensor]) -> None:
        target_loss(model, batch, model.encoder_decoder).backward()

    def forward(batch: dict[str, Tensor], cache: bool) -> None:
        placed = {name: tensor.to("meta") for name, tensor in batch.items()}
        least = {} if model.encoder_decoder else {"logits_to_keep": 1}
        with torch.no_grad():
            model(**placed, use_cache=cache, **least)

    model.train()
    if config.train.gradient_checkpointing:
        model.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    optimizer = 2 * sum(p.nbytes for p in learned)
    found = {"train": peak(config.train.micro_batch_size or config.train.batch_size, train) + optimizer}
    model.eval()
    if config.rule.input_memory:
        found["update"] = peak(PASS_BATCH, lambda batch: forward(batch, cache=False)) + covariances
    found["evaluate"] = peak(config.evaluate.batch_size, lambda batch: forward(batch, cache=True))
    return {phase: size + weights for phase, size in found.items()}
