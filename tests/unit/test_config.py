"""params.yaml holds the defaults, layers override each other in order, and wrong values are refused by name."""

from pathlib import Path

import pytest
import yaml

from gainlora import rules
from gainlora.config import RunConfig, Settings, load_config, load_settings, order_names
from gainlora.errors import GainLoRAError
from gainlora.sections import Section

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params.yaml"
ENTRY = {"data": "d", "template": "superni", "metric": "rouge_l", "tasks": ["a"]}


def test_params_yaml_documents_every_option_with_its_default():
    raw = yaml.safe_load(PARAMS.read_text())
    defaults = {name: field.default for name, field in RunConfig.model_fields.items() if name != "order"}
    expected = {k: v.model_dump(mode="json") if isinstance(v, Section) else v for k, v in defaults.items()}
    assert {k: v for k, v in raw.items() if k not in ("models", "protocols", "orders")} == expected
    models = PARAMS.read_text().split("\nmodels:")[1].split("\norders:")[0]
    for line in models.splitlines():  # each value says where it comes from
        key, _, value = line.partition(":")
        if value.strip(" &") and "&" not in value.split("#")[0] and key.strip() != "model.source":
            assert "[P]" in line or "[O]" in line, line


def test_every_order_loads_and_round_trips():
    assert order_names(PARAMS) == ["embedded", "order1", "order2", "order3", "order4"]
    for order in order_names(PARAMS):
        config = load_config(order, params=PARAMS)
        assert RunConfig.from_stored(config.learning()) == config
        assert not set(config.learning()) & set(Settings.model_fields)


def test_a_stored_run_gets_the_defaults_of_options_that_it_is_older_than():
    stored = load_config("embedded", {"train.epochs": 3}, PARAMS).learning()
    del stored["train"]["checkpoint_every"], stored["gate"]
    assert RunConfig.from_stored(stored) == load_config("embedded", {"train.epochs": 3}, PARAMS)
    for constrained, key in ((True, "orthogonal"), (False, "open")):  # renamed
        config = load_config("embedded", {"gate.initial_key": key}, PARAMS)
        recorded = config.learning()
        del recorded["gate"]["initial_key"]
        recorded["gate"]["constrain_init"] = constrained
        assert RunConfig.from_stored(recorded) == config
    del stored["data"]["truncate"]  # an option whose default is not what runs did before it
    assert RunConfig.from_stored(stored).data.truncate == "start"
    with pytest.raises(GainLoRAError, match=r"train\.x: unknown option"):
        RunConfig.from_stored({**stored, "train": {"x": 1}})


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
    c = load_config(order, {"model.name": model}, PARAMS)
    found = [c.lora.rank, c.train.epochs, c.train.learning_rate, c.train.batch_size, c.lora.alpha, c.gate.hidden]
    assert [*found, c.data.max_prompt_tokens, c.model.dtype, c.subspace.covariance_blocks] == expected
    assert (c.subspace.threshold, c.subspace.gate_threshold, c.data.max_target_tokens) == (0.995, 0.995, 50)
    assert c.data.train_limit is c.data.test_limit is c.subspace.max_examples is None  # complete, whatever the model
    assert c.model.name == model and c.model.location.split("/")[0] in ("google-t5", "google", "meta-llama")


# order, model, protocol: truncate, references, validation, keep, epochs, epochs of mnli, note
PROTOCOLS = [
    ("order3", "t5-large", "corrected", "end", "sampled", "auto", "best", 10, 10, ""),
    ("order4", "t5-xl", "published", "end", "sampled", 0, "last", 5, 10, ""),
    ("order1", "t5-large", "published", "end", "sampled", 0, "last", 100, 100, "selection on test not reproduced"),
    ("order2", "llama-3-8b", "corrected", "start", "sampled", "auto", "best", 50, 50, ""),
    ("order1", "smollm2-135m", "corrected", "input", "sampled", "auto", "best", 1, 1, ""),
    ("order1", "t5-large", None, "input", "all", 0, "last", 100, 100, ""),
    ("embedded", "smollm2-135m", None, "input", "all", 0, "last", 1, 1, ""),
]


