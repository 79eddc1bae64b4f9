"""Published architectures without weights, and the number of parameters that a method trains per task.

    branch   every adapted layer (d_in -> d_out):  A (r, d_in), if the rule trains it, and B (d_out, r)
    gate     d -> hidden -> .. -> hidden -> d, no biases, and the key (d,)

The models are built on torch's meta device: real modules and shapes, no memory, no network. Only options that decide
shapes are set. A d below is the width of the token embeddings.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, T5Config

from gainlora import rules
from gainlora.model.gate import widths
from gainlora.model.layers import features
from gainlora.model.memory import without_weights
from gainlora.model.targets import find_targets

_t5 = partial(T5Config, vocab_size=32128, d_kv=64)
MODELS: dict[str, Callable[[], Any]] = {
    # google-t5/t5-large: 24 + 24 layers
    "t5-large": partial(_t5, d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    # google/t5-v1_1-xl, the same shapes as its LM-adapted and Flan versions. "XL" is the name of T5 1.1; the first
    # T5's model of that size is t5-3b (d_model 1024, d_kv 128, d_ff 16384, 32 heads). The checkpoint has an output
    # layer of its own (32128, 2048); transformers ties a model that is built from the config alone.
    "t5-xl": partial(
        _t5, d_model=2048, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    # meta-llama/Llama-2-7b-hf
    "llama-2-7b": partial(
        LlamaConfig, vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32,
    ),
    # meta-llama/Llama-2-13b-hf
    "llama-2-13b": partial(
        LlamaConfig, vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40,
    ),
    # meta-llama/Meta-Llama-3-8B: grouped-query attention, v is 4096 -> 1024
    "llama-3-8b": partial(
        LlamaConfig, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    ),
    # HuggingFaceTB/SmolLM2-135M-Instruct: v is 576 -> 192
    "smollm2-135m": partial(
        LlamaConfig, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Name -> its transformers config, from the config.json of the hub's model named above it."""


@dataclass(frozen=True)
class Shape:
    """The shapes of a model that determine the number of trained parameters."""

    width: int
    """d"""
    layers: tuple[tuple[int, int], ...]
    """(d_in, d_out) of every adapted layer, in the model's order."""
    encoder_decoder: bool


@cache
def shape(model: str | nn.Module) -> Shape:
    """The shape of a model.

    Args:
        model: a name of `MODELS`, or a transformers model that is not yet wrapped in a GainLoRAModel.
    """
    built: Any = without_weights(MODELS[model](), torch.float32) if isinstance(model, str) else model
    layers = [features(built.get_submodule(name)) for name in find_targets(built, None)]
    return Shape(built.get_input_embeddings().weight.shape[1], tuple(layers), built.config.is_encoder_decoder)


def trainable_parameters(
    model: str | nn.Module, method: str, rank: int, gate_hidden: int | None = None, gate_depth: int = 2
) -> int:
    """Trained parameters of a task t >= 2: its branch and, with `gainlora-X`, its gate.

    Args:
        model: as of `shape`.
        method: X, gainlora-X or routed-X, X a branch rule.
        gate_hidden: None: the paper's, 100 for T5, 50 for Llama.
    """
    found, train_A = shape(model), rules.get(method).train_A
    branch = sum(rank * (d_out + train_A * d_in) for d_in, d_out in found.layers)
    if not method.startswith(rules.GATED):
        return branch
    hidden = gate_hidden or (100 if found.encoder_decoder else 50)
    layers = itertools.pairwise(widths(found.width, hidden, gate_depth))
    return branch + sum(d_in * d_out for d_in, d_out in layers) + found.width
