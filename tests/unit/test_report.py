"""Reports: tables and statistics hold hand-computed numbers."""

import io
import re
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from gainlora.report.frame import (
    CONSTRAINTS,
    GATE_OPTIONS,
    Frame,
    bounds,
    differs,
    example_bounds,
    span,
    spread,
)  # fmt: skip
from gainlora.report.one_run import matrix_table
from gainlora.report.report import report_page
from gainlora.runs.records import Key, read_run
from tests.fake_run import FORGETS, THREE, R, run_of, write_run

FIFTEEN = [f"task{i}" for i in range(15)]


def run(root, AP, method="gainlora-inflora", seed=42, drop=0.0, **how):
    """A run that ends with this AP; each earlier task lost `drop` (FT)."""
    tasks = how.pop("tasks", THREE)
    T = len(tasks)
    matrix = [[AP + drop] * t for t in range(1, T)] + [[AP] * T]
    return read_run(write_run(root, matrix, method, seed, tasks, steps=1, examples=2, **how))


def page(records):
    return report_page(records, 1).markdown


def section(text, heading):
    """The rows of the first table below a heading of a page."""
    text = text.partition(f" {heading}\n")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    after = re.split(r"\n\n(?!\|)", text[text.index("|") :])[0].count("\n") + 1 if "|" in text else 0
    return rows[:1] + rows[2:after]


def names(frame, groups=None):
    return list((frame.groups if groups is None else groups)["name"])


# ---- the terminal -------------------------------------------------------------------------------


def printed(results, decimals=1, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(matrix_table(results, decimals))
    return console.file.getvalue()


def test_console_tables_hold_R_and_the_measures(tmp_path):
    text = printed([run_of(tmp_path, R).result])
    assert re.search(r"3 text_source +82\.0 +87\.0 +71\.0", text) and "AP 80.0   FT 1.5   BWT -1.5" in text
    several = printed([run_of(tmp_path, FORGETS, "seqlora").result, run_of(tmp_path, R[:1], "inflora").result], 2)
    assert re.search(r"embedded +seqlora +smollm2-135m +42 +3/3 +40\.00 +48\.00 +-48\.00", several)
    assert re.search(r"embedded +inflora +smollm2-135m +42 +1/3 +84\.00 +- +-", several)
    long = [f"task{i}_with_a_rather_long_name_like_the_benchmarks" for i in range(15)]
    text = printed([run(tmp_path, 57.0, tasks=long).result], width=80)
    assert max(map(len, text.splitlines())) <= 80 and long[14] in text
    assert re.search(r"^ *15 +" + r"57\.0 *" * 15, text, re.MULTILINE), text


def test_methods_differ_where_the_intervals_over_seeds_and_over_examples_exclude_0(tmp_path):
    def ends_at(AP, method, seed):
        return read_run(write_run(tmp_path, [[AP]], method, seed, THREE[:1], steps=1, examples=400))

    pairs = [(ends_at(80, "gainlora-inflora", seed), ends_at(70, "inflora", seed)) for seed in (1, 2)]
    low, high = example_bounds(pairs)
    half = 1.96 * 100 * (0.1 * 0.9 / 400) ** 0.5  # 40 of 400 answers differ, the same ones with both seeds
    assert (low, high) == pytest.approx((10 - half, 10 + half), abs=0.5)
    clear, unclear = pd.Series([9.0, 10.0, 11.0]), pd.Series([-20.0, 10.0, 40.0])
    assert differs(clear, (low, high)) and differs(-clear, (-high, -low))
    assert (
        not differs(unclear, (low, high)) and not differs(clear, (-1.0, 20.0)) and not differs(clear[:1], (low, high))
    )
    assert not differs(clear, example_bounds([])) and not differs(clear, (-high, -low))


def test_what_was_learned_and_passed_on_stands_beside_single(tmp_path):
    records = [run_of(tmp_path, R), run_of(tmp_path, [[90.0], [90.0, 95.0], [90.0, 95.0, 97.0]], "single")]
    records[0].steps[0].values[Key("general.loss")] = 9.0  # the last step alone counts
    gated, single = section(page(records), "Learning, transfer and general ability")[1:]
    assert gated[3:8] == ["81.0", "82.8", "4.0", "13.0", "0.250"] and single[3] == "94.0"


# ---- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [([], "-"), ([None], "-"), ([80.0], "80.0"), ([80.0, 76.0, None], "78.0 ± 2.8"), ([1.0, 2.0, 3.0], "2.0 ± 1.0")],
)
def test_spread_is_the_mean_and_the_sample_deviation(values, text):
    assert spread(values, 1) == text


