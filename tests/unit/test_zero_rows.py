"""Layers that see fewer new directions than the rank: their rows of A are zero, and learning goes on without them."""

import json

import pytest
from safetensors.torch import load_file

from gainlora.errors import GainLoRAError
from tests.runs import create, learn
from tests.tiny import LABELS, tiny_llama, tiny_params, tiny_t5

FIRST = "decoder.block.0.layer.0.SelfAttention"
"""Sees the start token and the two answers: three directions, and after task 1 none that is new."""


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("inflora", {"train__weight_decay": 0.1}),
        ("gainlora-inflora", {}),
        ("gainlora-inflora", {"subspace__covariance_blocks": 2, "train__max_grad_norm": None}),
        ("gainlora-inflora", {"model__dtype": "bfloat16", "train__batch_size": 25}),  # fewer examples than a batch
    ],
)
def test_layers_with_fewer_inputs_than_the_rank_get_zero_rows(tmp_path, method, options):
    """Two tasks with the same two answers, rank 8: twins of the benchmark's true-or-false tasks."""
    tiny_t5(tmp_path / "base")
    tiny_params(tmp_path, tmp_path / "base", 2, lora__rank=8, subspace__threshold=0.9999)
    for path in tmp_path.glob("data/tiny/*/*.json"):
        content = json.loads(path.read_text())
        for instance in content["Instances"]:
            instance["output"] = "up" if instance["output"] in LABELS[::3] else "down"
        path.write_text(json.dumps(content))
    run = learn(tmp_path, method=method, **options)
    state = load_file(run.task_folder(2) / "adapter_model.safetensors")
    recorded = [json.loads((run.task_folder(t) / "scores.json").read_text())["zero_rows"] for t in (1, 2)]
    blocks = run.config.subspace.covariance_blocks
    for name in (key.removesuffix(".lora_A") for key in state if key.endswith("lora_A")):
        A, B = state[f"{name}.lora_A"], state[f"{name}.lora_B"]  # (T, r, d_in), (T, d_out, r)
        assert A.isfinite().all() and B.isfinite().all() and not B.transpose(1, 2)[~A.any(-1)].any()
        if blocks == 1:
            assert [int(zero) for zero in (~A.any(-1)).sum(-1)] == [row.get(name, 0) for row in recorded]
    for projection in ("q", "v"):
        assert [row[f"{FIRST}.{projection}"] for row in recorded] == [5 * blocks, 8 * blocks]
    assert not any(name.startswith("encoder") for name in recorded[0])
    assert state["encoder.block.0.layer.0.SelfAttention.q.lora_B"][0].any(0).all()  # with enough, every row learns


def test_a_rule_without_input_memory_has_no_zero_rows_whatever_the_blocks(tmp_path):
    tiny_llama(tmp_path / "base")
    tiny_params(tmp_path, tmp_path / "base", 1, method="gainlora-olora", subspace__covariance_blocks=3)
    run = learn(tmp_path)  # 3 does not divide 32
    assert json.loads((run.task_folder(1) / "scores.json").read_text())["zero_rows"] == {}


def test_a_task_that_no_layer_can_learn_is_refused_and_nothing_is_lost(tmp_path):
    tiny_llama(tmp_path / "base", hidden_size=16)
    tiny_params(tmp_path, tmp_path / "base", method="inflora", subspace__threshold=1.0)
    full = r"task task2: input memory is full: none of the 4 .*subspace\.threshold"
    with create(tmp_path) as run, pytest.raises(GainLoRAError, match=full):
        run.learn()
    assert run.finished == 1 and not list(run.folder.glob(".task*"))
