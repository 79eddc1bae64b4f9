"""Bases: orthonormal, growing, of the right size, blind to nothing they should hold."""

import pytest
import torch

from gainlora.errors import GainLoRAError
from gainlora.model.subspace import Covariance, empty_basis, expand_basis, expand_blocks, inflora_A, threshold_at


def inputs(n, d, rank, seed=0):
    """n rows in a random `rank`-dimensional subspace, with a falling spectrum."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.linspace(3, 0.5, rank)
    return (torch.randn(n, rank, generator=g) * scales) @ torch.randn(rank, d, generator=g)


def covariance(x, blocks=1, rows=7):
    c = Covariance(x.shape[1], blocks)
    for part in x.split(rows):
        c.update(part)
    return c.matrices("test")


def test_streamed_covariance_is_the_covariance_and_its_blocks():
    x = inputs(50, 12, 5)
    expected = x.T @ x / 50
    torch.testing.assert_close(covariance(x)[0], expected)
    blocks = covariance(x, 3)
    for j in range(3):
        torch.testing.assert_close(blocks[j], expected[4 * j : 4 * j + 4, 4 * j : 4 * j + 4])


def test_covariance_refuses_nothing_seen_and_values_not_finite():
    with pytest.raises(GainLoRAError, match=r"layer\.q: no inputs"):
        Covariance(4).matrices("layer.q")
    c = Covariance(4)
    c.update(torch.full((1, 4), float("inf")))
    with pytest.raises(GainLoRAError, match=r"layer\.q.*not finite"):
        c.matrices("layer.q")
    with pytest.raises(GainLoRAError, match="covariance_blocks: 3"):
        Covariance(4, 3)


def test_expansion_keeps_old_columns_is_orthonormal_and_reaches_the_threshold():
    c1, c2 = covariance(inputs(300, 24, 6, 1))[0], covariance(inputs(300, 24, 10, 2))[0]
    first = expand_basis(torch.zeros(24, 0), c1, 0.99, "covariance", "layer")
    both = expand_basis(first, c2, 0.99, "covariance", "layer")
    torch.testing.assert_close(both[:, : first.shape[1]], first, atol=0, rtol=0)
    torch.testing.assert_close(both.T @ both, torch.eye(both.shape[1]), atol=1e-5, rtol=0)

    def kept(u):
        return 1 - (c2 - u @ (u.T @ c2)).norm() ** 2 / c2.norm() ** 2

    assert kept(both) >= 0.99 > kept(both[:, :-1])


def test_expansion_stops_where_nothing_is_new_and_never_passes_the_rank_or_d():
    c = covariance(inputs(300, 16, 5))[0]
    full = expand_basis(torch.zeros(16, 0), c, 1.0, "covariance", "layer")
    assert full.shape[1] == 5
    assert expand_basis(full, c, 1.0, "covariance", "layer").shape[1] == 5
    everything = expand_basis(full, torch.eye(16), 1.0, "covariance", "layer")
    assert everything.shape[1] == 16
    assert expand_basis(everything, covariance(inputs(300, 16, 9, 3))[0], 1.0, "covariance", "layer").shape[1] == 16


def test_first_basis_gets_one_direction_even_for_a_tiny_threshold():
    assert expand_basis(torch.zeros(9, 0), torch.eye(9), 1e-6, "covariance", "layer").shape[1] == 1


def exact_directions(c, basis):
    u, s, _ = torch.linalg.svd(c.double() - basis.double() @ (basis.double().T @ c.double()))
    return u, s


def largest_angle(a, b):
    """The largest principal angle (its sine) between two spans of orthonormal columns of equal number."""
    assert a.shape == b.shape
    return float(torch.linalg.matrix_norm(a - b @ (b.T @ a), 2))


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])  # sigma_i = i^-decay; the flattest is beyond an iteration's reach
@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.995])
@pytest.mark.parametrize("energy", ["covariance", "representation"])
def test_a_basis_is_the_smallest_that_holds_the_threshold_as_in_a_full_decomposition(decay, threshold, energy):
    g = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(400, 400, generator=g)).Q
    c = (rotation * torch.arange(1, 401).float() ** -decay) @ rotation.T
    old = torch.linalg.qr(torch.randn(400, 30, generator=g)).Q
    for basis in (torch.zeros(400, 0), old):
        found = expand_basis(basis, c, threshold, energy, "layer").double()[:, basis.shape[1] :]
        u, s = exact_directions(c, basis)
        added, whole = (s.square(), c.double().square().sum()) if energy == "covariance" else (s, c.double().trace())
        kept = 1 - (added.sum() - added.cumsum(0)) / whole
        k = found.shape[1]
        assert kept[k - 1] >= threshold - 1e-6 and (k == 1 or kept[k - 2] < threshold)
        assert largest_angle(found, u[:, :k]) < 1e-4


def test_a_memory_that_holds_enough_stays_as_it_is():
    c = torch.diag(0.8 ** torch.arange(400.0))
    basis = torch.eye(400)[:, :11]
    assert torch.equal(expand_basis(basis, c, 0.99, "covariance", "layer"), basis)
    assert expand_basis(basis, c, 0.999, "covariance", "layer").shape[1] > 11


@pytest.mark.parametrize("blocks", [1, 4])
def test_designed_A_lies_outside_the_memory(blocks):
    old, new = covariance(inputs(200, 32, 3, 1), blocks), covariance(inputs(200, 32, 20, 2), blocks)
    basis = expand_blocks(empty_basis(32, blocks), old, 0.99, "covariance", "layer")
    A = inflora_A(basis, new, 4, "layer.q")
    assert A.shape == (4, 32)
    whole = torch.block_diag(*basis)  # (d, k)
    assert (A @ whole).abs().max() < 1e-6
    torch.testing.assert_close(A @ A.T, torch.eye(4) / 3, atol=1e-5, rtol=0)  # norm 1 / sqrt(3)


@pytest.mark.parametrize("blocks", [1, 4])
def test_rows_beyond_what_is_free_are_zero(blocks):
    """5 directions new, 2 of them in the memory: 3 rows as ever, the others exactly 0."""
    d = 16
    c = torch.diag(torch.arange(d, 0, -1.0) * (torch.arange(d) < 5)).repeat(blocks, 1, 1)
    basis = tuple(torch.eye(d)[:, :2] for _ in range(blocks))
    A = inflora_A(basis, c, 8, "layer.q")
    assert A.shape == (8, d * blocks) and not A[3:].any()
    torch.testing.assert_close(A[:3] @ A[:3].T, torch.eye(3) / 3, atol=1e-6, rtol=0)
    assert torch.equal(A[:3].abs() > 0, torch.eye(d)[2:5].bool().repeat(1, blocks))
    assert not inflora_A(tuple(torch.eye(d)[:, :5] for _ in range(blocks)), c, 8, "layer.q").any()


def test_threshold_rises_to_its_end_and_stays():
    assert threshold_at(0.9, 1, 5) == 0.9
    assert threshold_at(0.9, 5, 5) == threshold_at(0.9, 9, 5) == pytest.approx(0.98)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_covariance_is_summed_in_float32_whatever_the_dtype_and_the_precision_that_the_process_allows(
    dtype, monkeypatch
):
    """Also after the API that torch.get_float32_matmul_precision does not understand; settings are put back."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    for setting, allowed in zip(settings, ("tf32", "bf16"), strict=True):
        monkeypatch.setattr(setting, "fp32_precision", allowed)
    x = (torch.randn(3000, 96, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    found = covariance(x, rows=500)[0].double()
    exact = x.double().T @ x.double() / 3000
    assert (found - exact).norm() < 3e-7 * exact.norm()  # in bfloat16 it would be 1e-3
    assert torch.equal(found, found.T)
    assert [setting.fp32_precision for setting in settings] == ["tf32", "bf16"]
