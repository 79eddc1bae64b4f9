"""The gate's guarantee: Proposition 3.1, and what holds of it in float32."""

import math

import pytest
import torch

from gainlora.errors import GainLoRAError
from gainlora.model.gate import Gate, GateWeights, coefficient, first_hidden, new_key, random_key, scores, widths

D, HIDDEN = 24, 10


def make_gate(depth, score, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = [w.to(dtype) for w in first_hidden(widths(D, HIDDEN, depth), g)]
    return GateWeights(hidden, torch.randn(1, D, generator=g).to(dtype))


def sample_basis(p):
    """Orthonormal basis of the rows of p (n, d): from the samples themselves, not their covariance."""
    _, s, vh = torch.linalg.svd(p, full_matrices=False)
    return vh[s > 1e-12 * s[0]].T


def train(gate, x, steps=30, optimizer=torch.optim.AdamW, **kwargs):
    opt = optimizer(gate.parameters(), lr=0.05, **kwargs)
    for _ in range(steps):
        opt.zero_grad()
        (1 - gate(x)).pow(2).mean().backward()
        opt.step()


@pytest.mark.parametrize("score", ["cosine", "linear"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    "optimizer, kwargs",
    [(torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01})],
)
def test_proposition_3_1(score, depth, optimizer, kwargs):
    g = torch.Generator().manual_seed(depth)
    old = torch.randn(6, D, generator=g).double()  # fewer than every width of the gate
    new = torch.randn(40, D, generator=g).double()
    last = make_gate(depth, score, torch.float64)
    before = Gate(last, [torch.zeros(w.shape[-1], 0).double() for w in [*last.hidden, last.key]], score)
    memory = [sample_basis(p.detach()) for p in before.features(old)]
    assert all(m.shape[1] < len(m) for m in memory)

    c = before.features(new)[-1].T @ before.features(new)[-1] / len(new)
    key = new_key(c, memory[-1], None, "svd", g)
    assert key.norm() > 0
    gate = Gate(GateWeights(last.hidden, key.unsqueeze(0)), memory, score)
    features = [p.detach() for p in gate.features(old)]
    assert gate(new).mean() > 0.01  # the gate is open on new samples, so that it can learn
    assert gate(old).max() < 1e-10

    train(gate, new, optimizer=optimizer, **kwargs)
    assert max(c.abs().max() for c in gate.change) > 0.01  # it did train
    for p, q in zip(features, gate.features(old), strict=True):
        assert (p - q).abs().max() < 1e-10
    assert gate(old).max() < 1e-10
    # ... and folded into plain weights, as later tasks and inference use it
    folded = gate.fold()
    assert folded.coefficients(old, score).max() < 1e-10
    torch.testing.assert_close(folded.coefficients(new, score)[:, 0], gate(new))


def test_coefficient_is_zero_at_zero_and_below_one():
    b = torch.tensor([0.0, 1.0, -1.0, 4.0, 100.0])
    expected = (2 * torch.sigmoid(b) - 1).abs()
    torch.testing.assert_close(coefficient(b), expected)
    assert coefficient(b)[0] == 0
    p = torch.randn(5, D)
    assert coefficient(scores(p, p, "cosine")).max() <= math.tanh(2) + 1e-6  # f(4) = 0.964


def test_key_has_the_norm_asked_for_and_lies_outside_the_memory():
    g = torch.Generator().manual_seed(0)
    c = torch.eye(D)
    for direction in ("svd", "random"):
        assert new_key(c, torch.zeros(D, 0), None, direction, g).norm() == pytest.approx(math.sqrt(D / 3))
        assert new_key(c, torch.eye(D)[:, :3], 2.0, direction, g)[:3].abs().max() < 1e-6
    drawn = random_key(4096, None, g)  # as it is drawn its norm is about the same
    assert drawn.abs().max() <= 1 and drawn.norm() == pytest.approx(math.sqrt(4096 / 3), rel=0.03)
    assert random_key(D, 2.0, g).norm() == pytest.approx(2.0)


def test_full_memory_is_refused_with_the_remedy():
    with pytest.raises(GainLoRAError, match=r"gate memory is full.*gate_threshold"):
        new_key(torch.eye(D), torch.eye(D), None, "svd", torch.Generator())


def test_stacked_gates_equal_each_gate_alone():
    gates = [make_gate(2, "cosine", torch.float32, seed) for seed in range(3)]
    stacked = gates[0].append(gates[1]).append(gates[2])
    x = torch.randn(5, D)
    alone = torch.cat([g.coefficients(x, "cosine") for g in gates], dim=1)
    torch.testing.assert_close(stacked.coefficients(x, "cosine"), alone)