def test_paired_differences_have_a_t_interval(tmp_path):
    records = [run(tmp_path, AP, seed=seed, drop=2) for seed, AP in ((1, 80), (2, 84), (3, 10))]
    records += [run(tmp_path, 70, "inflora", seed, drop=5) for seed in (1, 2)]
    records += [run(tmp_path, 99, "inclora", 1)]  # without a gated partner
    # differences 10 and 14: mean 12, sd 2.83; t(0.975, 1) = 12.706; half width 12.706 * 2.83 / sqrt 2 = 25.4
    text = page(records)
    (row,) = section(text, "Gated against equal integration")[1:]
    verdict = "the gates of gainlora-inflora change AP by +12.0 (95 % over seeds -13.4 to 37.4; over examples "
    assert f"{verdict}0.0 to 0.0: no difference shown), FT from 5.0 to 2.0" in text
    assert row[3:] == [
        "2 (1 of one side left out)",
        "70.0 ± 0.0",
        "82.0 ± 2.8",
        "+12.0",
        "-13.4 to 37.4",
        "0.0 to 0.0",
        "no",
        "5.0 ± 0.0",
        "2.0 ± 0.0",
    ]
    assert span(bounds(pd.Series([3.0])), 1) == "-" == span(example_bounds([]), 1)
    apart = Frame([run(tmp_path, 84, seed=8), run(tmp_path, 74, "inflora", seed=9)])
    assert apart.paired().empty


def test_groups_differ_in_more_than_the_seed(tmp_path):
    records = [run(tmp_path, 80 + seed, seed=seed) for seed in (1, 2, 3)]
    records += [run(tmp_path, 70, "inflora"), run(tmp_path, 60, seed=1, options={"gate.hidden": 10})]
    frame = Frame(records)
    assert names(frame) == ["inflora", "gainlora-inflora", "gainlora-inflora, gate.hidden=10"]
    assert list(frame.measured(frame.groups.index[1], "AP")) == [81, 82, 83]


def changed(record, **config):
    return replace(record, config={**record.config, **config})


@pytest.mark.parametrize(
    ("name", "value", "label"),
    [
        ("device", "cuda", "device=cuda"),
        ("versions", {"torch": "3"}, "version.torch=3"),
        ("base", "b" * 64, "base=bbbbbbbb"),
    ],
)
def test_no_mean_mixes_base_weights_devices_or_library_versions(tmp_path, name, value, label):
    records = [run(tmp_path, 80 + seed, seed=seed) for seed in (1, 2, 3)]
    frame = Frame([*records[:2], changed(records[2], **{name: value})])
    assert names(frame) == ["gainlora-inflora", f"gainlora-inflora, {label}"]
    assert list(frame.groups["runs"]) == [2, 1]
    equal = changed(run(tmp_path, 70, "inflora", seed=3), **{name: value})
    (pair,) = Frame([*frame.records.values(), equal]).paired().itertuples()
    assert list(pair.both["AP"]) == [83]


def test_means_that_mix_code_versions_are_named_and_a_repeated_seed_is_kept_apart(tmp_path):
    one, two = (changed(run(tmp_path, 80, seed=s), code=code * 64) for s, code in ((1, "a"), (2, "b")))
    frame = Frame([one, two])
    assert len(frame.groups) == 1
    (sentence,) = frame.provenance()
    assert "2 runs of 2 code" in sentence and "mix them: 1: gainlora-inflora" in sentence and "for seed 2" in sentence
    unfinished = read_run(write_run(tmp_path, [[80.0]], seed=3, tasks=THREE, steps=1, examples=2))
    assert "mix them: 0" in Frame([one, changed(unfinished, code="b" * 64)]).provenance()[0]
    again = changed(run(tmp_path, 84, seed=1, code="d"), code="b" * 64)
    apart = Frame([one, two, again])
    assert sorted(apart.groups["runs"]) == [1, 2] and "mix them: 0" in apart.provenance()[0]
    assert sorted(names(apart)) == ["gainlora-inflora", "gainlora-inflora, code=aaaaaaaa"]


