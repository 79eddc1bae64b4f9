"""Gradient projection memory: orthonormal bases of the input directions that old tasks used.

For each layer, a basis U (d, k) holds most of the energy of its inputs x on old tasks. A change of the
weight that is orthogonal to U does not change the layer's outputs on inputs in the span of U.

    C = (1/n) sum_x x x^T                      covariance of the inputs, streamed        (d, d)
    R = C - U U^T C                            residual outside the basis                (d, d)
    U <- [U, top left singular vectors of R]   until the stored energy reaches a threshold

Source: Saha et al., Gradient Projection Memory (ICLR 2021); Liang and Li, InfLoRA (CVPR 2024).
Tensors only, no models. Projections are two thin products; no (d, d) projector is formed.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gainlora.errors import GainLoRAError
from gainlora.model.precision import float32_products

Basis = tuple[Tensor, ...]
"""Orthonormal columns per block of inputs: block j is (d / b, k_j). One block unless d is split."""

Wanted = Callable[[Tensor, float], int | None]
"""How many directions are enough, from the largest singular values found so far and the sum of squares of the rest;
None: more values are needed."""

NUMERICAL_ZERO = 1e-6
"""Share of ||C||_F below which a singular value is rounding (a float32 stream errs by some 1e-8)."""
BLOCK, CHECK, CONVERGED = 16, 3, 1e-6
"""Of the block Krylov iteration: directions per step, steps between convergence checks, largest residual."""


class Covariance:
    """C = (1/n) sum x x^T, streamed over batches, block-diagonal with `blocks` blocks.

    Args:
        width: d, the number of inputs.
        blocks: b; must divide d.
    """

    def __init__(self, width: int, blocks: int = 1, device: torch.device | None = None) -> None:
        if width % blocks:
            raise GainLoRAError(
                f"subspace.covariance_blocks: {blocks} does not divide a layer's {width} inputs; choose a divisor."
            )
        self.total = torch.zeros(blocks, width // blocks, width // blocks, device=device)  # (b, d/b, d/b)
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Add the rows of x (n, d)."""
        rows = x.to(torch.float32).reshape(len(x), *self.total.shape[:2])  # (n, b, d/b)
        half = rows.shape[2] // 2
        # bfloat16 rows as bfloat16 (CPU) or TF32 (GPU), which is exact for them and several times faster than float32
        narrow = x.dtype == torch.bfloat16
        with float32_products(*("bf16", "tf32") if narrow else ("ieee", "ieee")):
            for total, block in zip(self.total, rows.unbind(1), strict=True):
                # C is symmetric: three quarters of it are computed, `matrices` mirrors the rest
                first, second = block[:, :half], block[:, half:]
                total[:half, :half].addmm_(first.T, first)
                total[half:, :half].addmm_(second.T, first)
                total[half:, half:].addmm_(second.T, second)
        self.count += len(x)

    def matrices(self, name: str) -> Tensor:
        """The blocks of C, (b, d/b, d/b).

        Raises:
            GainLoRAError: no row was seen, or a value is not finite; `name` identifies the inputs.
        """
        if not self.count:
            raise GainLoRAError(f"{name}: no inputs were seen; the task has no training examples.")
        if not torch.isfinite(self.total).all():
            raise GainLoRAError(
                f"{name}: the covariance of its inputs is not finite; lower train.learning_rate, "
                "or set model.dtype to float32."
            )
        half = self.total.shape[1] // 2
        self.total[:, :half, half:] = self.total[:, half:, :half].mT
        return self.total / self.count


def threshold_at(threshold: float, task: int, horizon: int) -> float:
    """Share of energy to keep after task `task` (from 1): e + (1 - e) (t - 1) / H, t at most H."""
    return threshold + (1 - threshold) * (min(task, horizon) - 1) / horizon


def project_out(x: Tensor, basis: Tensor) -> Tensor:
    """x (..., d) minus its projection on the span of `basis` (d, k)."""
    return x - (x @ basis) @ basis.T


