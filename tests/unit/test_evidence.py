"""results/: the plan is one that can be run, and what is committed is what the plan says."""

import json
import statistics
from pathlib import Path

import pytest

from flows.plan import Experiment, experiments
from gainlora.tracking.document import Table
from gainlora.tracking.gates import branch_roles
from gainlora.tracking.markdown import markdown_page
from gainlora.tracking.report import report_blocks
from gainlora.tracking.results import read_result_file

ROOT = Path(__file__).parents[2]
PLAN = "results/plan.yaml"
RESULTS = Path("results")


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_methods_of_one_order_differ_in_nothing_but_the_plan_says():
    plan = experiments(plan=PLAN)
    for order in {e.order for e in plan}:
        configs = [e.config.to_dict() for e in plan if e.order == order and not e.options]
        assert len({json.dumps({**config, "method": "", "seed": 0}, sort_keys=True) for config in configs}) == 1


def test_the_command_says_all_that_the_file_stands_for():
    e = Experiment("embedded", "gainlora-inflora", 1, "no-init", {"gate.constrain_init": False})
    assert e.command == [
        *("run", "embedded", "--method", "gainlora-inflora", "--seed", "1"),
        *("--set", "gate.constrain_init=false"),
    ]
    assert e.file(RESULTS) == Path("results/embedded/gainlora-inflora+no-init-smollm2-135m-1.json")


def test_committed_files_belong_to_the_plan_and_hold_their_own_arithmetic():
    plan = {e.file(RESULTS): e for e in experiments(plan=PLAN)}
    for path in sorted(RESULTS.glob("*/*.json")):
        content, e = json.loads(path.read_text()), plan[path]
        assert e.there(RESULTS)
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
    runs = [read_result_file(path) for path in sorted(RESULTS.glob("*/*.json"))]
    table = next(block for block in report_blocks(runs, 1) if isinstance(block, Table))
    page = markdown_page("", [table])
    shown = Path("README.md").read_text()
    for line in page.splitlines():
        assert not line.startswith("|") or line in shown, line


def test_the_readme_s_claims_are_those_of_the_files():
    """The figures in its prose: the ablation, the gain of gates, coefficients on the own task."""
    shown = " ".join(Path("README.md").read_text().split())
    runs = {path.stem: read_result_file(path) for path in Path("results/embedded").glob("*.json")}

    def ablation(label, earlier):
        run = runs[f"gainlora-inflora{label}-smollm2-135m-42"]
        found = statistics.fmean(before for _, before, _ in branch_roles(run) if before is not None)
        assert f"{found:.2f}" == earlier
        return f"{run.result['AP']:.1f} / {run.result['FT']:.1f} and {earlier}"

    for label, earlier in (("", "0.15"), ("+no-update", "0.79"), ("+no-init", "0.96"), ("+no-init-no-update", "0.96")):
        assert ablation(label, earlier) in shown

    roles = [branch_roles(runs[f"gainlora-inflora-smollm2-135m-{seed}"]) for seed in (42, 43, 44)]
    own = [[role[0] for role in run] for run in roles]
    average, last = statistics.fmean(map(statistics.fmean, own)), statistics.fmean(run[-1] for run in own)
    assert f"is {average:.2f} on `embedded` ({last:.2f} for the last task)" in shown

    gains: dict[Path, list[float]] = {}
    for gated in Path("results").glob("*/gainlora-*.json"):
        equal = gated.with_name(gated.name.removeprefix("gainlora-"))
        if "+" not in gated.name and "inclora" not in gated.name:
            AP = [json.loads(path.read_text())["AP"] for path in (gated, equal)]
            gains.setdefault(gated.with_name(gated.name.rsplit("-", 1)[0]), []).append(AP[0] - AP[1])
    means, smallest = sorted(map(statistics.fmean, gains.values())), min(map(min, gains.values()))
    better = f"in {sum(gain > 0 for gain in means)} of the {len(means)} comparisons of `inflora` and `olora`"
    by = f"the gain was {means[0]:.1f} to {means[-1]:.1f} points of AP (single seeds: from {smallest:.2f})"
    assert f"{better}; {by}" in shown
