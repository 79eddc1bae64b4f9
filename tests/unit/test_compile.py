"""`model.compile`: one graph without breaks, which learns what the same operations learn one by one."""

from functools import partialmethod

import pytest
import torch
from torch._dynamo.utils import counters

from gainlora.model.modeling import GainLoRAModel
from tests.runs import learn, project, state
from tests.tiny import tiny_llama

CASES = [
    ("llama", {"model__dtype": "bfloat16"}),
    ("biased", {}),  # outputs of the base's layers are views
    pytest.param("t5", {"method": "olora"}, marks=[pytest.mark.slow, pytest.mark.long]),
]


@pytest.mark.parametrize("kind, options", CASES, ids=str)
def test_compiled_training_learns_the_same(tmp_path, monkeypatch, kind, options):
    """Traced for autograd, but not translated to C++ or Triton: that takes minutes and rounds differently."""
    one, two = (project(tmp_path / part, kind, count=2, data__train_limit=16) for part in ("one", "two"))
    for root in (one, two) if kind == "biased" else ():
        tiny_llama(root / "base", attention_bias=True)
    expected = state(learn(one, **options))
    monkeypatch.setattr(GainLoRAModel, "compile_base", partialmethod(GainLoRAModel.compile_base, backend="aot_eager"))
    counters.clear()
    found = state(learn(two, model__compile=True, **options))
    assert not counters["graph_break"] and 2 <= counters["stats"]["unique_graphs"] <= 6
    torch.compiler.reset()
    assert found == expected
