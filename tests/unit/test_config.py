"""params.yaml: every knob is there, wrong values are refused by name."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from gainlora.config import Config, from_dict, load_config, order_names
from gainlora.errors import GainLoRAError

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params.yaml"


def test_params_yaml_holds_every_option_and_nothing_else():
    raw = yaml.safe_load(PARAMS.read_text())
    for field in dataclasses.fields(Config):
        if field.name == "order":
            continue
        inner = field.default_factory if field.default_factory is not dataclasses.MISSING else None
        if inner is not None:
            assert set(raw[field.name]) == {f.name for f in dataclasses.fields(inner)}
        else:
            assert field.name in raw
    for line in PARAMS.read_text().split("orders:")[0].splitlines():  # and says what each one does
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            documented = "#" in line or line.split(":")[0].strip() in {
                "rank", "learning_rate", "epochs", "weight_decay", "gradient_checkpointing", "batch_size", "num_beams",
            }  # fmt: skip
            assert documented, line


def test_every_order_loads_and_round_trips():
    assert order_names(PARAMS) == ["embedded", "order1", "order2", "order3", "order4"]
    for order in order_names(PARAMS):
        config = load_config(order, PARAMS)
        assert from_dict(config.to_dict()) == config
    assert load_config("order1", PARAMS).model.name == "google-t5/t5-large"
    assert load_config("order3", PARAMS).lora.rank == 8


def test_overrides_win_and_change_the_digest():
    plain = load_config("order1", PARAMS)
    changed = load_config("order1", PARAMS, {"train.learning_rate": 5e-4, "method": "seqlora"})
    assert (changed.train.learning_rate, changed.rule, changed.gated) == (5e-4, "seqlora", False)
    assert changed.digest() != plain.digest()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "gainlora"}, "method: 'gainlora' is unknown; choose from seqlora"),
        ({"method": "gainlora-seqlora"}, "one branch for all tasks"),
        ({"train.learning_rte": 1}, "train.learning_rte: unknown option; did you mean 'learning_rate'"),
        ({"trian.epochs": 1}, "trian: unknown option; did you mean 'train'"),
        ({"method.x": 1}, "'method' holds a value"),
        ({"train": {"epochs": 2}}, "'train' is a section; set its options one by one"),
        ({"tracking.uri": "x"}, "tracking.uri: is set in"),
        ({"order.name": "../x"}, "'../x' is no name of an order or task"),
        ({"order.data": ""}, "order.data: empty"),
        ({"train.weight_decay": float("inf")}, "train.weight_decay: inf must be finite"),
        ({"seed": "x"}, "seed: got 'x', expected a whole number"),
        ({"seed": -1}, "seed: -1 is too small"),
        ({"seed": True}, "seed: got True"),
        ({"lora.rank": 0}, "lora.rank: 0 is too small"),
        ({"lora.rank": 2.5}, "lora.rank: got 2.5"),
        ({"lora.targets": "q"}, "lora.targets: got 'q', expected a list"),
        ({"gate.score": "dot"}, "gate.score: 'dot' is not one of cosine, linear"),
        ({"subspace.threshold": 1.2}, "subspace.threshold: 1.2 is no share"),
        ({"subspace.gate_threshold": 0}, "subspace.gate_threshold: 0.0 is no share"),
        ({"train.learning_rate": float("nan")}, "train.learning_rate: nan must be"),
        ({"train.micro_batch_size": 3}, "train.micro_batch_size: 3 does not divide"),
        ({"order.tasks": []}, "tasks: empty"),
        ({"order.tasks": ["a", "a"]}, "'a' appears more than once"),
        ({"order.tasks": ["../x"]}, "'../x' is no name of an order or task"),
        ({"order.metric": "bleu"}, "order.metric: 'bleu' is not one of"),
    ],
)
def test_contradictions_are_refused_by_name(options, message):
    with pytest.raises(GainLoRAError) as error:
        load_config("embedded", PARAMS, options)
    assert message in str(error.value)


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "params.yaml"
    with pytest.raises(GainLoRAError, match="No such file"):
        load_config("embedded", path)
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- a", "holds list"),
        ("seed: 1", "'orders' is missing"),
        ("orders: {a: {data: d}}", "no order 'embedded'"),
    ):
        path.write_text(text)
        with pytest.raises(GainLoRAError, match=message):
            load_config("embedded", path)
    for text, message in (
        ("orders: {embedded: null}", "orders.embedded: expected data"),
        ("orders: {embedded: {settings: [1]}}", "orders.embedded: expected data"),
        ("report: {decimals: x}\norders: {embedded: {}}", "report.decimals: got 'x'"),
        ("report: {dpi: 0}\norders: {embedded: {}}", "report.dpi: 0 is out of range"),
        ("tracking: x\norders: {embedded: {}}", "tracking: got 'x'"),
        ("orders: {1: {}}", "no order 'embedded'; known: 1"),
    ):
        path.write_text(text)
        with pytest.raises(GainLoRAError, match=message):
            load_config("embedded", path)
    path.write_text("orders: {embedded: {data: d}}")
    with pytest.raises(GainLoRAError, match=r"order\.template: missing"):
        load_config("embedded", path)
