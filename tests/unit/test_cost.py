"""What a further branch costs, counted exactly: operations, sizes of tensors, bytes kept for backward."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gainlora.learning.trainer import target_loss
from gainlora.model.gainlora_model import GainLoRAConfig, GainLoRAModel
from gainlora.model.gate import Gate, GateWeights, first_hidden, widths
from tests.tiny import tiny_llama, tiny_t5

RANK, HIDDEN, BATCH, LENGTH = 2, 6, 4, 9
both = pytest.mark.parametrize("make", [tiny_llama, tiny_t5])


def learning(base, branches):
    """A gated model with branches - 1 frozen branches and one that trains, A and B."""
    model = GainLoRAModel(base, GainLoRAConfig("tiny", RANK, 4, gate_hidden=HIDDEN))
    generator = torch.Generator().manual_seed(0)
    shape = widths(model.width, HIDDEN, 2)
    for task in range(branches):
        start = GateWeights(first_hidden(shape, generator), torch.randn(1, shape[-1], generator=generator))
        gate = Gate(start, model.gate_memory, "cosine")
        model.start_branch(
            {
                name: (torch.randn(RANK, layer.base.in_features), torch.randn(layer.base.out_features, RANK))
                for name, layer in model.layers.items()
            },
            True,
            gate,
        )
        if task < branches - 1:
            model.freeze_branch(f"task{task}")
    return model


def batch(model, length=LENGTH):
    ids = torch.randint(3, 40, (BATCH, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if not model.encoder_decoder:
        labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(model, length=LENGTH):
    return target_loss(model, batch(model, length), model.encoder_decoder)


@both
def test_operations_grow_by_the_branches_own_products(make):
    def count(branches):
        model, growth = learning(make(), branches), []

        def products(module, args):
            """Of one more branch: A x and B h; in backward B^T e and, where x has a gradient, A^T h."""
            d_out, d_in = module.weight.shape
            tokens = args[0].shape[0] * args[0].shape[1]
            growth.append(2 * tokens * RANK * (d_in + 2 * d_out + d_in * args[0].requires_grad))

        for layer in model.layers.values():
            layer.register_forward_pre_hook(products)
        with FlopCounterMode(display=False) as counter:
            loss_of(model).backward()
        gate = 2 * BATCH * sum(a * b for a, b in ((model.width, HIDDEN), (HIDDEN, model.width)))
        return counter.get_total_flops(), sum(growth) + gate

    one, branch = count(1)
    assert branch > 0
    for branches in (5, 15):
        assert count(branches) == (one + (branches - 1) * branch, branch)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@both
def test_no_tensor_holds_every_branchs_output(make):
    branches = 15
    model = learning(make(), branches)
    narrowest = min(min(layer.weight.shape) for layer in model.layers.values())
    with Largest() as step:
        loss_of(model).backward()
    with Largest() as generation:
        inputs = batch(model)
        model.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=2)
    stacked = branches * BATCH * LENGTH * narrowest  # (T, B, S, d)
    assert 0 < max(step.numel, generation.numel) < stacked
    with Largest() as naive:
        torch.stack([torch.zeros(BATCH, LENGTH, narrowest) for _ in range(branches)])
    assert naive.numel == stacked


@both
def test_what_is_kept_for_backward_grows_by_coefficients_alone(make):
    def kept(branches, length):
        model = learning(make(), branches)
        stacks = [t for layer in model.layers.values() for t in (layer.A, layer.B)]
        gates = [] if model.gates is None else [*model.gates.hidden, model.gates.key]
        weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *stacks, *gates]}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model, length)
        assert math.isfinite(loss.item())
        return sum(size for _, size in storages.values()), len(model.layers)

    for length in (LENGTH, 3 * LENGTH):
        (one, layers), (fifteen, _) = kept(1, length), kept(15, length)
        columns = 14 * RANK
        # per layer the columns' coefficients (float32) and which branch each is of (int64)
        assert fifteen - one <= layers * columns * (4 * BATCH + 8)
