"""The benchmarks run, on tiny shapes; what they measure is never asserted here."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import covariance, evaluation, generation, gpu, subspaces, training
from benchmarks.measure import Row, machine, peak_bytes


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


def test_peak_memory_counts_what_is_alive_at_once():
    def work():
        a = torch.zeros(1000, 250)  # 1 MB, as each below
        b = a + 1
        del a
        return b @ torch.zeros(250, 1000)[:, :250]

    work()  # what the first product allocates once
    assert peak_bytes(work) == pytest.approx(3e6, rel=0.01)


def test_rows_are_kept_by_group_and_machine(tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{runner.BEGIN}\n{runner.END}\nafter\n")
    here, other = machine(), {**machine(), "gpu": "some GPU"}

    def row(name, ratio, target="<= 1.15", where=here):
        return dataclasses.replace(Row(name, ratio, target, "detail"), machine=where)

    runner.keep("generation", [row("b", 1.1)], tmp_path)
    runner.keep("training", [row("a", 1.2), row("a2", 2, "")], tmp_path)
    runner.keep("generation", [row("b", 1.0, where=other)], tmp_path)
    runner.keep("training", [row("a", 1.0)], tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(r["name"], r["ratio"], r["holds"], "gpu" in r["machine"]) for r in found] == [
        ("a", 1.0, True, False),
        ("b", 1.1, True, False),
        ("b", 1.0, True, True),
    ]
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("| what |") == 2
    assert Row("x", 3.0, ">= 3", "").holds and not Row("x", 2.9, ">= 3", "").holds and Row("x", 1, "", "").holds is None
