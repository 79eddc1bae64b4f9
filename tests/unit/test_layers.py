"""The fused layer against its definition, autograd and peft."""

import pytest
import torch
from torch import nn

from gainlora.errors import GainLoRAError
from gainlora.model.branches import Branches, Weights
from gainlora.model.layers import GatedLoRALinear, Group, Integration
from tests.fake_gpu import FakeGPU
from tests.tiny import tiny_llama, tiny_t5


def make_layer(branches, gated=True, rank=3, d_in=10, d_out=7):
    torch.manual_seed(branches)
    layer = GatedLoRALinear(nn.Linear(d_in, d_out, bias=False), rank, 1.7, Integration(gated))
    layer.base.requires_grad_(False)
    for _ in range(branches):
        layer.start_branch(torch.randn(rank, d_in), torch.randn(d_out, rank), train_A=True)
        layer.freeze_branch()
    return layer


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_layer_is_the_sum_over_branches(learning, gated):
    layer = make_layer(3, gated)
    A, B = layer.A.unflatten(0, (3, 3)), layer.B.unflatten(1, (3, 3)).transpose(0, 1)
    if learning:
        layer.start_branch(*layer.pop_branch(), train_A=False)
    x, a = torch.randn(4, 5, 10), torch.rand(4, 3)
    layer.integration.coefficients = a if gated else None
    expected = layer.base(x)
    for i in range(3):
        scale = a[:, i, None, None] if gated else 1
        expected = expected + 1.7 * scale * (x @ A[i].T @ B[i].T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("train_A", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients(count, gated, train_A):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, A, Bs = rand(2, 3, 6).requires_grad_(), rand(count, 8, 6), [rand(8, 5) for _ in range(count)]
    new = slice(4, 6)  # of 8 columns, the last two are padding
    newest, old, es = rand(2).requires_grad_(gated), rand(2, 1, 1, 1, 4), [rand(2, 3, 5) for _ in range(count)]
    for padded in (A.transpose(0, 1), *Bs):
        padded[6:] = 0
    new_As = [a[new].requires_grad_(train_A) for a in A.detach()]  # views, as the layer's parameters are
    new_Bs = [b.detach()[new].T.requires_grad_() for b in Bs]

    def f(x, newest, *parameters):
        c = 0.7
        if gated:
            c = torch.cat((old, newest.detach().view(2, 1, 1, 1, 1).expand(2, 1, 1, 1, 2), rand(2, 1, 1, 1, 2)), dim=-1)
        outputs = [e.clone() for e in es]
        weights = Weights(A, Bs, Bs, None)
        return Branches.apply(x, newest, c, weights, 4, count, *outputs, *parameters)

    assert torch.autograd.gradcheck(f, (x, newest, *new_As, *new_Bs))


def test_coefficients_repeat_for_beams_and_refuse_other_batches():
    layer = make_layer(2)
    x, a = torch.randn(2, 5, 10), torch.rand(2, 2)
    layer.integration.coefficients = a.repeat_interleave(3, dim=0)
    expected = layer(x.repeat_interleave(3, dim=0))
    layer.integration.coefficients = a
    torch.testing.assert_close(layer(x.repeat_interleave(3, dim=0)), expected)
    with pytest.raises(GainLoRAError, match="batch of 5"):
        layer(torch.randn(5, 5, 10))


@pytest.mark.parametrize("make, targets", [(tiny_llama, ["q_proj", "v_proj"]), (tiny_t5, ["q", "v"])])
def test_one_branch_with_coefficient_1_equals_peft(make, targets):
    import peft

    from gainlora.model.adapter_config import GainLoRAConfig
    from gainlora.model.modeling import GainLoRAModel

    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    )
    ours = GainLoRAModel(make(), GainLoRAConfig("tiny", rank=4, alpha=8, integration="equal"))
    weights = dict(theirs.named_parameters())
    branch = {
        name: tuple(weights[f"base_model.model.{name}.lora_{m}.default.weight"] for m in "AB") for name in ours.layers
    }
    ours.start_branch(branch, train_A=True, gate=None)
    ids = torch.randint(3, 40, (3, 9))
    mask = torch.ones_like(ids)
    extra = {"labels": ids[:, :4].clone()} if ours.encoder_decoder else {}
    mine, other = ours(ids, mask, **extra).logits, theirs(input_ids=ids, attention_mask=mask, **extra).logits
    torch.testing.assert_close(mine, other)
    mine.pow(2).mean().backward()  # gradients too
    other.pow(2).mean().backward()
    for name, layer in ours.layers.items():
        for m, grad in (("A", layer.new_A.grad), ("B", layer.new_B.grad)):
            torch.testing.assert_close(grad, weights[f"base_model.model.{name}.lora_{m}.default.weight"].grad)


def test_missing_coefficients_are_refused_and_casting_or_moving_keeps_the_state():
    layer = make_layer(2)
    with pytest.raises(GainLoRAError, match="no coefficients"):
        layer(torch.randn(2, 5, 10))
    A = layer.A.clone()
    layer.to(torch.bfloat16)
    assert layer.base.weight.dtype == torch.bfloat16 and torch.equal(layer.A, A) and A.dtype == torch.float32
    layer.integration.coefficients = torch.rand(2, 2)
    assert layer(torch.randn(2, 5, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to("meta").B.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_share_an_input_compute_what_each_computes(dtype):
    """Outputs and gradients, whichever of them is called first; the same input again is computed again."""

    def outcome(layers, order):
        for seed, layer in enumerate(layers):
            torch.manual_seed(seed)
            layer.start_branch(torch.randn(3, 10), torch.randn(7, 3), train_A=True)
            layer.to(dtype).integration.coefficients = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
        x = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        for _ in range(2):
            outputs = dict((i, layers[i](x)) for i in order)
            (outputs[0].square().sum() + outputs[1].sin().sum()).backward()
        return [outputs[0], outputs[1], x.grad, *(p.grad for layer in layers for p in layer.learning)]

    expected = outcome([make_layer(2), make_layer(2)], [0, 1])
    together = [make_layer(2), make_layer(2)]
    frozen = [(layer.A.clone(), layer.B.clone()) for layer in together]
    group = Group(together)
    for layer, branches in zip(together, frozen, strict=True):
        layer.frozen = 0
        layer.stack(*branches)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(outcome(together, [1, 0]), expected, **tolerance)
    assert group._x is None and not group._outputs


def test_a_bfloat16_base_on_a_gpu_keeps_new_branches_off_old_inputs():
    """|A x| <= 1e-6 |A| |x| for x in the subspace that A avoids; A rounded to bfloat16 would reach 1e-3."""
    d = 1024
    x = torch.randn(40, d).to(torch.bfloat16)  # its span is the subspace
    basis = torch.linalg.qr(x.double().T).Q
    A = torch.randn(3, d, dtype=torch.float64)
    A = (A - A @ basis @ basis.T).float()
    with FakeGPU():
        layer = GatedLoRALinear(nn.Linear(d, 8, bias=False).to("cuda", torch.bfloat16), 3, 1.0, Integration(False))
        layer.base.weight.data.zero_()
        layer.start_branch(A, torch.eye(8, 3), train_A=False)
        leak = layer(x.to("cuda"))[:, :3].detach().cpu()
    size = A.norm(dim=1) * x.float().norm(dim=1, keepdim=True)
    assert (leak.abs() / size).max() < 1e-6
    rounded = x.float() @ A.bfloat16().float().T
    assert (rounded.abs() / size).max() > 1e-5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("train_A", [False, True])
def test_branches_that_the_optimizer_changed_are_rounded_again(device, train_A):
    with FakeGPU():
        layers = [GatedLoRALinear(nn.Linear(10, 7), 3, 1.7, Integration(False)) for _ in range(2)]
        group = Group([layer.to(device, torch.bfloat16) for layer in layers])
        for layer in layers:
            layer.stack(torch.randn(3, 10), torch.randn(7, 3))
            layer.start_branch(torch.randn(3, 10), torch.randn(7, 3), train_A)
        x = torch.randn(2, 5, 10).to(device, torch.bfloat16)
        first = layers[0](x)
        with torch.no_grad():
            for parameter in (p for layer in layers for p in layer.learning if p.requires_grad):
                parameter.mul_(1.3)
        changed = [layer(x) for layer in layers]
        group.reserve(0)  # rounds all anew
        assert not torch.equal(changed[0], first)
        assert all(torch.equal(layer(x), output) for layer, output in zip(layers, changed, strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_autocast_trains(gated):
    def gradients(autocast):
        layer = make_layer(1, gated)
        layer.start_branch(torch.ones(3, 10), torch.ones(7, 3), train_A=True)
        layer.integration.coefficients = torch.tensor([[0.3, 0.6], [0.2, 0.9]]) if gated else None
        torch.manual_seed(0)
        x = torch.randn(2, 5, 10, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(x).float().square().mean().backward()
        return [x.grad, *(p.grad for p in layer.learning)]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0.03, atol=0.03)
