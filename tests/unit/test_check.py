"""gainlora check: what it says of a task and an order; and learn with a table's columns named."""

import json

import pytest

from gainlora.__main__ import main
from tests.runs import learn, project


def said(capsys, *arguments):
    assert main(["check", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(project(tmp_path))
    return tmp_path


def test_an_order_s_tasks_as_they_would_be_learned(root, capsys):
    path = root / "data" / "tiny" / "task2" / "train.json"
    content = json.loads(path.read_text())
    content["Instances"][1] = {"input": content["Instances"][0]["input"].upper(), "output": "up"}
    content["Instances"][2]["input"] += " w1" * 40
    path.write_text(json.dumps(content))
    lines = said(capsys, "tiny", "--set", "data.test_limit=5", "--set", "train.min_steps=4")
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == ["task1", "task2", "task3"]
    second = lines[lines.index(next(line for line in lines if line.startswith("task2"))) :]
    assert second[0] == "task2: 24 of 24 train, 5 of 8 test examples are used; instruction: Sort task 2"
    text = "\n".join(second)
    assert "3 labels: " in text and "6 optimizer steps of 8 examples" in text
    assert "(limit 32)" in text and "cut: 1 prompts" in text and text.count("none is cut") >= 1
    assert "1 of 24 train inputs repeat another" in text
    assert second.count(next(line for line in second if "prompt: 'Sort task 2\\n" in line)) == 1


def test_a_table_before_and_after_it_is_learned(root, capsys):
    table = root / "mine.csv"
    table.write_text("body;team\r\n" + "".join(f"w{n};{('red', '{')[n % 2]}\r\n" for n in range(20)))
    assert main(["check", "mine.csv"]) == 1
    assert "(columns: body, team); name them: input=COLUMN, output=COLUMN" in capsys.readouterr().err
    named = ("--input", "body", "--output", "team", "--instruction", "Sort")
    lines = said(capsys, "mine.csv", "--model", str(root / "base"), *named)
    assert lines[0] == "mine: 16 of 16 train, 4 of 4 test examples are used; instruction: Sort"
    assert any("different references cannot score 100" in line and "'{'" in line for line in lines)  # no such token
    run = learn(root)
    (root / "more.csv").write_text(table.read_text().replace("{", "green"))
    assert main(["learn", run.folder.name, "--task", "more.csv", *named]) == 0
    assert " more " in capsys.readouterr().out
    (longer,) = (path for path in root.glob("runs/*/task_04_more"))
    test = json.loads((longer / "test" / "more.json").read_text())
    assert test["Definition"] == ["Sort"] and len(test["Instances"]) == 4
