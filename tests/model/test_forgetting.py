"""Behaviour of a model that can really learn: sequential LoRA forgets, GainLoRA(InfLoRA) does not.

The base is a tiny Llama, pretrained for some seconds on a made-up language in which a word belongs to a topic and
texts stay within their topic. It shows the mechanics end to end; it is no claim about natural language.
"""

import random

import pytest
import torch

from tests.runs import learn
from tests.tiny import tiny_llama, tiny_params, tiny_tokenizer, write_split

TOPICS, WORDS, TASKS = 12, 5, 3
"""Topics per task are TOPICS / TASKS; the answer to a text is a label of its topic."""
LABELS = ["red", "green", "blue", "up"]


def words(topic, chooser, count):
    return [f"w{WORDS * topic + chooser.randrange(WORDS)}" for _ in range(count)]


def pretrain(folder):
    """Next-word prediction on texts of one topic each."""
    tokenizer = tiny_tokenizer()
    sizes = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_key_value_heads=4)
    model = tiny_llama(**sizes, initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    chooser = random.Random(0)
    for _ in range(250):
        texts = []
        for _ in range(32):
            # a text, then "Output :" and any label: the base knows the format but not which label is right
            text = words(chooser.randrange(TOPICS), chooser, 8)
            texts.append(" ".join(["Sort task", str(chooser.randrange(9)), *text, "Output :", chooser.choice(LABELS)]))
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tasks(folder):
    """Task k: which of its four topics is the text about? The same four labels serve every task."""
    chooser, names = random.Random(1), []
    for k in range(TASKS):
        for split, size in (("train", 320), ("test", 80)):
            texts = [words(4 * k + i % 4, chooser, 8) for i in range(size)]
            instances = [{"input": " ".join(text), "output": LABELS[(i + k) % 4]} for i, text in enumerate(texts)]
            write_split(folder / f"topics{k + 1}", split, instances, f"Sort task {k + 1}")
        names.append(f"topics{k + 1}")
    return names


@pytest.mark.slow
def test_sequential_lora_forgets_and_gainlora_does_not(tmp_path):
    pretrain(tmp_path / "base")
    tiny_params(
        tmp_path, tmp_path / "base", 0, orders__tiny__tasks=write_tasks(tmp_path / "data" / "tiny"), lora__rank=8,
        lora__alpha=32, gate__hidden=16, subspace__threshold=0.98, subspace__gate_threshold=0.98, train__epochs=6,
        train__learning_rate=2e-2, train__batch_size=16, data__test_limit=None, data__train_limit=None,
    )  # fmt: skip
    results = {method: learn(tmp_path, method=method).result() for method in ("seqlora", "gainlora-inflora")}
    forgotten = {method: result["FT"] for method, result in results.items()}
    assert all(result["R"][t][t] > 70 for result in results.values() for t in range(TASKS))  # each task is learned
    # over seeds 1 to 4: seqlora 30 to 46, gainlora-inflora 0
    assert forgotten["seqlora"] > 20
    assert forgotten["gainlora-inflora"] < 5 and results["gainlora-inflora"]["AP"] > 85
