"""The paper's orders run to their end: complete, on the real data where it is there, with the paper's ranks.

    GAINLORA_BENCHMARK=<folder with Long_Sequence/ and SuperNI/> pytest -m slow tests/unit/test_orders.py

Tiny random T5 and Llama models with a tokenizer trained on the tasks' texts; a few examples a task.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gainlora import rules
from gainlora.config import load_config
from gainlora.data.tasks import load_order
from gainlora.errors import GainLoRAError
from gainlora.model.modeling import GainLoRAModel
from gainlora.runs.run import Run
from tests.tiny import LABELS, tiny_llama, tiny_params, tiny_t5, trained_tokenizer

PROJECT = Path(__file__).resolve().parents[2]
ORDERS = ("order1", "order2", "order3", "order4")
MODELS = {"t5": "t5-large", "llama": "llama-2-7b"}
"""Whose published options are used."""
TRAIN, TEST, WIDTH = 12, 1, 128


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    """A few real examples of every task of the orders, and both models over them."""
    source = os.environ.get("GAINLORA_BENCHMARK")
    if not source:
        pytest.skip("GAINLORA_BENCHMARK names no folder")
    root, texts = tmp_path_factory.mktemp("orders"), []
    for name, suite in (("order1", "SuperNI"), ("order3", "Long_Sequence")):
        config = load_config(name, params=PROJECT / "params.yaml")
        limits = config.data.model_copy(update={"train_limit": TRAIN, "test_limit": TEST})
        tasks, skipped = load_order(config.order.model_copy(update={"data": str(Path(source) / suite)}), limits)
        assert len(tasks) == 15 and not skipped
        for task in tasks:
            for split in ("train", "test"):
                instances = [{"input": e.input, "output": list(e.references)} for e in getattr(task, split)]
                texts += [f"{task.prompt(e)}{e.references[0]}" for e in getattr(task, split)]
                path = root / suite / task.name / f"{split}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"Definition": [task.instruction], "Instances": instances}))
    tokenizer = trained_tokenizer(texts)
    for kind, model in (
        ("t5", tiny_t5(None, tokenizer, d_model=WIDTH, d_kv=16)),
        ("llama", tiny_llama(tokenizer=tokenizer, hidden_size=WIDTH)),
    ):
        # a falling spectrum, as trained embeddings have; an even one would fill every memory within a few tasks
        turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))).Q
        weight = model.get_input_embeddings().weight
        weight.data = weight.data * torch.arange(1, WIDTH + 1) ** -1.0 @ turn
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return root


def check(stream: Run, tasks: int) -> int:
    """The run ended, all it learned is finite, and rows of A that are zero have columns of B that are. Their number."""
    result, steps = stream.result(), len(stream.steps)
    assert len(result["tasks"]) == tasks and stream.finished == steps
    assert torch.tensor([[0.0 if s is None else s for s in row] for row in result["R"]]).isfinite().all()
    state = {}
    for file in stream.task_folder(steps).glob("*.safetensors"):
        state |= load_file(file)
    assert all(tensor.isfinite().all() for tensor in state.values())
    records = [json.loads((stream.task_folder(t) / "scores.json").read_text()) for t in range(1, steps + 1)]
    found = 0
    for name in (key.removesuffix(".lora_A") for key in state if key.endswith("lora_A")):
        A, B = state[f"{name}.lora_A"], state[f"{name}.lora_B"]  # (T, r, d_in), (T, d_out, r)
        zero = ~A.any(-1)
        assert not B.transpose(1, 2)[zero].any()
        found += int(zero.sum())
        if len(A) == steps and stream.config.subspace.covariance_blocks == 1:
            assert [int(n) for n in zero.sum(-1)] == [record["zero_rows"].get(name, 0) for record in records]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "order", "method"),
    [
        *((kind, order, m) for kind in MODELS for order in ORDERS for m in ("inflora", "gainlora-inflora")),
        *(("t5", "order4", m) for m in rules.methods() if not m.endswith("inflora")),
        *(("llama", "order2", m) for m in rules.methods() if not m.endswith("inflora")),
    ],
)
def test_the_papers_orders_end_on_the_real_data(benchmark, kind, order, method):
    options = {
        "model.name": MODELS[kind],
        "model.source": str(benchmark / kind),
        "order.data": str(benchmark / ("SuperNI" if order in ("order1", "order2") else "Long_Sequence")),
        "data.max_prompt_tokens": 64,
        "data.max_target_tokens": 4,
        "train.epochs": 1,
        "train.batch_size": 8,
        "train.checkpoint_every": None,
    }
    started = time.perf_counter()
    with Run.create(load_config(order, {"method": method, **options}, PROJECT / "params.yaml"), benchmark) as stream:
        stream.learn()
        zero = check(stream, 15)
    if kind == "t5" and method.endswith("inflora"):
        assert zero  # the decoder's first layers see fewer directions than the rank
    print(
        f"\n{kind} {order} {method}: {len(stream.tasks)} tasks, {zero} zero rows, {time.perf_counter() - started:.0f} s"
    )


def binary_tasks(root: Path, **options) -> None:
    """A tiny T5 and two tasks with the same two answers, rank 8: twins of the benchmark's true-or-false tasks."""
    tiny_t5(root / "base")
    tiny_params(root, root / "base", 2, lora__rank=8, **options)
    for path in root.glob("data/tiny/*/*.json"):
        content = json.loads(path.read_text())
        for instance in content["Instances"]:
            instance["output"] = "up" if instance["output"] in LABELS[::3] else "down"
        path.write_text(json.dumps(content))


