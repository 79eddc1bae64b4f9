"""results/: the plan is one that can be run, and what is committed is what the plan says."""

import json
from pathlib import Path

import pytest

from gainlora.params import load_config
from gainlora.tracking.document import Table
from gainlora.tracking.markdown import markdown_page
from gainlora.tracking.report import report_blocks
from gainlora.tracking.results import read_result_file
from results.make import Experiment, read_plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_experiment_of_the_plan_is_a_run_with_a_file_of_its_own():
    plan = read_plan()
    assert len({e.file for e in plan}) == len(plan)
    for e in plan:
        config = load_config(e.order, overrides=e.overrides)
        assert (config.method, config.seed) == (e.method, e.seed)


def test_methods_of_one_order_differ_in_nothing_but_the_plan_says():
    for order in {e.order for e in read_plan()}:
        plain = [e for e in read_plan() if e.order == order and not e.options]
        seen = set()
        for e in plain:
            config = load_config(e.order, overrides=e.overrides).to_dict()
            seen.add(json.dumps({**config, "method": "", "seed": 0}, sort_keys=True))
        assert len(seen) == 1


def test_the_command_says_all_that_the_file_stands_for():
    e = Experiment("embedded", "gainlora-inflora", 1, "no-init", {"gate.constrain_init": False})
    assert e.command == [
        *("run", "embedded", "--method", "gainlora-inflora", "--seed", "1"),
        *("--set", "gate.constrain_init=false"),
    ]
    assert e.file == Path("results/embedded/gainlora-inflora+no-init-smollm2-135m-1.json")


def test_committed_files_belong_to_the_plan_and_hold_their_own_arithmetic():
    plan = {e.file: e for e in read_plan()}
    for path in sorted(Path("results").glob("*/*.json")):
        content, e = json.loads(path.read_text()), plan[path]
        found = (content["order"], content["method"], content["seed"], content["label"])
        assert found == (path.parent.name, e.method, e.seed, e.label)
        R = content["R"]
        assert content["AP"] == pytest.approx(sum(R[-1]) / len(R), abs=1e-3)
        if content["FT"] is not None:
            last = len(R) - 1
            drops = [max(R[t][i] for t in range(i, last)) - R[last][i] for i in range(last)]
            assert content["FT"] == pytest.approx(sum(drops) / last, abs=1e-3)


def test_the_readme_shows_what_the_files_say():
    """Every row of the report's main table stands in README.md, to the digit."""
    runs = [read_result_file(path) for path in sorted(Path("results").glob("*/*.json"))]
    table = next(block for block in report_blocks(runs, 1) if isinstance(block, Table))
    page = markdown_page("", [table])
    shown = Path("README.md").read_text()
    for line in page.splitlines():
        assert not line.startswith("|") or line in shown, line