def principal_directions(covariance: Tensor, basis: Tensor, name: str, wanted: Wanted, partial: bool = True) -> Tensor:
    """Left singular vectors of R = (I - U U^T) C, largest first.

    They are the eigenvectors of the symmetric R R^T: the leading ones by block Krylov iteration if these
    suffice, otherwise all by eigendecomposition, which is still faster than an SVD of R. float64 resolves singular
    values down to 1e-8 of the largest.

    Args:
        covariance: C (d, d), symmetric.
        basis: U (d, k), orthonormal columns.
        name: of the inputs, for errors.
        wanted: decides how many directions are enough.
        partial: whether `wanted` can decide without knowing all singular values.
    Returns:
        (d, n) float64, orthonormal and orthogonal to U: the wanted number, or all above `NUMERICAL_ZERO` of ||C||_F.

    Raises:
        GainLoRAError: the decomposition does not converge.
    """
    c, u = covariance.double(), basis.double()
    residual = c - u @ (u.T @ c)
    try:
        found = _leading(residual, wanted) if partial else None
        sigma, vectors = found or _all(residual)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise GainLoRAError(
            f"{name}: the covariance of its inputs cannot be decomposed ({reason}); lower train.learning_rate, set "
            "model.dtype to float32, or run on another device."
        ) from None
    # relative to C, not R: the rounding errors of an exhausted R are not directions
    rank = min(int((sigma > NUMERICAL_ZERO * c.norm()).sum()), len(c) - u.shape[1])
    count = wanted(sigma, 0.0) if found is None else vectors.shape[1]
    vectors = vectors[:, : rank if count is None else min(count, rank)]
    vectors = vectors - u @ (u.T @ vectors)  # rounding of the products above
    return torch.linalg.qr(vectors).Q if vectors.shape[1] else vectors


def _all(residual: Tensor) -> tuple[Tensor, Tensor]:
    """All singular values (d,) and left singular vectors (d, d) of R, largest first."""
    squares, vectors = torch.linalg.eigh(residual @ residual.T)  # ascending
    return squares.clamp_min(0).sqrt().flip(0), vectors.flip(1)


