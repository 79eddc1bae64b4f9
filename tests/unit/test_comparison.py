"""What compares runs: groups, the main table, the paper's figures, gates, costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gainlora.tracking import comparison, costs, gates
from gainlora.tracking.document import Block, Table
from gainlora.tracking.folder import Run, read_run
from gainlora.tracking.groups import CONSTRAINTS, GATE_OPTIONS, Group, families, group_runs, spread, without_variants
from gainlora.tracking.published import other_setup, published_beside, published_figures
from tests.fake_run import TASKS, write_run

THREE = TASKS[:3]
WHOLE = {"data.train_limit": None, "data.test_limit": None}
FIFTEEN = [f"task{i}" for i in range(15)]


def run(root: Path, AP: float, method: str = "gainlora-inflora", seed: int = 42, drop: float = 0.0, **how: Any) -> Run:
    """A run that ends with this AP; each earlier task lost `drop` (FT)."""
    tasks = how.pop("tasks", THREE)
    T = len(tasks)
    matrix = [[AP + drop] * t for t in range(1, T)] + [[AP] * T]
    return read_run(write_run(root, matrix, method, seed, tasks, steps=1, examples=2, **how))


def tables(blocks: list[Block]) -> list[Table]:
    return [block for block in blocks if isinstance(block, Table)]


@pytest.mark.parametrize(
    ("values", "text"),
    [([], "-"), ([None], "-"), ([80.0], "80.0"), ([80.0, 76.0, None], "78.0 ± 2.8"), ([1.0, 2.0, 3.0], "2.0 ± 1.0")],
)
def test_spread_is_the_mean_and_the_sample_deviation(values: list[float | None], text: str) -> None:
    assert spread(values, 1) == text


def test_groups_differ_in_more_than_the_seed(tmp_path: Path) -> None:
    runs = [run(tmp_path, 80 + seed, seed=seed) for seed in (1, 2, 3)]
    runs += [run(tmp_path, 70, "inflora"), run(tmp_path, 60, seed=1, options={"gate.hidden": 10})]
    groups = group_runs(runs)
    assert [group.label for group in groups] == ["inflora", "gainlora-inflora", "gainlora-inflora, gate.hidden=10"]
    assert [len(group.runs) for group in groups] == [1, 3, 1]
    assert groups[1].measured("AP") == [81, 82, 83]


def test_code_tells_runs_apart_only_where_a_seed_was_run_twice(tmp_path: Path) -> None:
    once = [run(tmp_path, 80, seed=1, code="aaaa"), run(tmp_path, 82, seed=2, code="bbbb")]
    assert [group.label for group in group_runs(once)] == ["gainlora-inflora"]
    twice = group_runs([*once, run(tmp_path, 84, seed=1, code="bbbb")])
    assert sorted(group.label for group in twice) == [f"gainlora-inflora, code={c}0000" for c in ("aaaa", "bbbb")]


def test_other_weights_in_a_models_place_are_another_group(tmp_path: Path) -> None:
    runs = [run(tmp_path, 80 + seed, seed=seed, model="mine") for seed in (1, 2, 3)]
    for one, weights in zip(runs, ("a" * 64, "a" * 64, "b" * 64), strict=True):
        one.config["base"] = weights
    groups = group_runs(runs)
    assert [len(group.runs) for group in groups] == [2, 1]
    assert [group.label for group in groups] == [f"gainlora-inflora, base={c * 8}" for c in "ab"]
    del runs[2].config["base"]  # older results do not name them
    assert [len(group.runs) for group in group_runs(runs)] == [3]


def test_the_main_table_has_a_table_per_model_and_columns_per_order(tmp_path: Path) -> None:
    runs = [run(tmp_path, AP, seed=seed, drop=drop) for seed, AP, drop in ((1, 80, 2), (2, 76, 4))]
    runs += [run(tmp_path, 50, "seqlora", order="other"), run(tmp_path, 66, model="large")]
    runs.append(read_run(write_run(tmp_path, [[90.0]], seed=3, tasks=THREE)))  # unfinished
    large, small = sorted(tables(comparison.methods(group_runs(runs), 1)), key=lambda table: len(table.head))
    assert list(large.rows) == [["gainlora-inflora", "66.0", "0.0", "1"]]
    assert small.head == [
        "method",
        *(f"{order} {name}" for order in ("embedded", "other") for name in ("AP", "FT", "seeds")),
    ]
    assert small.rows == [
        ["gainlora-inflora", "78.0 ± 2.8", "3.0 ± 1.4", "2 of 3", "-", "-", "-"],
        ["seqlora", "-", "-", "-", "50.0", "0.0", "1"],
    ]


@pytest.mark.parametrize(
    ("gated", "equal", "verdict", "numbers"),
    [
        ((84.0, 0.5), (74.0, 5.0), "beats equal", "AP +10.0 (84.0 against 74.0), FT 5.0 -> 0.5"),
        ((70.0, 5.0), (74.5, 1.0), "loses to equal", "AP -4.5 (70.0 against 74.5), FT 1.0 -> 5.0"),
        ((70.0, 1.0), (70.0, 1.0), "equals equal", "AP +0.0 (70.0 against 70.0), FT 1.0 -> 1.0"),
    ],
)
def test_gated_against_equal_is_computed(tmp_path: Path, gated: Any, equal: Any, verdict: str, numbers: str) -> None:
    runs = [run(tmp_path, gated[0], "gainlora-inflora", 1, gated[1]), run(tmp_path, equal[0], "inflora", 1, equal[1])]
    runs += [run(tmp_path, 99.0, "inclora", 1)]  # without a gated partner
    (said,) = comparison.gated_against_equal(group_runs(runs), 1)
    assert said == f"Same budget: gated {verdict} for rule inflora on embedded: {numbers} (1 seed)."


def test_gated_against_equal_uses_the_seeds_of_both(tmp_path: Path) -> None:
    runs = [run(tmp_path, AP, seed=seed) for seed, AP in ((1, 80), (2, 84), (3, 10))]
    runs += [run(tmp_path, AP, "inflora", seed=seed) for seed, AP in ((1, 70), (2, 70))]
    (said,) = comparison.gated_against_equal(group_runs(runs), 1)
    assert "AP +12.0 (82.0 ± 2.8 against 70.0 ± 0.0)" in said and said.endswith("(2 seeds that both have).")
    apart = group_runs([run(tmp_path, 84, seed=8), run(tmp_path, 74, "inflora", seed=9)])
    assert comparison.gated_against_equal(apart, 1) == []


@pytest.mark.parametrize("options", [{"train.epochs": 2}, {"lora.rank": 4}, {"data.train_limit": None}])
def test_unequal_budgets_are_said_and_not_compared(tmp_path: Path, options: dict[str, Any]) -> None:
    groups = group_runs([run(tmp_path, 84), run(tmp_path, 74, "inflora", options=options)])
    assert comparison.gated_against_equal(groups, 1) == []
    (said,) = comparison.unequal(groups)
    assert next(iter(options)) in said
    same = group_runs([run(tmp_path, 84, seed=5), run(tmp_path, 74, "inflora", 5, options={"gate.hidden": 7})])
    assert len(comparison.gated_against_equal(same, 1)) == 1 and comparison.unequal(same) == []


def test_ablations_and_gate_options_are_families(tmp_path: Path) -> None:
    varied = [{}, {"gate.constrain_init": False}, {"gate.hidden": 10}, {"gate.hidden": 200}, {"lora.rank": 2}]
    groups = group_runs([run(tmp_path, 70 + at, options=options) for at, options in enumerate(varied)])
    (constraints,), (hidden,) = families(groups, CONSTRAINTS), families(groups, ["gate.hidden"])
    assert {group.options["gate.constrain_init"] for group in constraints} == {True, False}
    assert sorted(group.options["gate.hidden"] for group in hidden) == [10, 50, 200]
    assert families(groups, ["gate.depth"]) == []
    left = without_variants(groups, (*GATE_OPTIONS, *CONSTRAINTS))
    assert [group.label for group in left] == ["gainlora-inflora", "gainlora-inflora, lora.rank=2"]
    (table,) = tables(comparison.ablation(groups, 1))
    assert [row[3:] for row in table.rows] == [["yes", "yes", "1", "70.0", "0.0"], ["no", "yes", "1", "71.0", "0.0"]]
    (table,) = tables(comparison.gate_options(groups, 1))
    assert [row[1:4] for row in table.rows] == [["10", "1", "72.0"], ["50", "1", "70.0"], ["200", "1", "73.0"]]


PAPER = {"order": "order1", "tasks": FIFTEEN, "model": "t5-large", "options": WHOLE}


@pytest.mark.parametrize(
    ("how", "figures"),
    [
        ({}, (46.21, 2.40)),
        ({"method": "inflora"}, (39.78, 7.64)),
        ({"method": "nlora"}, None),
        ({"order": "embedded"}, None),
        ({"model": "smollm2-135m"}, None),
        ({"tasks": FIFTEEN[:14]}, None),
        ({"options": {**WHOLE, "data.train_limit": 320}}, None),
        ({"options": {**WHOLE, "data.test_limit": 100}}, None),
        ({"options": {**WHOLE, "gate.constrain_init": False}}, (45.38, 3.40)),
        ({"options": {**WHOLE, "gate.constrain_init": False, "gate.constrain_update": False}}, (36.75, 12.18)),
        ({"method": "inflora", "options": {**WHOLE, "gate.constrain_init": False}}, (39.78, 7.64)),
    ],
)
def test_published_figures_stand_beside_the_same_setup_alone(tmp_path: Path, how: Any, figures: Any) -> None:
    groups = group_runs([run(tmp_path, 50, **{**PAPER, **how})])
    beside = published_beside(groups[0])
    assert (beside and (beside.AP, beside.FT)) == figures
    heads = [name for table in tables(comparison.methods(groups, 1)) for name in table.head]
    assert any("published" in name for name in heads) == (figures is not None)
    shown = sum(cell != "-" for table in tables(other_setup(groups)) for row in table.rows for cell in row[1:])
    assert shown == 2 * (len(published_figures()) - (figures is not None))


def test_published_figures_do_not_stand_beside_unfinished_or_varied_runs(tmp_path: Path) -> None:
    part = read_run(write_run(tmp_path, [[50.0]], "inflora", 1, FIFTEEN, "order1", model="t5-large", options=WHOLE))
    runs = [run(tmp_path, 50, seed=s, **{**PAPER, "options": {**WHOLE, "gate.hidden": 100 * s}}) for s in (1, 2)]
    assert [published_beside(group) for group in group_runs([part, *runs])] == [None] * 3


def gated_group(root: Path, means: list[list[float]]) -> Group:
    """A finished run whose gates answer means[task][branch]."""
    import json

    folder = write_run(root, [[50.0] * t for t in (1, 2, 3)], tasks=THREE, examples=2, steps=1)
    answers = {task: {"mean": row, "std": [0.0] * 3} for task, row in zip(THREE, means, strict=True)}
    (folder / "task_03_text_source" / "coefficients.json").write_text(json.dumps(answers))
    return group_runs([read_run(folder)])[0]


def test_branches_on_their_own_earlier_and_later_tasks(tmp_path: Path) -> None:
    group = gated_group(tmp_path, [[0.9, 0.1, 0.2], [0.3, 0.8, 0.4], [0.5, 0.6, 0.7]])
    roles = gates.branch_roles(group.runs[0])
    # branch 1: no earlier task, later (0.3 + 0.5) / 2; branch 2: 0.1, 0.6; branch 3: (0.2 + 0.4) / 2, none later
    assert roles == [(0.9, None, pytest.approx(0.4)), (0.8, 0.1, 0.6), (0.7, pytest.approx(0.3), None)]
    (table,) = tables(gates.gate_outputs([group]))
    own, earlier, later = (row[2:] for row in table.rows)
    assert own == ["0.90", "0.80", "0.70", "0.80"]
    assert earlier == ["-", "0.10", "0.30", "0.20"]  # mean of 0.1 and 0.3
    assert later == ["0.40", "0.60", "-", "0.50"]


def test_methods_without_gates_have_no_gate_outputs(tmp_path: Path) -> None:
    assert gates.gate_outputs(group_runs([run(tmp_path, 50, "inclora")])) == []


def test_costs_are_those_of_the_steps(tmp_path: Path) -> None:
    groups = group_runs([run(tmp_path, 50, seed=seed) for seed in (1, 2)])
    found = costs.group_costs(groups[0])
    # the fake run: 6 s train, 1 + 0.5 s around, 2.5 s for 2 examples of each task seen; 600 t + 70 t + 12 stored
    assert found[1] == costs.Cost(460_800, 682, 6.0, 1.5, 2.5 / 2)
    assert found[3] == costs.Cost(460_800, 2022, 6.0, 1.5, 2.5 / 6)
    (table,) = tables(costs.ledger(groups))
    row = ["gainlora-inflora", "1, 3", "460,800", "682", "2,022", "6.0", "1.5", "1.250", "0.417"]
    assert list(table.rows) == [row]


def test_trainable_parameters_are_the_papers_and_join_methods_that_train_the_same() -> None:
    described = {"order": "x", "seed": 1, "model": "smollm2-135m"}
    groups = [
        Group([Run({**described, "method": method}, {}, [])], {}, {})
        for method in ("seqlora", "inclora", "gainlora-inflora", "inflora", "no-such-method")
    ]
    (table,) = tables(costs.parameters(groups))
    assert [row[0] for row in table.rows] == ["seqlora, inclora", "gainlora-inflora", "inflora"]
    gated = dict(zip(table.head, table.rows[1], strict=True))
    assert (gated["t5-large"], gated["llama-2-7b"]) == ("795,648", "1,462,272")


def test_labelled_variants_stay_out_of_the_main_table(tmp_path: Path) -> None:
    variant = run(tmp_path, 70, options={"gate.constrain_init": False})
    groups = group_runs([run(tmp_path, 80), replace(variant, label="no-init")])
    assert [g.label for g in without_variants(groups, CONSTRAINTS)] == ["gainlora-inflora"]
    assert len(without_variants(groups, GATE_OPTIONS)) == 2
