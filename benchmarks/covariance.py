"""The covariance pass over a task's examples against the same forward passes without it."""

import torch

from benchmarks.measure import Row, interleave, time_row
from benchmarks.models import SMALL, base, examples, learned
from gainlora.model.covariance import layer_covariances

BATCHES, BATCH, LENGTH, BRANCHES = 4, 8, 128, 4


def row(name: str, rounds: int = 8) -> Row:
    """A pass over `BATCHES` batches; all layers' covariances."""
    model = learned(base(name), BRANCHES, learning=False)
    batches = [examples(model.base, BATCH, LENGTH)] * BATCHES
    # as the pass does it: no logits beyond the one position that a decoder-only model cannot leave out
    least = {} if model.encoder_decoder else {"logits_to_keep": 1}

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch, use_cache=False, **least)

    times = interleave({"covariances": lambda: layer_covariances(model, batches), "forward": forward}, rounds)
    return time_row(f"covariance pass / forward only, {name}", times, "covariances", "forward", "<= 1.15")


def run() -> list[Row]:
    """A row per model."""
    return [row(name) for name in SMALL]