def _leading(residual: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor] | None:
    """The wanted leading singular values and left singular vectors (d, n) of R; None if d / 3 are not enough.

    The rows K (m, d) span R G, (R R^T) R G, (R R^T)^2 R G, ... of a random G; eigenvectors of K R (K R)^T turn K into
    approximate singular vectors. They are accepted once residuals are small: ||R R^T v - sigma^2 v|| <= e sigma_n^2
    for all n gives a span whose largest angle to the exact one is at most sqrt(n) e / (1 - sigma_{n+1}^2 / sigma_n^2)
    (Davis and Kahan), e = `CONVERGED`. Musco and Musco, Randomized Block Krylov Methods (NeurIPS 2015).
    """
    d, energy = len(residual), float(residual.norm()) ** 2
    if wanted(residual.new_empty(0), energy) == 0:  # the basis is sufficient already, as for most layers of late tasks
        return residual.new_empty(0), residual.new_empty(d, 0)
    generator = torch.Generator().manual_seed(0)  # any start works; a fixed one gives the same bits
    start = torch.randn(BLOCK, d, generator=generator, dtype=residual.dtype).to(residual.device)
    rows = torch.linalg.qr((start @ residual.T).T).Q.T  # (m, d), like all here: products of thin rows are faster
    images = rows @ residual
    for step in range(1, d // (3 * BLOCK)):
        new = images[-BLOCK:] @ residual.T
        for _ in range(2):  # twice: once leaves rounding errors
            new = new - (new @ rows.T) @ rows
        new = torch.linalg.qr(new.T).Q.T
        rows, images = torch.cat((rows, new)), torch.cat((images, new @ residual))
        if step % CHECK:
            continue
        squares, turn = torch.linalg.eigh(images @ images.T)
        squares, turn = squares.clamp_min(0).flip(0), turn.flip(1)
        sigma = squares.sqrt()
        count = wanted(sigma, max(0.0, energy - float(squares.sum())))
        if count is None or not 0 < count <= len(rows) - BLOCK:
            continue
        turned = turn[:, :count].T
        vectors = turned @ rows  # (n, d)
        error = (turned @ images) @ residual.T - squares[:count, None] * vectors
        if error.norm(dim=1).max() <= CONVERGED * squares[count - 1]:
            return sigma, vectors.T
    return None


def expand_basis(
    basis: Tensor, covariance: Tensor, threshold: float, energy: Literal["covariance", "representation"], name: str
) -> Tensor:
    """U plus the fewest directions that reach `threshold` of C's energy; old columns are unchanged.

    Energy of a direction is sigma^2 (`covariance`) or sigma (`representation`), sigma the singular value of
    R. A first basis gets at least one direction; none exceeds the numerical rank.

    Args:
        basis: U (d, k). covariance: C (d, d). threshold: in (0, 1]. name: for errors.
    Returns:
        (d, k') with k' >= k, orthonormal.
    """
    least = 0 if basis.shape[1] else 1
    squared = energy == "covariance"
    # C is positive semidefinite: its singular values sum to its trace
    norm = torch.linalg.vector_norm(covariance, dtype=torch.float64)
    total = norm.square() if squared else covariance.double().trace()

    def enough(sigma: Tensor, rest: float) -> int | None:
        added = sigma.square() if squared else sigma
        # missing[j]: energy still outside with j further directions, summed from the small end for exactness
        missing = rest + torch.cat((added.flip(0).cumsum(0).flip(0), added.new_zeros(1)))  # (n + 1,)
        reached = torch.nonzero(1 - missing / total >= threshold)
        return max(int(reached[0]), least) if len(reached) else None

    # of the unknown singular values only the sum of squares is known
    directions = principal_directions(covariance, basis, name, enough, partial=squared)
    return torch.cat((basis, directions.to(basis.dtype)), dim=1)


def top_directions(basis: Tensor, covariance: Tensor, count: int, name: str) -> Tensor:
    """The `count` strongest input directions that the basis leaves free: rows (count, d), orthonormal.

    If fewer are free, the remaining rows are zero: a layer may see fewer directions than the rank, e.g. T5's first
    decoder self-attention sees one vector per distinct answer token.
    """
    directions = principal_directions(covariance, basis, name, lambda sigma, rest: count)
    rows = basis.new_zeros(count, len(basis))
    rows[: directions.shape[1]] = directions.T
    return rows


def empty_basis(width: int, blocks: int = 1, device: torch.device | None = None) -> Basis:
    """An empty basis."""
    return tuple(torch.zeros(width // blocks, 0, device=device) for _ in range(blocks))


def expand_blocks(
    basis: Basis, covariances: Tensor, threshold: float, energy: Literal["covariance", "representation"], name: str
) -> Basis:
    """`expand_basis` per block."""
    return tuple(expand_basis(u, c, threshold, energy, name) for u, c in zip(basis, covariances, strict=True))


def inflora_A(basis: Basis, covariances: Tensor, rank: int, name: str) -> Tensor:
    """InfLoRA's fixed A_t (rank, d): the blocks' top directions side by side, divided by sqrt(3).

    With one block its rows are orthogonal and of norm 1/sqrt(3). With several, the rows are divided by
    sqrt(blocks) too, which preserves the norm. A_t U = 0 in every block.

    If fewer than `rank` directions are free in a block, its remaining rows are zero: A x = 0 there, so the gradient of
    B's column is exactly 0 and the column stays 0. With random rows, Adam, which normalizes gradients, would move B
    on rounding noise.
    """
    blocks = [top_directions(u, c, rank, name) for u, c in zip(basis, covariances, strict=True)]
    return torch.cat(blocks, dim=1) / (3 * len(blocks)) ** 0.5
