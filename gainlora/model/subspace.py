"""Gradient projection memory: which input directions old tasks used, as orthonormal bases.

A layer that saw inputs x on old tasks keeps a basis U (d, k) of most of their energy. A change of its
weight that is orthogonal to U leaves its outputs on those inputs as they were.

    C = (1/n) sum_x x x^T                      covariance of the inputs, streamed        (d, d)
    R = C - U U^T C                            what the basis does not hold yet          (d, d)
    U <- [U, top left singular vectors of R]   until the kept energy reaches a threshold

Source: Saha et al., Gradient Projection Memory (ICLR 2021); Liang and Li, InfLoRA (CVPR 2024).
Pure tensors: nothing here knows of models. Everything is two thin products; no (d, d) projector is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from gainlora.errors import GainLoRAError

Basis = tuple[Tensor, ...]
"""Orthonormal columns per block of inputs: block j is (d / b, k_j). One block unless d is split."""

Wanted = Callable[[Tensor, float], int | None]
"""How many directions are enough, from the largest singular values found so far and the sum of squares of the rest;
None: more must be known."""

NUMERICAL_ZERO = 1e-6
"""Share of ||C||_F below which a singular value is rounding (a float32 stream errs by some 1e-8)."""
BLOCK, CHECK, CONVERGED = 16, 3, 1e-6
"""Of the block Krylov iteration: directions per step, steps per look at what is found, residual that will do."""


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
        with _exact_products(x.dtype):
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
            GainLoRAError: no row was seen, or a value is not finite; `name` says whose inputs these are.
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


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Numbers that came as bfloat16 are multiplied as bfloat16 (CPU) or TF32 (GPU), which is exact for them and several
    times as fast as float32; sums are float32 all the same."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def threshold_at(threshold: float, task: int, horizon: int) -> float:
    """Share of energy to keep after task `task` (from 1): e + (1 - e) (t - 1) / H, t at most H."""
    return threshold + (1 - threshold) * (min(task, horizon) - 1) / horizon


def project_out(x: Tensor, basis: Tensor) -> Tensor:
    """x (..., d) without its part in the span of `basis` (d, k)."""
    return x - (x @ basis) @ basis.T


def principal_directions(covariance: Tensor, basis: Tensor, name: str, wanted: Wanted, partial: bool = True) -> Tensor:
    """Left singular vectors of R = (I - U U^T) C, largest first.

    They are the eigenvectors of the symmetric R R^T: the leading ones by block Krylov iteration where that gives
    what is wanted, else all by a decomposition, which is still faster than a full SVD of R. Everything is float64,
    which keeps singular values down to 1e-8 of the largest apart.

    Args:
        covariance: C (d, d), symmetric.
        basis: U (d, k), orthonormal columns.
        name: whose inputs these are.
        wanted: decides how many directions are enough.
        partial: whether `wanted` can decide without knowing all singular values.
    Returns:
        (d, n) float64, orthonormal and orthogonal to U: as many as wanted, or all above `NUMERICAL_ZERO` of ||C||_F.

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
    # the scale of C, not of R: what rounding leaves of an exhausted R is no direction
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
    """The wanted leading singular values and left singular vectors (d, n) of R; None where a third of d is not enough.

    The rows K (m, d) span R G, (R R^T) R G, (R R^T)^2 R G, ... of a random G; eigenvectors of K R (K R)^T turn K into
    approximate singular vectors. They are taken once their residuals are small: ||R R^T v - sigma^2 v|| <= e sigma_n^2
    for all n gives a span whose largest angle to the exact one is at most sqrt(n) e / (1 - sigma_{n+1}^2 / sigma_n^2)
    (Davis and Kahan), e = `CONVERGED`. Musco and Musco, Randomized Block Krylov Methods (NeurIPS 2015).
    """
    d, energy = len(residual), float(residual.norm()) ** 2
    if wanted(residual.new_empty(0), energy) == 0:  # the basis holds enough already, as for most layers of late tasks
        return residual.new_empty(0), residual.new_empty(d, 0)
    generator = torch.Generator().manual_seed(0)  # any start will do; always the same gives the same bits
    start = torch.randn(BLOCK, d, generator=generator, dtype=residual.dtype).to(residual.device)
    rows = torch.linalg.qr((start @ residual.T).T).Q.T  # (m, d), as all here: products of thin rows are the faster ones
    images = rows @ residual
    for step in range(1, d // (3 * BLOCK)):
        new = images[-BLOCK:] @ residual.T
        for _ in range(2):  # once leaves rounding
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
    """U with the fewest further directions that hold `threshold` of C's energy; old columns stay as they are.

    Energy of a direction is sigma^2 (`covariance`) or sigma (`representation`), sigma the singular value of
    R. A first basis gets at least one direction; none holds more than the numerical rank.

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

    # what the unknown singular values sum to is not known, what their squares sum to is
    directions = principal_directions(covariance, basis, name, enough, partial=squared)
    return torch.cat((basis, directions.to(basis.dtype)), dim=1)


def top_directions(basis: Tensor, covariance: Tensor, count: int, name: str) -> Tensor:
    """The `count` strongest input directions that the basis leaves free: rows (count, d), orthonormal.

    Raises:
        GainLoRAError: fewer directions are left; `name` says in which layer.
    """
    directions = principal_directions(covariance, basis, name, lambda sigma, rest: count)
    if directions.shape[1] < count:
        raise GainLoRAError(
            f"lora.rank: {count} is more than the {directions.shape[1]} input directions that old tasks leave free "
            f"in {name} ({basis.shape[1]} of {len(basis)} are in its memory); lower lora.rank or subspace.threshold."
        )
    return directions.T.to(basis.dtype)


def empty_basis(width: int, blocks: int = 1, device: torch.device | None = None) -> Basis:
    """No directions yet."""
    return tuple(torch.zeros(width // blocks, 0, device=device) for _ in range(blocks))


def expand_blocks(
    basis: Basis, covariances: Tensor, threshold: float, energy: Literal["covariance", "representation"], name: str
) -> Basis:
    """`expand_basis` in every block."""
    return tuple(expand_basis(u, c, threshold, energy, name) for u, c in zip(basis, covariances, strict=True))


def design_A(basis: Basis, covariances: Tensor, rank: int, name: str) -> Tensor:
    """InfLoRA's fixed A_t (rank, d): the blocks' top directions side by side, divided by sqrt(3).

    With one block its rows are orthogonal and of norm 1/sqrt(3). With several, the rows are divided by
    sqrt(blocks) too, so that the norm stays. A_t U = 0 in every block.
    """
    blocks = [top_directions(u, c, rank, name) for u, c in zip(basis, covariances, strict=True)]
    return torch.cat(blocks, dim=1) / (3 * len(blocks)) ** 0.5
