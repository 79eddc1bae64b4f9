"""Figures hold the runs' data, and are readable without colour."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from gainlora.report import plots
from gainlora.report.one_run import run_figures
from tests.fake_run import mean_coefficients
from tests.unit.test_report import R, run_of


def test_heat_maps_hold_R_and_the_coefficients(tmp_path):
    made = run_figures(run_of(tmp_path, R), 1)
    axes = made["accuracy_matrix"][0].axes[0]
    cells = axes.images[0].get_array()
    assert np.ma.filled(cells, -1).tolist() == [[84, -1, -1], [81, 88, -1], [82, 87, 71]]
    assert [text.get_text() for text in axes.texts] == ["84.0", "81.0", "88.0", "82.0", "87.0", "71.0"]
    coefficients = made["gate_coefficients"][0].axes[0]
    assert coefficients.images[0].get_array().tolist() == [mean_coefficients(3, i) for i in (1, 2, 3)]
    assert coefficients.texts[0].get_text() == "0.90\n± 0.07"


def test_curves_hold_R_AP_memory_and_seconds(tmp_path):
    made = run_figures(run_of(tmp_path, R), 1)
    lines = {line.get_label(): line for line in made["accuracy_curves"][0].axes[0].lines}
    assert [list(line.get_ydata()) for line in lines.values()] == [[84, 84.5, 80], [84, 81, 82], [88, 87], [71]]
    assert list(lines["2 news_topic"].get_xdata()) == [2, 3]
    memory = {line.get_label(): list(line.get_ydata()) for line in made["basis_growth"][0].axes[0].lines}
    assert memory["gate 1"] == pytest.approx([100 * k / 576 for k in (5, 8, 11)])
    assert memory["layers max"] == pytest.approx([100 * (5 * t + 29) / 576 for t in (1, 2, 3)])
    seconds = {line.get_label(): list(line.get_ydata()) for line in made["seconds"][0].axes[0].lines}
    assert seconds == {"prepare": [1] * 3, "train": [6] * 3, "update": [0.5] * 3, "evaluate": [2.5] * 3}
    assert {*run_figures(run_of(tmp_path, R, "seqlora"), 1)} == {"accuracy_matrix", "accuracy_curves", "seconds"}
    at_once = run_of(tmp_path, [[80.0, 90.0, 70.0]], "multitask", at_once=True)
    assert {*run_figures(at_once, 1)} == {"accuracy_matrix", "seconds"}


def test_validation_curves_are_shown_where_recorded(tmp_path):
    record = run_of(tmp_path, R)
    curve = [{"step": 6, "score": 50.0, "loss": 1.0}, {"step": 12, "score": 75.0, "loss": 0.5}]
    record = replace(record, steps=[replace(record.steps[0], validation=curve), *record.steps[1:]])
    (line,) = run_figures(record, 1)["validation"][0].axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([6, 12], [50, 75])


def test_a_panel_has_few_lines_that_differ_without_colour():
    rules = [prefix + rule for rule in "abcdefgh" for prefix in ("", "gainlora-")]
    curve = pd.DataFrame({"mean": [1.0, 2.0]}, index=[1, 2])
    figure = plots.curves({"AP": dict.fromkeys(rules, curve)}, "tasks", "AP")
    panels = [axes.lines for axes in figure.axes if axes.lines]
    assert sorted(line.get_label() for lines in panels for line in lines) == sorted(rules)
    for lines in panels:
        assert len(lines) <= plots.MOST
        assert len({(line.get_marker()) for line in lines}) == len(lines) == len({line.get_color() for line in lines})
        assert {line.get_linestyle() == "-" for line in lines if line.get_label().startswith("gainlora-")} <= {True}
    heights = sorted(text.xy[1] for text in figure.axes[0].texts)  # labels of equal lines lie apart
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.05
