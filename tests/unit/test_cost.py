"""What a further branch costs, counted exactly: operations, and bytes kept for backward."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gainlora.model.layers import ALIGNED
from gainlora.training.train import target_loss
from tests.tiny import tiny_adapter, tiny_llama, tiny_t5

RANK, HIDDEN, BATCH, LENGTH = 2, 6, 4, 9
IN_PLACE = {torch.ops.aten.addmm_: lambda e, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch does not count it
both = pytest.mark.parametrize("make", [tiny_llama, tiny_t5])


def batch(model, length=LENGTH):
    ids = torch.randint(3, 40, (BATCH, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if not model.encoder_decoder:
        labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(model, length=LENGTH):
    return target_loss(model, batch(model, length), model.encoder_decoder)


def gate_operations(base):
    width = base.get_input_embeddings().weight.shape[1]
    return 2 * BATCH * 2 * width * HIDDEN


@both
def test_operations_grow_by_the_branches_own_products(make):
    def count(branches):
        model, growth = tiny_adapter(make(), branches, learning=True), []

        def products(module, args):
            """Of one more branch: A x and B h; in backward B^T e and, where x has a gradient, A^T h."""
            d_out, d_in = module.weight.shape
            tokens = args[0].shape[0] * args[0].shape[1]
            growth.append(2 * tokens * RANK * (d_in + 2 * d_out + d_in * args[0].requires_grad))

        for layer in model.layers.values():
            layer.register_forward_pre_hook(products)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            loss_of(model).backward()
        return counter.get_total_flops(), sum(growth) + gate_operations(model.base)

    full = ALIGNED // RANK  # branches that leave no column of padding
    first, branch = count(full)
    assert branch > 0
    for branches in (2 * full, 4 * full):
        assert count(branches) == (first + (branches - full) * branch, branch)
    assert count(2 * full - 1) == (first + full * branch - gate_operations(make()), branch)  # padding counts


@both
def test_what_is_kept_for_backward_does_not_grow(make):
    def kept(branches, length):
        model = tiny_adapter(make(), branches, learning=True)
        stacks = [t for layer in model.layers.values() for t in (layer.group.A, layer.stacked_B)]
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
        return sum(size for _, size in storages.values())

    for length in (LENGTH, 3 * LENGTH):
        assert kept(15, length) == kept(1, length)
