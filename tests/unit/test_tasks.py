"""Task files: what loads, what is refused and how, prompts and limits."""

import json

import pytest

from gainlora.data.prompts import as_prompts
from gainlora.data.tasks import load_order, read_task
from gainlora.errors import GainLoRAError
from gainlora.sections import DataConfig, OrderConfig

GOOD = {
    "Definition": ["Say {it}.\n"],
    "Positive Examples": [],
    "Negative Examples": [],
    "Instances": [{"input": "Text: {a}\n", "output": "yes"}, {"id": "7", "input": " b", "output": ["no ", "nope"]}],
}


def write_task(folder, train=GOOD, test=GOOD):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("train", train), ("test", test)):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / f"{name}.json").write_bytes(raw)
    return folder


def numbered(n):
    return {"Definition": [], "Instances": [{"input": f"input {i}", "output": "yes"} for i in range(n)]}


def test_reads_references_and_strips(tmp_path):
    task = read_task(write_task(tmp_path / "t"), "superni", "rouge_l")
    assert (task.name, task.metric, task.instruction) == ("t", "rouge_l", "Say {it}.")
    assert [e.references for e in task.train] == [("yes",), ("no", "nope")]


@pytest.mark.parametrize(
    ("template", "definition", "prompt"),
    [
        (
            "superni",
            ["Say {it}.\n"],
            "Definition: Say {it}.\n\nNow complete the following example -\nInput: Text: {a}\nOutput: ",
        ),
        ("superni", [], "Now complete the following example -\nInput: Text: {a}\nOutput: "),
        ("long_sequence", ["Say {it}.\n"], "Say {it}.\nText: {a}\nOutput: "),
        ("long_sequence", "Say {it}.", "Say {it}.\nText: {a}\nOutput: "),
        ("long_sequence", [], "Text: {a}\nOutput: "),
        ("long_sequence", "", "Text: {a}\nOutput: "),
    ],
)
def test_prompts_are_exact(tmp_path, template, definition, prompt):
    content = {**GOOD, "Definition": definition}
    task = read_task(write_task(tmp_path / "t", content, content), template, "exact_match")
    assert task.prompt(task.train[0]) == prompt
    assert as_prompts([" Text: {a}\n"], template, {"t": task.instruction})[0].text == prompt  # as it is asked later


def test_blank_references_are_dropped_and_blank_training_instances_counted(tmp_path):
    train = {**GOOD, "Instances": [{"input": "a", "output": [" "]}, {"input": "b", "output": ["", "x"]}]}
    task = read_task(write_task(tmp_path / "t", train), "superni", "rouge_l")
    assert task.notes == (
        "train.json: 1 of 2 instances have only empty references; left out.",
        "train.json: 1 empty references beside others are left out.",
    )
    assert [e.references for e in task.train] == [("x",)]


def instance(**values):
    """A file whose instance 1 is `values`, after a good instance 0."""
    return {**GOOD, "Instances": [{"input": "a", "output": "b"}, values]}


BAD = {
    "empty file": (b"", ["empty"]),
    "blank file": (b" \n", ["empty"]),
    "a list": ([1], ["row 1 is the number 1", "columns"]),
    "a number": (3, ["the number 3"]),
    "no instances key": ({"Definition": [], "instances": []}, ["'Instances' is missing", "instances"]),
    "instances an object": ({"Instances": {}}, ["'Instances' is an object"]),
    "no instances": ({"Instances": []}, ["no usable instance"]),
    "definition a number": ({**GOOD, "Definition": 4}, ["'Definition'", "the number 4"]),
    "definition of numbers": ({**GOOD, "Definition": [4]}, ["'Definition'", "the number 4"]),
    "instance is text": ({"Instances": ["x"]}, ["instance 0", "is text"]),
    "no input": (instance(output="x"), ["instance 1", "'input' is missing"]),
    "no output": (instance(input="x", outputs="y"), ["instance 1", "'output' is missing", "outputs"]),
    "input a list": (instance(input=["x"], output="y"), ["instance 1", "'input' is a list"]),
    "empty input": (instance(input=" \n", output="y"), ["instance 1", "'input' is empty"]),
    "output null": (instance(input="x", output=None), ["instance 1", "'output' is null"]),
    "output a number": (instance(input="x", output=3), ["instance 1", "'output' is the number 3"]),
    "output a boolean": (instance(input="x", output=True), ["instance 1", "'output' is a boolean"]),
    "empty output": (instance(input="x", output=""), ["instance 1", "'output' is empty"]),
    "empty output list": (instance(input="x", output=[]), ["instance 1", "'output' is an empty list"]),
    "blank output list": (instance(input="x", output=["", " "]), ["instance 1", "blank"]),
    "output list with null": (instance(input="x", output=["y", None]), ["instance 1", "entry 1", "null"]),
    "definition in small letters": ({**GOOD, "definition": "x"}, ["'definition'", "nearly 'Definition'"]),
    "definitions": ({**GOOD, "Definitions": ["x"]}, ["'Definitions'", "nearly 'Definition'"]),
    "definition misspelled": ({"Instances": GOOD["Instances"], "Defintin": "x"}, ["'Defintin'"]),
    "input with swapped letters": (instance(**{"input": "x", "output": "y", "inptu ": "z"}), ["'inptu '", "'input'"]),
    "a second kind of instances": ({**GOOD, "instance": []}, ["'instance'", "nearly 'Instances'"]),
    "a second input": (instance(input="x", output="y", Input="z"), ["instance 1", "'Input'", "nearly 'input'"]),
    "a second output": (instance(input="x", output="y", ouputs="z"), ["instance 1", "'ouputs'", "nearly 'output'"]),
    "half a surrogate pair": (instance(input="\ud800", output="y"), ["instance 1", "surrogate"]),
}


