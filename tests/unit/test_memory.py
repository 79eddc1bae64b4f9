"""The estimate of a run's memory against what torch's allocator holds in a real step on the CPU."""

from functools import partial

import pytest
import torch

from benchmarks.measure import peak_bytes
from benchmarks.models import CONFIGS, base, examples, learned
from benchmarks.training import step
from gainlora.config import RunConfig
from gainlora.model.memory import estimate

BATCH, LENGTH, ANSWER = 4, 96, 6


@pytest.fixture(autouse=True)
def no_dropout(monkeypatch):
    """With dropout, CPUs have no fused attention; GPUs do."""
    monkeypatch.setitem(CONFIGS, "tiny-t5", partial(without_dropout, CONFIGS["tiny-t5"]))


def without_dropout(make):
    config = make()
    config.dropout_rate = 0.0
    return config


@pytest.mark.parametrize("name, checkpointing", [("tiny-llama", False), ("tiny-llama", True), ("tiny-t5", False)])
def test_the_estimate_of_a_training_step_is_what_it_takes(name, checkpointing):
    options = {
        "method": "gainlora-inclora",
        "lora": {"rank": 4},
        "train": {"micro_batch_size": BATCH, "batch_size": BATCH},
    }
    encoder_decoder = "t5" in name
    options["data"] = {"max_prompt_tokens": LENGTH - (0 if encoder_decoder else ANSWER), "max_target_tokens": ANSWER}
    options["train"]["gradient_checkpointing"] = checkpointing
    order = {"name": "o", "data": "d", "template": "superni", "metric": "rouge_l", "tasks": tuple("abcde")}
    config = RunConfig(order=order, **options)
    shape = CONFIGS[name]()
    shape.decoder_start_token_id, shape.pad_token_id = 0, 0
    expected = estimate(config, shape, torch.float32)["train"]

    model, steps = base(name, torch.float32), []
    batch = examples(model, BATCH, LENGTH, ANSWER)

    def two_steps():
        full = learned(model, 5)
        if checkpointing:
            full.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        steps.append(step(full, batch, encoder_decoder))
        steps[0]()
        steps[0]()

    measured = peak_bytes(two_steps) + sum(p.nbytes for p in model.parameters())
    assert expected == pytest.approx(measured, rel=0.15)
