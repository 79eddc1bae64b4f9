"""Generation under 15 gated branches against the base model's own `generate`."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import Row, interleave, time_row
from benchmarks.models import SMALL, base, learned, prompts

BRANCHES, BATCH, PROMPT, NEW_TOKENS = 15, 16, 128, 16


def row(name: str, rounds: int = 8) -> Row:
    """`BATCH` prompts of `PROMPT` tokens, exactly `NEW_TOKENS` new tokens each on both sides."""
    inputs = prompts(base(name), BATCH, PROMPT)

    def side(model: Any) -> Callable[[], None]:
        def once() -> None:
            with torch.inference_mode():
                made = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
            # an encoder-decoder's output is the decoder's own: its start token and the answer
            assert made.shape[1] - NEW_TOKENS in (1, PROMPT)

        return once

    models = {"ours": learned(base(name), BRANCHES, learning=False), "base": base(name)}
    times = interleave({key: side(model) for key, model in models.items()}, rounds)
    what = f"generation, {BRANCHES} branches / base model, batch {BATCH}, {name}"
    return time_row(what, times, "ours", "base", "<= 1.20")


def run() -> list[Row]:
    """A row per model."""
    return [row(name) for name in SMALL]
