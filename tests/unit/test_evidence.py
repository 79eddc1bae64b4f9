"""results/: the plan is one that can be run, and what is committed is what the plan says."""

import json
from pathlib import Path

import pytest

from gainlora.plans import experiments
from gainlora.report.report import report_page
from gainlora.runs.records import read_result_file
from results.write import Figures, texts

ROOT = Path(__file__).parents[2]
PLAN = Path("results/plan.yaml")
RESULTS = Path("results")


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_methods_of_one_order_and_model_differ_in_nothing_but_the_plan_says():
    plan = [(e.order, e.config) for e in experiments(plan=PLAN) if not e.label]
    for order, model in {(order, config.model.name) for order, config in plan}:
        configs = [c.learning() for o, c in plan if (o, c.model.name) == (order, model)]
        assert len({json.dumps({**config, "method": "", "seed": 0}, sort_keys=True) for config in configs}) == 1


def test_committed_files_belong_to_the_plan_and_hold_their_own_arithmetic():
    plan = {e.file(RESULTS): e for e in experiments(plan=PLAN)}
    for path in sorted(RESULTS.glob("*/*.json")):
        content, e = json.loads(path.read_text()), plan[path]
        assert e.there(RESULTS)
        found = (content["order"], content["method"], content["seed"], content["label"])
        assert found == (path.parent.name, e.config.method, e.config.seed, e.label)
        R = content["R"]
        assert content["AP"] == pytest.approx(sum(R[-1]) / len(R), abs=1e-3)
        if content["FT"] is not None:
            last = len(R) - 1
            drops = [max(R[t][i] for t in range(i, last)) - R[last][i] for i in range(last)]
            assert content["FT"] == pytest.approx(sum(drops) / last, abs=1e-3)


def test_every_figure_of_the_results_is_that_of_the_files():
    """README.md, results/README.md and report.md are as `python results/write.py` writes them today."""
    records = [read_result_file(path) for path in sorted(RESULTS.glob("*/*.json"))]
    for path, text in texts(Figures(records)).items():
        assert path.read_text(encoding="utf-8") == text, path
    assert (RESULTS / "report.md").read_text(encoding="utf-8") == report_page(records, 1).markdown