@pytest.mark.parametrize("expected", PROTOCOLS, ids=lambda p: "-".join(map(str, p[:3])))
def test_protocols(expected):
    order, model, protocol, *values, note = expected
    c = load_config(order, {"model.name": model, "data.protocol": protocol}, PARAMS)
    found = [c.data.truncate, c.data.references, c.data.validation, c.train.keep, c.train.epochs, c.epochs("mnli", 999)]
    assert found == values and c.data.protocol == protocol and c.note.endswith(note) and bool(c.note) == bool(note)
    if order == "order3":
        assert load_config(order, params=PARAMS) == c  # the default of the paper's orders
        mine = {"data.protocol": "published", "train.epochs": 2, "train.task_epochs.cb": 3, "data.references": "all"}
        c = load_config(order, mine, PARAMS)  # what is asked for wins
        assert [c.epochs(task, 999) for task in ("yelp", "mnli", "cb")] == [2, 2, 3] and c.data.references == "all"


def test_later_layers_win():
    """Sections < models.<name> < models.<name>.<template> < order.settings < overrides."""
    params = {"train": {"epochs": 2, "batch_size": 2}, "lora": {"rank": 2, "alpha": 2.0}, "seed": 2}
    params["models"] = {"m": {"lora.rank": 3, "train.epochs": 3, "superni": {"train.epochs": 4, "gate.hidden": 4}}}
    params["orders"] = {"o": {**ENTRY, "settings": {"model.name": "m", "gate.hidden": 5, "train.weight_decay": 0.5}}}
    before = yaml.safe_dump(params)
    c = load_config("o", {"train.weight_decay": 0.6}, params)
    assert (c.train.batch_size, c.lora.rank, c.train.epochs, c.gate.hidden, c.train.weight_decay) == (2, 3, 4, 5, 0.6)
    other = load_config("o", {"model.name": "x", "order.template": "long_sequence"}, params)
    assert (other.lora.rank, other.train.epochs, other.seed) == (2, 2, 2)
    long = load_config("o", {"order.template": "long_sequence"}, params)
    assert (long.train.epochs, long.gate.hidden) == (3, 5)
    assert yaml.safe_dump(params) == before  # read once, used for several runs


def test_the_number_of_processes_is_not_part_of_what_is_learned():
    two = load_config("embedded", {"launch.num_processes": 2}, PARAMS)
    assert two.launch.num_processes == 2 and two.learning() == load_config("embedded", params=PARAMS).learning()


def test_a_copy_with_other_options_is_checked():
    config = load_config("embedded", params=PARAMS)
    longer = config.with_options({"order.tasks": [*config.order.tasks, "more"], "subspace.horizon": 4})
    assert (longer.order.tasks[-1], longer.subspace.horizon, longer.train) == ("more", 4, config.train)
    assert config.with_options({"train.task_epochs.a.b": 3}).epochs("a.b", 4) == 3
    with pytest.raises(GainLoRAError, match=r"train\.epochs: got 0, expected 1 or more"):
        config.with_options({"train.epochs": 0})


def test_settings_of_commands_on_an_existing_run(tmp_path):
    assert load_settings(tmp_path / "params.yaml") == Settings()
    path = tmp_path / "params.yaml"
    path.write_text("report: {decimals: 3}\ntracking:\nseed: of no interest here\n")
    settings = load_settings(path)
    assert (settings.report.decimals, settings.tracking.experiment) == (3, "gainlora")
    path.write_text("report: {decimal: 3}")
    with pytest.raises(GainLoRAError, match=r"report\.decimal: unknown option; did you mean 'decimals'"):
        load_settings(path)


def test_the_papers_orders():
    tasks = [load_config(f"order{k}", params=PARAMS).order.tasks for k in (1, 2, 3, 4)]
    assert set(tasks[0]) == set(tasks[1]) and set(tasks[2]) == set(tasks[3]) and all(len(t) == 15 for t in tasks)


def test_an_order_of_ones_own(tmp_path, monkeypatch):
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({**ENTRY, "tasks": ["b", "a"], "settings": {"train.epochs": 3}}))
    config = load_config(str(mine), params=PARAMS)
    assert (config.order.name, config.order.tasks, config.train.epochs) == ("mine", ("b", "a"), 3)
    large = load_config(str(mine), {"model.name": "t5-large"}, PARAMS)
    assert (large.train.epochs, large.lora.rank) == (3, 4)
    monkeypatch.chdir(tmp_path)
    assert load_config("mine.yaml") == config  # without a params.yaml the defaults hold
    taken = tmp_path / "order1.yaml"
    taken.write_text("")
    for order, message in (
        ("absent.yaml", r"absent\.yaml: no such file; name an order"),
        ("order1.yaml", "has an order 'order1' already"),
    ):
        with pytest.raises(GainLoRAError, match=message):
            load_config(order, params=PARAMS)


