"""Published shapes, and counts of what trains: the paper's models by hand, tiny ones against the real thing."""

import pytest
import torch

from gainlora.model import shapes
from gainlora.model.memory import without_weights
from tests.tiny import tiny_adapter, tiny_llama, tiny_t5


@pytest.mark.parametrize(
    ("name", "parameters", "width", "q", "v", "attentions"),
    [
        ("t5-large", 737_668_096, 1024, 1024, 1024, 24 + 2 * 24),  # encoder; decoder's self- and cross-attention
        ("t5-xl", 2_849_757_184 - 32_128 * 2048, 2048, 2048, 2048, 24 + 2 * 24),  # the output layer is tied here
        ("llama-2-7b", 6_738_415_616, 4096, 4096, 4096, 32),
        ("llama-2-13b", 13_015_864_320, 5120, 5120, 5120, 40),
        ("llama-3-8b", 8_030_261_248, 4096, 32 * 128, 8 * 128, 32),  # 8 of 32 heads have keys and values
        ("smollm2-135m", 134_515_008, 576, 9 * 64, 3 * 64, 30),
    ],
)
def test_models_have_their_published_size_no_weights_and_adapted_queries_and_values(
    name, parameters, width, q, v, attentions
):
    built = list(without_weights(shapes.MODELS[name](), torch.float32).parameters())
    assert sum(p.numel() for p in built) == parameters and {p.device.type for p in built} == {"meta"}
    shape = shapes.shape(name)
    assert shape.width == width and shape.encoder_decoder == name.startswith("t5")
    assert list(shape.layers) == [(width, q), (width, v)] * attentions


def test_methods_of_the_paper():
    """Figure 3 there; InfLoRA at rank 4 trains B alone."""
    count = shapes.trainable_parameters
    assert 144 * 1024 * 4 == 589_824 and 1024 * 100 + 100 * 1024 + 1024 == 205_824  # branch and gate of T5-Large
    assert count("t5-large", "gainlora-inflora", 4) == 589_824 + 205_824 == 795_648
    assert count("t5-large", "inflora", 4) == 589_824
    assert count("t5-large", "gainlora-inclora", 4) == 2 * 589_824 + 205_824
    assert count("llama-2-7b", "gainlora-inflora", 4) == 1_048_576 + 413_696 == 1_462_272
    assert count("llama-2-7b", "gainlora-inflora", 4, gate_hidden=10, gate_depth=1) == 1_048_576 + 4096 * 4097


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("method", ["inclora", "inflora", "gainlora-inclora", "gainlora-inflora"])
def test_a_count_is_that_of_a_model_that_learns(make, depth, method):
    """Of a second branch, with a frozen one before it."""
    train_A = method.endswith("inclora")
    model = tiny_adapter(make(), 2, method.startswith("gainlora-"), learning=True, train_A=train_A, depth=depth)
    count = shapes.trainable_parameters(make(), method, rank=2, gate_hidden=6, gate_depth=depth)
    assert count == model.trainable_parameters() > 0
