"""What the code learns is what gainlora/pins.json holds; its hash is the learning version."""

import json

import pytest

from gainlora import version
from gainlora.version import PINS, present_version
from tests.trajectory import cases, differences, outcome, run, write_inputs

PINNED = json.loads(PINS.read_text())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectory")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_a_short_trajectory_learns_the_pinned_numbers(inputs, case):
    assert differences(PINNED[case.pinned_as], outcome(run(inputs, case))) == []


def test_every_pin_has_its_case():
    assert PINNED.keys() == {case.pinned_as for case in cases()}


def test_a_difference_beyond_rounding_is_named():
    pinned = {"R": [[1.0, 20.0]], "A": [[12, 3.0]]}
    assert differences(pinned, {"R": [[1.0, 20.0001]], "A": [[12, 3.00001]]}) == []
    assert differences(pinned, {"R": [[1.0, 20.01]], "A": [[12, 3.0]]}) == ["R[0][1]: pinned 20.0, found 20.01"]
    assert differences(pinned, {"R": [[1.0, 20.0]]}) and differences(pinned, {"R": [[1.0]], "A": [[12, 3.0]]})


def test_the_learning_version_is_a_short_hash_that_other_methods_do_not_change(tmp_path, monkeypatch):
    before = {method: present_version(method) for method in ("olora", "gainlora-olora")}
    assert all(len(found) == 12 and int(found, 16) for found in before.values()) and len({*before.values()}) == 2

    def changed(*names):
        kept = {name: pin for name, pin in PINNED.items() if name not in names}
        (tmp_path / "pins.json").write_text(json.dumps(kept))
        monkeypatch.setattr(version, "PINS", tmp_path / "pins.json")
        return {method for method, found in before.items() if present_version(method) != found}

    assert changed("llama ewc") == set() and changed("t5 olora") == {"olora"}
    assert changed("llama rank") == {"olora", "gainlora-olora"}