def test_every_rule_is_a_method_and_gates_weigh_branches_of_single_tasks():
    found = set(rules.names())
    assert {"seqlora", "inclora", "olora", "inflora", "clora", "ewc", "slao", "nlora", "single", "multitask"} <= found
    for prefix in ("gainlora-", "routed-"):
        weighed = {m.removeprefix(prefix) for m in rules.methods() if m.startswith(prefix)}
        assert found - weighed == {"seqlora", "ewc", "slao", "single", "multitask"}
    for method in rules.methods():
        assert load_config("embedded", {"method": method}, PARAMS).rule is rules.get(method)


REFUSED = [
    ({"model.compile": True, "model.tf32": True}, "model.compile: not with model.tf32; set one of them"),
    ({"method": "gainlora"}, "method: 'gainlora' is unknown; choose from clora"),
    ({"method": "gainlora-seqlora"}, "nothing can weigh the branches of 'seqlora' by the prompt"),
    ({"method": "routed-single"}, "nothing can weigh the branches of 'single' by the prompt"),
    ({"train.learning_rte": 1}, "train.learning_rte: unknown option; did you mean 'learning_rate'"),
    ({"gate.constrain_init": False}, "gate.constrain_init: is now gate.initial_key: orthogonal for true, open for"),
    ({"trian.epochs": 1}, "trian: unknown option; did you mean 'train'"),
    ({"method.x": 1}, "'method' holds a value"),
    ({".": 1}, "'.' is no option; write <section>.<name>"),
    ({"model.name": ["a"]}, "model.name: got ['a'], expected text"),
    ({"model.name": ""}, "model.name: got '', expected text that is not empty"),
    ({"model.dtype": "float16"}, "model.dtype: got 'float16', expected 'auto', 'float32' or 'bfloat16'"),
    ({"train": {"epochs": 2}}, "'train' is a section; set its options one by one"),
    ({"tracking.uri": "x"}, "tracking.uri: is set in"),
    ({"launch.processes": 2}, "launch.processes: unknown option"),
    ({"launch.num_processes": 0}, "launch.num_processes: got 0, expected 1 or more"),
    ({"launch.num_processes": 5}, "launch.num_processes: 5 cannot share the 4 examples of train.batch_size"),
    ({"launch.num_processes": 2, "model.device_map": "auto"}, "2 processes cannot each use all GPUs"),
    ({"launch.config": "fsdp.yaml"}, "launch.config: fsdp.yaml is for several processes"),
    ({"launch.config": "none.yaml", "launch.num_processes": 2}, "launch.config: none.yaml: no such file"),
    ({"seed": "x"}, "seed: got 'x', expected a whole number"),
    ({"seed": -1}, "seed: got -1, expected 0 or more"),
    ({"seed": True}, "seed: got True, expected a whole number"),
    ({"seed": 2**63 - 1}, "expected less than 4294967296"),
    ({"lora.rank": 2.5}, "lora.rank: got 2.5, expected a whole number"),
    ({"lora.targets": "q"}, "lora.targets: got 'q', expected a list"),
    ({"lora.targets": []}, "lora.targets: got [], expected a list that is not empty"),
    ({"gate.score": "dot"}, "gate.score: got 'dot', expected 'cosine' or 'linear'"),
    ({"gate.depth": 10**6}, "gate.depth: got 1000000, expected 64 or less"),
    ({"evaluate.num_beams": 10**6}, "evaluate.num_beams: got 1000000, expected 256 or less"),
    ({"data.validation": "some"}, "data.validation: got 'some', expected 'dev' or 'auto' or a number"),
    ({"data.validation": 1.5}, "data.validation: got 1.5, expected 'dev' or 'auto' or less than 1"),
    ({"data.protocol": "new"}, "data.protocol: PARAMS has no 'new' under protocols; known: corrected, published"),
    ({"train.keep": "best"}, "train.keep: best needs validation examples"),
    ({"train.task_epochs.news_topic": 0}, "train.task_epochs.news_topic: got 0, expected 1 or more"),
    ({"train.task_epochs.news_topc": 2}, "train.task_epochs.news_topc: no task of order embedded; did you"),
    ({"subspace.threshold": 1.2}, "subspace.threshold: got 1.2, expected 1"),
    ({"subspace.gate_threshold": 0}, "subspace.gate_threshold: got 0, expected a number above 0"),
    ({"train.learning_rate": float("nan")}, "train.learning_rate: got nan, expected a finite number"),
    ({"train.weight_decay": float("inf")}, "train.weight_decay: got inf, expected a finite number"),
    ({"train.penalty_weight": -1}, "train.penalty_weight: got -1, expected 0"),
    ({"train.micro_batch_size": 3}, "train.micro_batch_size: 3 does not divide"),
    ({"order.data": ""}, "orders.embedded.data: got '', expected text that is not empty"),
    ({"order.tasks": []}, "orders.embedded.tasks: empty"),
    ({"order.tasks": ["a", "a"]}, "'a' appears more than once"),
    ({"order.tasks": ["../x"]}, "'../x' cannot name an order or a task"),
    ({"order.name": "../x"}, "'../x' cannot name an order or a task"),
    ({"order.metric": "bleu"}, "orders.embedded.metric: got 'bleu', expected"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(GainLoRAError) as error:
        load_config("embedded", options, PARAMS)
    assert message.replace("PARAMS", str(PARAMS)) in str(error.value)


FILES = [
    ("seed: 1", "'orders' is missing"),
    ("orders: {a: {data: d}}", "no order 'o'"),
    ("orders: {1: {}}", "no order 'o'; known: 1"),
    ("orders: {o: null}", "orders.o: expected data"),
    ("orders: {o: {settings: [1]}}", "orders.o: expected data"),
    ("orders: {o: {data: d}}", "orders.o.template: missing"),
    ("models: [x]\norders: {o: {}}", "models: got ['x']"),
    ("model: {name: m}\nmodels: {m: 3}\norders: {o: {}}", "models.m: expected options"),
    ("model: {name: m}\nmodels: {m: {superni: 3}}\norders: {o: {}}", "models.m: expected options"),
    ("model: smollm\nORDER", "model: got 'smollm', expected a section"),
    ("report: {decimals: x}\nORDER", "report.decimals: got 'x', expected a whole number"),
    ("report: {dpi: 0}\nORDER", "report.dpi: got 0, expected 20 or more"),
    ("promote: {max_forgetting: .nan}\nORDER", "promote.max_forgetting: got nan, expected a finite number"),
    ("tracking: x\nORDER", "tracking: got 'x', expected a section"),
    ("tracking: {uri: 'http://me:s3cret@host'}\nORDER", "MLFLOW_TRACKING_PASSWORD"),
    ("tracking: {uri: 'postgresql://me:s3cret@host/db'}\nORDER", "~/.pgpass"),
    ("tracking: {uri: 'postgresql://host/db?password=s3cret'}\nORDER", "~/.pgpass"),
    ("tracking: {uri: 'foo://s3cret@bar'}\nORDER", "'foo://...@bar': no address of an MLflow store"),
    ("tracking: {uri: 'http://[s3cret'}\nORDER", "tracking.uri: no address"),
    ("seed: 010\nORDER", "seed: got '010', expected a whole number"),  # YAML 1.1: 8
    ("seed: 1:30\nORDER", "seed: got '1:30', expected a whole number"),  # YAML 1.1: 90
    ("seed: 1_0\nORDER", "seed: got '1_0', expected a whole number"),  # YAML 1.1: 10
    ("seed: on\nORDER", "seed: got 'on', expected a whole number"),  # YAML 1.1: true
    ("data: {skip_incomplete: yes}\nORDER", "data.skip_incomplete: got 'yes', expected true or false"),
    ("seed: null\nORDER", "seed: got None, expected a whole number"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=lambda text: text[:40])
def test_wrong_files_are_refused(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("ORDER", yaml.safe_dump({"orders": {"o": ENTRY}})))
    with pytest.raises(GainLoRAError) as error:
        load_config("o", params=path)
    assert message in str(error.value) and "s3cret" not in str(error.value)


def test_plain_yaml_words_are_text_and_numbers_are_numbers(tmp_path):
    path = tmp_path / "params.yaml"
    order = "orders: {o: {data: yes, template: superni, metric: rouge_l, tasks: [no, 010]}}"
    path.write_text("train: {learning_rate: 1e-3}\nlora: {targets: [no, on]}\n" + order)
    config = load_config("o", params=path)
    assert (config.train.learning_rate, config.lora.targets, config.order.tasks) == (1e-3, ("no", "on"), ("no", "010"))
