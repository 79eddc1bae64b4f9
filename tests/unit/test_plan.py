"""What a sweep runs: combinations or a plan, and what is refused before anything runs."""

from pathlib import Path

import pytest
import yaml

from flows.plan import experiments
from gainlora.errors import GainLoRAError
from gainlora.params import load_config
from tests.tiny import tiny_params

ENTRY = {"order": "tiny", "methods": ["seqlora", "olora"], "seeds": [1, 2]}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    tiny_params(tmp_path, "any")
    monkeypatch.chdir(tmp_path)


def plan(*entries):
    Path("plan.yaml").write_text(yaml.safe_dump(list(entries)))
    return "plan.yaml"


def test_every_combination_and_a_plan_give_the_same_runs():
    expected = [f"tiny {method} {seed}" for method in ENTRY["methods"] for seed in ENTRY["seeds"]]
    found = experiments(["tiny"], ["seqlora", "olora"], [1, 2])
    assert [e.name for e in found] == expected
    assert found == experiments(plan=plan(ENTRY))
    for e in found:
        assert e.config == load_config("tiny", overrides={"method": e.method, "seed": e.seed})
        assert e.parameters == {"order": "tiny", "method": e.method, "seed": e.seed, "overrides": {}}
    assert [e.name for e in experiments(["tiny"])] == ["tiny gainlora-inflora 1"]  # what params.yaml says


def test_a_choice_from_a_plan():
    labelled = {**ENTRY, "methods": ["olora"], "label": "long", "options": {"train.epochs": 2}}
    file = plan(ENTRY, labelled)
    found = [e.name for e in experiments(methods=["olora"], seeds=[2], plan=file)]
    assert found == ["tiny olora 2", "tiny olora+long 2"]
    assert experiments(plan=file)[-1].config.train.epochs == 2
    assert len({e.file(Path("results")) for e in experiments(plan=file)}) == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "orders: nothing to run"),
        ({"orders": ["tiny"], "methods": ["seqlor"]}, "method: 'seqlor' is unknown"),
        ({"orders": ["tiny", "tinny"]}, "no order 'tinny'; did you mean 'tiny'"),
        ({"orders": ["tiny"], "seeds": [1, 1]}, "tiny gainlora-inflora 1: given twice"),
        ({"orders": ["tiny"], "overrides": {"train.epoch": 2}}, "train.epoch: unknown option; did you mean 'epochs'"),
        ({"plan": "none.yaml"}, "none.yaml: not found"),
        ({"plan": [ENTRY], "overrides": {"train.epochs": 2}}, "overrides: train.epochs: not with a plan"),
        ({"plan": [ENTRY], "methods": ["ewc"]}, "methods: ewc is not in plan.yaml; known: seqlora, olora"),
        ({"plan": [ENTRY, ENTRY]}, "tiny seqlora 1: given twice"),
        ({"plan": ["tiny"]}, "plan.yaml: entry 1: got 'tiny', expected order, methods, seeds, label, options"),
        ({"plan": [{**ENTRY, "sedes": [1]}]}, "plan.yaml: entry 1: sedes: unknown; did you mean 'seeds'"),
        ({"plan": [{"order": "tiny", "seeds": [1]}]}, "plan.yaml: entry 1: methods: missing"),
        ({"plan": [{**ENTRY, "methods": "olora"}]}, "entry 1: methods: got 'olora', expected a list of methods"),
        ({"plan": [{**ENTRY, "seeds": [True]}]}, "entry 1: seeds: got [True], expected a list of whole numbers"),
        ({"plan": [{**ENTRY, "label": 3}]}, "entry 1: label: got 3, expected text"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(given, message):
    if isinstance(given.get("plan"), list):
        given = {**given, "plan": plan(*given["plan"])}
    with pytest.raises(GainLoRAError) as error:
        experiments(**given)
    assert message in str(error.value)
