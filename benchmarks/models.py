"""The models that are measured: published shapes with their real vocabularies, and random weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, LlamaConfig, T5Config

from gainlora.model.adapter_config import GainLoRAConfig
from gainlora.model.base import pick_device, pick_dtype
from gainlora.model.gate import Gate, GateWeights, first_hidden, widths
from gainlora.model.modeling import GainLoRAModel
from gainlora.model.shapes import MODELS

RANK = 4
SMALL = ("t5-small", "smollm2-135m")
CONFIGS: dict[str, Any] = {
    **MODELS,
    "t5-small": T5Config,  # its defaults are google-t5/t5-small's
    "tiny-t5": lambda: T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=500),
    "tiny-llama": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=500
    ),
}


def default_dtype() -> torch.dtype:
    """The dtype that a run would pick for the base on this machine."""
    return pick_dtype("auto", pick_device())


def base(name: str, dtype: torch.dtype | None = None) -> Any:
    """A frozen base model on the device that a run would pick; the same weights every time."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    kind: Any = AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind, config.decoder_start_token_id = AutoModelForSeq2SeqLM, 0
    with pick_device():
        model = kind.from_config(config, dtype=dtype or default_dtype())
    # plain greedy search that no EOS ends
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=0, decoder_start_token_id=0 if config.is_encoder_decoder else None
    )
    # Logits of the last position are a strided slice, for which a linear layer copies its whole weight once per
    # sample. GainLoRAModel avoids that; here every side does, so that the branches' cost is what is compared.
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    return model.eval().requires_grad_(False)


def learned(model: Any, branches: int, gated: bool = True, learning: bool = True) -> GainLoRAModel:
    """A GainLoRAModel with that many random branches; with `learning` the newest one is being trained, A and B."""
    adapter = GainLoRAConfig("", RANK, 2 * RANK, integration="gated" if gated else "equal")
    wrapped = GainLoRAModel(model, adapter)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    shape = widths(wrapped.width, adapter.gate_hidden, adapter.gate_depth)
    for task in range(branches):
        branch = {
            name: (random(RANK, layer.in_features), random(layer.out_features, RANK))
            for name, layer in wrapped.layers.items()
        }
        gate = None
        if gated:  # with a memory of 5 directions per task
            memory = [torch.linalg.qr(random(d, min(5 * task, d))).Q for d in shape]
            gate = Gate(GateWeights(first_hidden(shape, generator), random(1, shape[-1])), memory, "cosine")
        wrapped.start_branch(branch, True, gate)
        if task < branches - 1 or not learning:
            wrapped.freeze_branch(f"task{task + 1}")
    return wrapped


def prompts(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (batch, length) of random prompts."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(pick_device())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def examples(model: Any, batch: int, length: int, answer: int = 8) -> dict[str, Tensor]:
    """A training batch of random prompts and answers, as `gainlora.data.collate.collate` makes them."""
    inputs = prompts(model, batch, length)
    if model.config.is_encoder_decoder:
        return {**inputs, "labels": inputs["input_ids"][:, :answer].clone()}
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    positions = torch.arange(length, device=labels.device).expand(batch, -1)
    return {**inputs, "labels": labels, "position_ids": positions}
