"""A subspace update against a full SVD of every covariance, which is what published code does; and at d = 4096.

Covariances are random, with singular values i^-1.25: those of SmolLM2-135M's layers on real prompts fall like that in
their tail and more steeply before it. The update is that of task 2: a basis of task 1 is there. Both sides find the
residual, its directions, and how many of them hold the threshold's share of the energy.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import Row, interleave, peak_bytes, show_seconds, synchronize, time_row
from benchmarks.models import SMALL, base, learned
from gainlora.model.base import pick_device
from gainlora.model.subspace import expand_basis

THRESHOLD, DECAY = 0.995, 1.25
LLAMA_WIDTH, LLAMA_LAYERS = 4096, 32


def covariance(d: int, seed: int) -> Tensor:
    """A random symmetric (d, d) with singular values i^-DECAY, float32."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator).to(pick_device())).Q
    values = torch.arange(1, d + 1, device=vectors.device).float() ** -DECAY
    return (vectors * values) @ vectors.T


def by_full_svd(basis: Tensor, c: Tensor) -> Tensor:
    """`expand_basis` as published: a full float32 SVD of the residual."""
    residual = c - basis @ (basis.T @ c)
    u, sigma, _ = torch.linalg.svd(residual)
    total = c.square().sum()
    kept = (total - residual.square().sum() + sigma.square().cumsum(0)) / total
    count = int((kept < THRESHOLD).sum()) + 1
    return torch.cat((basis, u[:, :count]), dim=1)


def ours(basis: Tensor, c: Tensor) -> Tensor:
    """What a run does."""
    return expand_basis(basis, c, THRESHOLD, "covariance", "layer")


def largest_angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle between two spans of equal dimension, in radians."""
    assert a.shape == b.shape, f"{a.shape[1]} directions and {b.shape[1]}"
    a, b = torch.linalg.qr(a.double()).Q, torch.linalg.qr(b.double()).Q
    return float(torch.linalg.matrix_norm(a - b @ (b.T @ a), 2).clamp(max=1).asin())


def row(name: str, rounds: int = 5) -> Row:
    """All adapted inputs of a model."""
    model = learned(base(name), 1)
    covariances = [covariance(model.layers[group].in_features, i) for i, group in enumerate(model.groups)]
    del model
    # one basis for all, of as many directions as an update finds
    first = ours(covariances[0].new_zeros(len(covariances[0]), 0), covariance(len(covariances[0]), -1))

    def side(expand: object) -> object:
        return lambda: [expand(first, c) for c in covariances]  # type: ignore[operator]

    angle = max(largest_angle(ours(first, c), by_full_svd(first, c)) for c in covariances)
    assert angle < 1e-4, angle
    times = interleave({"ours": side(ours), "svd": side(by_full_svd)}, rounds)  # type: ignore[dict-item]
    d, count = len(covariances[0]), ours(first, covariances[0]).shape[1] - first.shape[1]
    what = f"subspace update, full SVD / ours, {name}, {len(covariances)} inputs of d = {d}"
    found = time_row(what, times, "svd", "ours", ">= 3")
    return Row(**{**vars(found), "detail": f"{found.detail}; {count} directions, largest angle {angle:.0e}"})


def large(blocks: int, against_svd: bool) -> Row:
    """One layer of Llama-2-7B; a pass over its 32 layers takes 32 times as long, one layer at a time."""
    width = LLAMA_WIDTH // blocks
    covariances = [covariance(width, i) for i in range(blocks)]
    first = ours(covariances[0].new_zeros(width, 0), covariance(width, -1))
    memory = peak_bytes(lambda: [ours(first, c) for c in covariances])
    mine = min(timed(ours, first, covariances) for _ in range(2))
    detail = (
        f"a layer in {show_seconds(mine)}, {LLAMA_LAYERS} in {show_seconds(LLAMA_LAYERS * mine)}; "
        f"{memory / 2**20:.0f} MiB beside {LLAMA_LAYERS * blocks * width**2 * 4 / 2**30:.1f} GiB of covariances"
    )
    how = "whole" if blocks == 1 else f"in {blocks} blocks"
    if not against_svd:
        return Row(f"subspace update, d = {LLAMA_WIDTH} {how}, seconds a layer", round(mine, 3), "", detail)
    theirs = min(timed(by_full_svd, first, covariances) for _ in range(2))
    return Row(f"subspace update, full SVD / ours, d = {LLAMA_WIDTH} {how}", round(theirs / mine, 3), ">= 3", detail)


def timed(expand: object, basis: Tensor, covariances: Sequence[Tensor]) -> float:
    """Seconds for all blocks of a layer."""
    synchronize()
    started = time.perf_counter()
    for c in covariances:
        expand(basis, c)  # type: ignore[operator]
    synchronize()
    return time.perf_counter() - started


def run() -> list[Row]:
    """A row per model, and d = 4096 whole and in the blocks that params.yaml gives Llama-2-7B."""
    return [*(row(name) for name in SMALL), large(1, against_svd=True), large(4, against_svd=True)]
