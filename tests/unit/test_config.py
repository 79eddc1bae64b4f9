"""params.yaml: every knob is there, wrong values are refused by name."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from gainlora import rules
from gainlora.config import Config, from_dict
from gainlora.errors import GainLoRAError
from gainlora.params import load_config, order_names

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
    for line in PARAMS.read_text().split("\nmodels:")[0].splitlines():  # and says what each one does
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            documented = "#" in line or line.split(":")[0].strip() in {
                "rank", "learning_rate", "epochs", "weight_decay", "gradient_checkpointing", "batch_size", "num_beams",
            }  # fmt: skip
            assert documented, line
    models = PARAMS.read_text().split("\nmodels:")[1].split("\norders:")[0]
    for line in models.splitlines():  # each value says where it comes from
        key, _, value = line.partition(":")
        if value.strip(" &") and "&" not in value.split("#")[0] and key.strip() != "model.source":
            assert "[P]" in line or "[O]" in line, line


def test_every_order_loads_and_round_trips():
    assert order_names(PARAMS) == ["embedded", "order1", "order2", "order3", "order4"]
    for order in order_names(PARAMS):
        config = load_config(order, PARAMS)
        assert from_dict(config.to_dict()) == config


def test_overrides_win():
    changed = load_config("order1", PARAMS, {"train.learning_rate": 5e-4, "method": "seqlora"})
    assert (changed.train.learning_rate, changed.method, changed.gated) == (5e-4, "seqlora", False)
    assert load_config("order1", PARAMS).train.learning_rate == 3e-4
    # what is learned does not depend on the number of processes
    assert load_config("order1", PARAMS, {"launch.num_processes": 2}) == load_config("order1", PARAMS)


# model, order: rank, epochs, learning rate, batch, alpha, gate width, prompt tokens, dtype, blocks
PUBLISHED = [
    ("t5-large", "order1", 4, 100, 3e-4, 32, 32, 100, 512, "float32", 1),
    ("t5-large", "order3", 8, 10, 3e-4, 32, 32, 100, 512, "float32", 1),
    ("t5-xl", "order2", 4, 100, 3e-4, 32, 32, 100, 512, "float32", 1),
    ("llama-2-7b", "order1", 4, 50, 5e-5, 32, 32, 50, 1024, "bfloat16", 4),
    ("llama-2-13b", "order2", 4, 50, 5e-5, 32, 32, 50, 1024, "bfloat16", 4),
    ("llama-3-8b", "order1", 4, 50, 5e-5, 32, 32, 50, 1024, "bfloat16", 4),
]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: "-".join(p[:2]))
def test_a_model_brings_its_hyperparameters(published):
    model, order, *expected = published
    c = load_config(order, PARAMS, {"model.name": model})
    found = [c.lora.rank, c.train.epochs, c.train.learning_rate, c.train.batch_size, c.lora.alpha, c.gate.hidden]
    assert [*found, c.data.max_prompt_tokens, c.model.dtype, c.subspace.covariance_blocks] == expected
    assert (c.subspace.threshold, c.subspace.gate_threshold, c.data.max_target_tokens) == (0.995, 0.995, 50)
    assert c.data.train_limit is c.data.test_limit is c.subspace.max_examples is None  # complete, whatever the model
    assert c.model.name == model and c.model.location.split("/")[0] in ("google-t5", "google", "meta-llama")


def test_models_overlay_only_what_they_name():
    assert load_config("order1", PARAMS).model.name == "t5-large"
    small = load_config("order1", PARAMS, {"model.name": "smollm2-135m"})
    assert (small.lora.rank, small.train.learning_rate, small.model.location) == (8, 1e-3, "smollm2-135m")
    mine = load_config("order1", PARAMS, {"model.name": "someone/else", "lora.rank": 3})
    assert (mine.model.location, mine.lora.rank) == ("someone/else", 3)
    assert load_config("order1", PARAMS, {"lora.rank": 3}).lora.rank == 3  # overrides win over models


def test_the_papers_orders():
    tasks = [set(load_config(f"order{k}", PARAMS).order.tasks) for k in (1, 2, 3, 4)]
    assert tasks[0] == tasks[1] and tasks[2] == tasks[3] and all(len(names) == 15 for names in tasks)
    published = Path(__file__).parents[3] / "shared" / "paper" / "orders.yaml"
    if published.exists():
        orders = yaml.safe_load(published.read_text())["orders"]
        for k in (1, 2, 3, 4):
            assert list(load_config(f"order{k}", PARAMS).order.tasks) == orders[f"order{k}"]["tasks"]


def test_an_order_of_ones_own(tmp_path):
    mine = tmp_path / "mine.yaml"
    entry = {"data": "d", "template": "superni", "metric": "rouge_l", "tasks": ["b", "a"]}
    mine.write_text(yaml.safe_dump({**entry, "settings": {"train.epochs": 3}}))
    config = load_config(str(mine), PARAMS)
    assert (config.order.name, config.order.tasks, config.train.epochs) == ("mine", ("b", "a"), 3)
    large = load_config(str(mine), PARAMS, {"model.name": "t5-large"})
    assert (large.train.epochs, large.lora.rank) == (3, 4)  # the order's own settings win over the model's
    long = load_config(str(mine), PARAMS, {"model.name": "t5-large", "order.template": "long_sequence"})
    assert long.lora.rank == 8
    with pytest.raises(GainLoRAError, match=r"absent\.yaml: no such file; name an order"):
        load_config("absent.yaml", PARAMS)
    taken = tmp_path / "order1.yaml"
    taken.write_text("")
    with pytest.raises(GainLoRAError, match="has an order 'order1' already"):
        load_config(str(taken), PARAMS)
    mine.write_text(yaml.safe_dump(["a", "b"]))
    with pytest.raises(GainLoRAError, match=r"mine\.yaml: holds list"):
        load_config(str(mine), PARAMS)


def test_every_rule_is_a_method_and_gates_weigh_branches_of_single_tasks():
    found = set(rules.names())
    assert {"seqlora", "inclora", "olora", "inflora", "clora", "ewc", "slao", "nlora", "single", "multitask"} <= found
    gated = {m.removeprefix("gainlora-") for m in rules.methods() if m.startswith("gainlora-")}
    assert found - gated == {"seqlora", "ewc", "slao", "single", "multitask"}
    for method in rules.methods():
        assert load_config("embedded", PARAMS, {"method": method}).rule is rules.get(method)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "gainlora"}, "method: 'gainlora' is unknown; choose from clora"),
        ({"method": "gainlora-seqlora"}, "gates cannot weigh the branches of 'seqlora'"),
        ({"train.learning_rte": 1}, "train.learning_rte: unknown option; did you mean 'learning_rate'"),
        ({"trian.epochs": 1}, "trian: unknown option; did you mean 'train'"),
        ({"method.x": 1}, "'method' holds a value"),
        ({"model.name": ["a"]}, "model.name: got ['a'], expected text"),
        ({"train": {"epochs": 2}}, "'train' is a section; set its options one by one"),
        ({"tracking.uri": "x"}, "tracking.uri: is set in"),
        ({"launch.processes": 2}, "launch.processes: unknown option"),
        ({"launch.num_processes": 0}, "launch.num_processes: 0 is too small"),
        ({"launch.num_processes": 5}, "launch.num_processes: 5 cannot share the 4 examples of train.batch_size"),
        ({"launch.num_processes": 2, "model.device_map": "auto"}, "2 processes cannot each use all GPUs"),
        ({"launch.config": "fsdp.yaml"}, "launch.config: fsdp.yaml is for several processes"),
        ({"launch.config": "none.yaml", "launch.num_processes": 2}, "launch.config: none.yaml: no such file"),
        ({"order.name": "../x"}, "'../x' is no name of an order or task"),
        ({"order.data": ""}, "order.data: empty"),
        ({"train.weight_decay": float("inf")}, "train.weight_decay: inf must be finite"),
        ({"train.penalty_weight": -1}, "train.penalty_weight: -1.0 must be finite and not negative"),
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
    with pytest.raises(GainLoRAError, match="not found; run from"):
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
        ("model: smollm\norders: {embedded: {data: d, template: superni, metric: rouge_l, tasks: [a]}}", "model: got"),
        ("models: [x]\norders: {embedded: {}}", "models: got \\['x'\\]"),
        ("model: {name: m}\nmodels: {m: 3}\norders: {embedded: {}}", "models.m: expected options"),
        ("model: {name: m}\nmodels: {m: {superni: 3}}\norders: {embedded: {}}", "models.m: expected options"),
    ):
        path.write_text(text)
        with pytest.raises(GainLoRAError, match=message):
            load_config("embedded", path)
    path.write_text("orders: {embedded: {data: d}}")
    with pytest.raises(GainLoRAError, match=r"order\.template: missing"):
        load_config("embedded", path)