@pytest.mark.parametrize("options", [{"train.epochs": 2}, {"lora.rank": 4}, {"data.train_limit": None}])
def test_unequal_budgets_are_stated_and_not_compared(tmp_path, options):
    frame = Frame([run(tmp_path, 84), run(tmp_path, 74, "inflora", options=options)])
    assert frame.paired().empty
    (sentence,) = frame.unequal(frame.groups)
    assert next(iter(options)) in sentence
    same = Frame([run(tmp_path, 84, seed=5), run(tmp_path, 74, "inflora", 5, options={"gate.hidden": 7})])
    assert len(same.paired()) == 1 and same.unequal(same.groups) == []
    free = run(tmp_path, 84, seed=6, options={"gate.constrain_update": False})
    assert Frame([free, run(tmp_path, 74, "inflora", 6)]).paired().empty


# ---- tables -------------------------------------------------------------------------------------


def test_the_main_table_has_a_table_per_model_and_columns_per_order(tmp_path):
    records = [run(tmp_path, AP, seed=seed, drop=drop) for seed, AP, drop in ((1, 80, 2), (2, 76, 4))]
    records += [run(tmp_path, 50, "seqlora", order="other"), run(tmp_path, 66, model="large")]
    records.append(read_run(write_run(tmp_path, [[90.0]], seed=3, tasks=THREE)))  # unfinished: does not count
    text = page(records)
    assert section(text, "large")[1:] == [["gainlora-inflora", "66.0", "0.0", "1"]]
    assert section(text, "smollm2-135m") == [
        ["method", *(f"{order} {name}" for order in ("embedded", "other") for name in ("AP", "FT", "seeds"))],
        ["gainlora-inflora", "78.0 ± 2.8", "3.0 ± 1.4", "2 of 3", "-", "-", "-"],
        ["seqlora", "-", "-", "-", "50.0", "0.0", "1"],
    ]


def test_ablations_and_gate_options_are_tables_of_their_own(tmp_path):
    no_key = {"gate.initial_key": "open"}
    varied = [{}, no_key, {"gate.hidden": 10}, {"gate.hidden": 200}, {"lora.rank": 2}]
    records = [run(tmp_path, 70 + at, options=options) for at, options in enumerate(varied)]
    frame = Frame(records)
    assert names(frame, frame.without_variants((*GATE_OPTIONS, *CONSTRAINTS))) == [
        "gainlora-inflora",
        "gainlora-inflora, lora.rank=2",
    ]
    labelled = Frame([records[0], replace(records[1], label="open-key")])
    assert names(labelled, labelled.without_variants(CONSTRAINTS)) == ["gainlora-inflora"]
    assert len(labelled.without_variants(GATE_OPTIONS)) == 2
    text = page(records)
    rows = section(text, "Constraints of the gate")[1:]
    assert [row[3:-1] for row in rows] == [
        ["orthogonal", "true", "1", "70.0", "0.0"],
        ["open", "true", "1", "71.0", "0.0"],
    ]
    rows = section(text, "gate.hidden")[1:]
    assert [row[3:6] for row in rows] == [["10", "1", "72.0"], ["50", "1", "70.0"], ["200", "1", "73.0"]]


def test_learning_rates_are_a_table_of_their_own_for_every_method(tmp_path):
    rates = (0.002, 0.0005)
    records = [run(tmp_path, 80 + at, "seqlora", options={"train.learning_rate": r}) for at, r in enumerate(rates)]
    records += [run(tmp_path, 70 + at, options={"train.learning_rate": r}) for at, r in enumerate(rates)]
    rows = section(page([*records, run(tmp_path, 60, "olora")]), "train.learning_rate")[1:]
    found = {(row[0], *row[3:6]) for row in rows}
    assert found == {
        (method, rate, "1", f"{score}.0")
        for method, first in (("gainlora-inflora", 70), ("seqlora", 80))
        for rate, score in (("0.0005", first + 1), ("0.002", first))
    }


PAPER = {
    "order": "order1",
    "tasks": FIFTEEN,
    "model": "t5-large",
    "options": {"data.train_limit": None, "data.test_limit": None},
}


