"""The benchmarks run, on tiny shapes; what they measure is never asserted here."""

import math

import pytest
import torch

from benchmarks import compiled, covariance, evaluation, generation, gpu, subspaces, training


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-t5", "tiny-llama"])
def test_every_group_of_a_model_runs(name, monkeypatch):
    monkeypatch.setattr(generation, "BRANCHES", 2)
    rows = [
        *training.rows(name, batch_size=2, length=16, rounds=1),  # asserts that compared sides compute the same
        *gpu.rows(name, torch.float32, 2, 16, rounds=1, answer=4),
        generation.row(name, rounds=1),
        evaluation.row(name, count=20, rounds=1),  # asserts equal predictions
        covariance.row(name, rounds=1),
        subspaces.row(name, rounds=1),
    ]
    assert all(math.isfinite(row.ratio) and row.detail for row in rows)  # a difference of times may be below 0
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.slow
def test_compiled_steps_are_timed_beside_others_and_the_first_one_alone(monkeypatch):
    """Traced, but not translated to C++ or Triton."""
    monkeypatch.setattr(compiled, "MANY", 2)
    row = compiled.row("tiny-llama", rounds=1, batch_size=2, length=16, backend="aot_eager")
    torch.compiler.reset()
    assert 0 < row.ratio < math.inf and "the first step" in row.detail and row.holds is None
