"""The covariance pass over a task's examples against the same forward passes without it."""

from __future__ import annotations

import torch

from benchmarks.measure import Row, interleave, time_row
from benchmarks.models import SMALL, base, examples, learned
from gainlora.model.inputs import layer_covariances

BATCH, LENGTH, BRANCHES = 8, 128, 4


def row(name: str, rounds: int = 10) -> Row:
    """One batch; all layers' covariances."""
    model = learned(base(name), BRANCHES, learning=False)
    batch = examples(model.base, BATCH, LENGTH)
    # as the pass does it: no logits beyond the one position that a decoder-only model cannot leave out
    least = {} if model.encoder_decoder else {"logits_to_keep": 1}

    @torch.no_grad()
    def forward() -> None:
        model(**batch, use_cache=False, **least)

    times = interleave({"covariances": lambda: layer_covariances(model, [batch]), "forward": forward}, rounds)
    return time_row(f"covariance pass / forward only, {name}", times, "covariances", "forward", "<= 1.15")


def run() -> list[Row]:
    """A row per model."""
    return [row(name) for name in SMALL]
