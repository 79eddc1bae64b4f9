"""Anything at all as task file or params.yaml: it is read, or refused by one error; nothing else is ever raised."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gainlora.config import RunConfig, load_config
from gainlora.data.tasks import Task, read_task
from gainlora.errors import LONGEST, GainLoRAError
from gainlora.io import parse_yaml

fuzz = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TEXT = st.text(max_size=12)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63), 10**400, 0])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
ANSWERS = WORDS | st.lists(WORDS, min_size=1, max_size=3)
INSTANCES = st.lists(
    st.fixed_dictionaries({"input": WORDS | VALUES, "output": ANSWERS | VALUES}, optional={"id": VALUES}) | VALUES,
    max_size=4,
)
FILES = st.fixed_dictionaries({}, optional={"Definition": st.lists(TEXT) | VALUES, "Instances": INSTANCES | VALUES})


def one_line(error):
    text = str(error)
    assert text and len(text.splitlines()) == 1 and len(text) <= LONGEST + 5


def written(folder, train, test):
    folder.mkdir(exist_ok=True)
    (folder / "train.json").write_bytes(train)
    (folder / "test.json").write_bytes(test)
    return folder


def reads_or_refuses(folder):
    try:
        task = read_task(folder, "superni", "rouge_l")
    except GainLoRAError as error:
        one_line(error)
        assert str(folder) in str(error)
    else:
        assert isinstance(task, Task) and task.train and task.test
        assert all(e.input and e.references and all(e.references) for e in (*task.train, *task.test))
        assert task.prompt(task.test[0]).endswith("\nOutput: ")


@fuzz
@given(FILES | VALUES)
def test_task_files_of_any_value(tmp_path, value):
    content = json.dumps(value).encode()
    reads_or_refuses(written(tmp_path / "t", content, content))


@fuzz
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 20))
def test_task_files_of_any_bytes(tmp_path, noise, at, gap):
    good = json.dumps(
        {"Definition": ["é"], "Instances": [{"input": "a", "output": ["b"]}]}, ensure_ascii=False
    ).encode()
    reads_or_refuses(written(tmp_path / "t", noise, good))
    reads_or_refuses(written(tmp_path / "t", good, good[:at] + noise + good[at + gap :]))


@fuzz
@given(
    WORDS, st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=4), st.booleans(), st.sampled_from(["", "\ufeff"])
)
def test_valid_tasks_round_trip(tmp_path, definition, examples, ascii_only, mark):
    content = {"Definition": [definition], "Instances": [{"input": i, "output": o} for i, o in examples]}
    raw = (mark + json.dumps(content, ensure_ascii=ascii_only)).encode()
    task = read_task(written(tmp_path / "t", raw, raw), "long_sequence", "rouge_l")
    assert task.instruction == definition.strip() and task.train == task.test
    for (text, answer), example in zip(examples, task.train, strict=True):
        answers = [answer] if isinstance(answer, str) else answer
        assert example.input == text.strip() and list(example.references) == [a.strip() for a in answers]
        assert task.prompt(example) == f"{definition.strip()}\n{text.strip()}\nOutput: "


ORDER = {"data": "d", "template": "superni", "metric": "rouge_l", "tasks": ["a"]}
PLAIN = RunConfig.from_stored({"order": {"name": "o", **ORDER}}).learning()
PLAIN.pop("order")
OPTIONS = [f"{section}.{name}" for section, inner in PLAIN.items() if isinstance(inner, dict) for name in inner]
OPTIONS += ["method", "seed", *PLAIN, "model", "models", "orders", "order", "tracking", "report", "report.dpi"]
NAMES = st.sampled_from(OPTIONS) | TEXT
DATES = st.dates() | st.datetimes() | st.binary(max_size=5)
ODD = VALUES | DATES | st.lists(TEXT) | st.dictionaries(NUMBERS | TEXT, VALUES, max_size=3)


def loads_or_refuses(params, overrides):
    try:
        config = load_config("o", overrides, params)
    except GainLoRAError as error:
        one_line(error)
    else:
        assert RunConfig.from_stored(config.learning()) == config


@fuzz
@given(st.dictionaries(NAMES, ODD | SCALARS, max_size=3), st.dictionaries(NAMES, ODD, max_size=2), VALUES | st.none())
def test_params_of_any_value(tmp_path, given_options, settings_, models):
    raw = {**PLAIN, "orders": {"o": {**ORDER, "settings": settings_}}, "models": {"m": models}}
    for option, value in given_options.items():
        section, dot, name = option.partition(".")
        if dot and isinstance(raw.get(section), dict):
            raw[section] = {**raw[section], name: value}
        else:
            raw[option] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=False))
    loads_or_refuses(path, {})


@fuzz
@given(st.dictionaries(NAMES, SCALARS | ODD, min_size=1, max_size=2))
def test_overrides_of_any_value(tmp_path, overrides):
    path = tmp_path / "params.yaml"
    path.exists() or path.write_text(yaml.safe_dump({"orders": {"o": ORDER}}))
    loads_or_refuses(path, overrides)


@fuzz
@given(st.text(st.sampled_from("ab01:-.,{}[]&*!|>'\"#%?<= \n\t\0\ud800é"), max_size=30) | st.text(max_size=30))
@pytest.mark.parametrize(
    "tag", ["", "!!int ", "!!float ", "!!timestamp ", "!!binary ", "!!bool ", "!!set ", "!!pairs ", "!x "]
)
def test_any_text_is_yaml_or_refused(tag, text):
    try:
        parse_yaml(tag + text, "here", "mend it")
    except GainLoRAError as error:
        one_line(error)
        assert str(error).startswith("here: ") and str(error).endswith("mend it.")