def paper(**options):
    return {"options": {**PAPER["options"], **options}}


@pytest.mark.parametrize(
    ("how", "figures"),
    [
        ({}, (46.21, 2.40)),
        ({"method": "inflora"}, (39.78, 7.64)),
        ({"method": "nlora"}, None),
        ({"order": "embedded"}, None),
        ({"model": "smollm2-135m"}, None),
        ({"tasks": FIFTEEN[:14]}, None),
        (paper(**{"data.train_limit": 320}), None),
        (paper(**{"data.test_limit": 100}), None),
        (paper(**{"gate.constrain_update": False}), (37.69, 10.94)),
        (paper(**{"gate.initial_key": "random"}), (45.38, 3.40)),
        (paper(**{"gate.initial_key": "random", "gate.constrain_update": False}), (36.75, 12.18)),
        (paper(**{"gate.initial_key": "open"}), None),
        ({"method": "inflora", **paper(**{"gate.initial_key": "open"})}, (39.78, 7.64)),
    ],
)
def test_published_figures_stand_beside_the_same_setup_alone(tmp_path, how, figures):
    record = run(tmp_path, 50, **{**PAPER, **how})
    frame = Frame([record])
    beside = frame.published_beside(frame.groups.index[0])
    assert (beside if beside is None else tuple(beside[["AP", "FT"]])) == figures
    if how in ({}, {"method": "nlora"}):
        assert ("published AP" in page([record])) == (figures is not None)


def test_published_figures_do_not_stand_beside_unfinished_or_varied_runs(tmp_path):
    part = read_run(write_run(tmp_path, [[50.0]], "inflora", 1, FIFTEEN, "order1", model="t5-large", **paper()))
    records = [run(tmp_path, 50, seed=s, **{**PAPER, **paper(**{"gate.hidden": 100 * s})}) for s in (1, 2)]
    frame = Frame([part, *records])
    assert [frame.published_beside(group) for group in frame.groups.index] == [None] * 3
    lacking = Frame([changed(run(tmp_path, 50, seed=3, **PAPER), skipped=["task15"])])
    assert lacking.published_beside(lacking.groups.index[0]) is None


def test_gates_on_own_earlier_and_later_tasks(tmp_path):
    # branch 1: later (0.3 + 0.5) / 2; branch 2: earlier 0.1, later 0.6; branch 3: earlier (0.2 + 0.4) / 2
    means = [[0.9, 0.1, 0.2], [0.3, 0.8, 0.4], [0.5, 0.6, 0.7]]
    record = run_of(tmp_path, R)
    values = record.steps[-1].values
    for task, row in zip(THREE, means, strict=True):
        values.update({k: row[k.branch - 1] for k in values if (k.metric, k.task) == ("coefficient", task)})
    own, earlier, later = (row[2:] for row in section(page([record]), "Gates on old and new tasks")[1:])
    assert own == ["0.90", "0.80", "0.70", "0.80"]
    assert earlier == ["-", "0.10", "0.30", "0.20"]  # mean of 0.1 and 0.3
    assert later == ["0.40", "0.60", "-", "0.50"]
    assert "Gates on old" not in page([run(tmp_path, 50, "inclora")])


def test_costs_are_means_of_the_steps(tmp_path):
    # the fake run: 6 s train, 1 + 0.5 s around, 2.5 s for 2 examples of each task seen; 600 t + 70 t + 12 stored
    (row,) = section(page([run(tmp_path, 50, seed=seed) for seed in (1, 2)]), "Costs")[1:]
    assert row == ["gainlora-inflora", "1, 3", "460,800", "682", "2,022", "6.0", "1.5", "1.250", "0.417"]


def test_trainable_parameters_join_methods_that_train_the_same(tmp_path):
    methods = ("seqlora", "inclora", "gainlora-inflora", "no-such-method")
    head, *rows = section(page([run(tmp_path, 50, method) for method in methods]), "Trainable parameters")
    assert [row[0] for row in rows] == ["inclora, seqlora", "gainlora-inflora"]
    gated = dict(zip(head, rows[1], strict=True))
    assert (gated["t5-large"], gated["llama-2-7b"]) == ("795,648", "1,462,272")