def test_other_keys_are_ignored_and_a_second_definition_is_noted(tmp_path):
    keys = ["Contributors", "Source", "URL", "Categories", "Reasoning", "Input_language", "Output_language", "Domains"]
    keys += ["Instruction_language", "Instance License", "Positive Examples", "Negative Examples", "Description", "id"]
    instance = {"id": 1, "input": "x", "output": "y", "input_id": 3, "output_2": "z", "outcome": "", "put": 0}
    content = {**{key: [] for key in keys}, "Definition": ["One.", "Two."], "Instances": [instance]}
    task = read_task(write_task(tmp_path / "t", content, content), "superni", "rouge_l")
    assert task.instruction == "One." and task.train == task.test
    assert task.notes == ("'Definition' has 2 entries; the first one is used.",)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_file_place_and_key(tmp_path, case):
    content, expected = BAD[case]
    with pytest.raises(GainLoRAError) as caught:
        read_task(write_task(tmp_path / "t", test=content), "long_sequence", "exact_match")
    message = str(caught.value)
    for part in [str(tmp_path / "t" / "test.json"), *expected]:
        assert part in message
    assert "\n" not in message


def test_different_definitions_are_refused(tmp_path):
    with pytest.raises(GainLoRAError, match="differs"):
        read_task(write_task(tmp_path / "t", test={**GOOD, "Definition": "Other."}), "superni", "rouge_l")


def test_sha256_follows_the_contents(tmp_path):
    one = read_task(write_task(tmp_path / "a"), "superni", "rouge_l").sha256
    assert one == read_task(write_task(tmp_path / "b"), "long_sequence", "rouge_l").sha256
    assert (
        one
        != read_task(write_task(tmp_path / "c", train=numbered(2) | {"Definition": "Say {it}."}), "superni", "r").sha256
    )


def order(*tasks, data="data/mine"):
    return OrderConfig(name="o", data=data, template="long_sequence", metric="exact_match", tasks=tasks)


def test_order_keeps_its_sequence_and_limits(tmp_path):
    for name in ("a", "b"):
        write_task(tmp_path / "data/mine" / name, numbered(50), numbered(20))
    limits = DataConfig(train_limit=10, test_limit=5)
    tasks, skipped = load_order(order("b", "a"), limits, tmp_path)
    assert [t.name for t in tasks] == ["b", "a"] and skipped == []
    assert [(len(t.train), len(t.test)) for t in tasks] == [(10, 5)] * 2
    assert tasks == load_order(order("b", "a"), limits, tmp_path)[0]
    chosen = [e.input for e in tasks[0].train]
    assert chosen == sorted(chosen, key=lambda text: int(text.split()[1]))  # file order
    assert chosen != [e.input for e in tasks[1].train]  # each task its own subset
    more = load_order(order("b"), DataConfig(train_limit=30, test_limit=None), tmp_path)[0][0]
    assert set(chosen) < {e.input for e in more.train} and len(more.test) == 20


def test_incomplete_tasks_are_listed_in_one_error_or_skipped(tmp_path):
    for name in ("a", "b", "c"):
        write_task(tmp_path / "data/mine" / name)
    (tmp_path / "data/mine/a/train.json").unlink()
    (tmp_path / "data/mine/c/test.json").unlink()
    with pytest.raises(GainLoRAError) as caught:
        load_order(order("a", "b", "c", "d"), DataConfig(), tmp_path)
    for part in (
        "a lacks train.json;",
        "c lacks test.json;",
        "d lacks train.json and test.json.",
        "data.skip_incomplete",
        "--skip-incomplete",
    ):
        assert part in str(caught.value)
    tasks, skipped = load_order(order("a", "b", "c", "d"), DataConfig(skip_incomplete=True), tmp_path)
    assert [t.name for t in tasks] == ["b"] and skipped == ["a", "c", "d"]
    with pytest.raises(GainLoRAError, match="no complete task"):
        load_order(order("a", "d"), DataConfig(skip_incomplete=True), tmp_path)


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ("data/embedded", "gainlora fetch embedded"),
        ("data/CL_Benchmark/SuperNI", "gainlora fetch cl-benchmark --from DIR"),
        ("data/mine", "train.json and test.json"),
    ],
)
def test_a_missing_folder_says_how_to_get_it(tmp_path, data, remedy):
    with pytest.raises(GainLoRAError, match="no such folder") as caught:
        load_order(order("a", data=data), DataConfig(skip_incomplete=True), tmp_path)
    assert remedy in str(caught.value)