FIRST = "decoder.block.0.layer.0.SelfAttention"
"""Sees the start token and the two answers: three directions, and after task 1 none that is new."""


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("inflora", {"train.weight_decay": 0.1}),
        ("gainlora-inflora", {}),
        ("gainlora-inflora", {"subspace.covariance_blocks": 2, "train.max_grad_norm": None}),
        ("gainlora-inflora", {"model.dtype": "bfloat16", "train.batch_size": 25}),  # fewer examples than a batch
    ],
)
def test_layers_with_fewer_inputs_than_the_rank_get_zero_rows(tmp_path, method, options):
    binary_tasks(tmp_path, subspace__threshold=0.9999)
    with Run.create(load_config("tiny", {"method": method, **options}, tmp_path / "params.yaml"), tmp_path) as stream:
        stream.learn()
        assert check(stream, 2)
    records = [json.loads((stream.task_folder(t) / "scores.json").read_text())["zero_rows"] for t in (1, 2)]
    blocks = stream.config.subspace.covariance_blocks
    for projection in ("q", "v"):
        assert [record[f"{FIRST}.{projection}"] for record in records] == [5 * blocks, 8 * blocks]
    assert not any(name.startswith("encoder") for name in records[0])
    B = load_file(stream.task_folder(1) / "adapter_model.safetensors")["encoder.block.0.layer.0.SelfAttention.q.lora_B"]
    assert B.any(-2).all()  # a layer with enough directions learns with every row


def test_zero_rows_survive_a_stop_and_merge(tmp_path, monkeypatch):
    """A run stopped within task 2 ends with the same bytes, and merged weights answer as the branches do."""
    binary_tasks(tmp_path, train__checkpoint_every=1, method="inflora")
    whole, stopped = (
        Run.create(load_config("tiny", {"data.test_limit": n}, tmp_path / "params.yaml"), tmp_path) for n in (7, 8)
    )
    step, taken = torch.optim.AdamW.step, []

    def stops(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == 5:  # the second step of task 2
            raise RuntimeError("stopped")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stops)
        with pytest.raises(RuntimeError, match="stopped"):
            stopped.learn()
    for stream in (whole, stopped):
        stream.learn()
        stream.close()
    files = [stream.task_folder(2) / "adapter_model.safetensors" for stream in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()
    inputs = {"input_ids": torch.tensor([[7, 8, 9, 1]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    labels = torch.tensor([[12, 1]])
    model = GainLoRAModel.from_pretrained(whole.task_folder(2), dtype="float32")
    with torch.no_grad():
        logits = model(**inputs, labels=labels).logits
        torch.testing.assert_close(model.merge_and_unload()(**inputs, labels=labels).logits, logits)


def test_a_task_that_no_layer_can_learn_is_refused_and_nothing_is_lost(tmp_path):
    tiny_llama(tmp_path / "base", hidden_size=16)
    tiny_params(tmp_path, tmp_path / "base", method="inflora", subspace__threshold=1.0)
    full = r"task task2: input memory is full: none of the 4 .*subspace\.threshold"
    config = load_config("tiny", params=tmp_path / "params.yaml")
    with Run.create(config, tmp_path) as stream, pytest.raises(GainLoRAError, match=full):
        stream.learn()
    assert stream.finished == 1 and not list(stream.folder.glob(".task*"))
