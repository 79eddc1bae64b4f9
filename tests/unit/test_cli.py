"""The command line: help, completion, usage errors, and every command on a tiny run."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gainlora import __version__
from gainlora.__main__ import main
from gainlora.cli import app
from tests.pages import ROOT
from tests.tiny import tiny_llama, tiny_params

COMMANDS = typer.main.get_command(app).commands
ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}


def test_help_lists_every_command_and_describes_every_option():
    shown = CliRunner().invoke(app, []).output
    assert shown == CliRunner().invoke(app, ["--help"]).output and max(map(len, shown.splitlines())) <= 110
    assert re.findall(r"^  ([a-z]+)", shown.partition("COMMAND")[2], re.MULTILINE) == list(COMMANDS)
    for name, command in COMMANDS.items():
        assert command.help and all(parameter.help for parameter in command.params), name
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
    assert CliRunner().invoke(app, ["--version"]).output == f"gainlora {__version__}\n"


def test_help_completion_and_records_import_nothing_heavy():
    code = "import sys, gainlora.runs.records; from gainlora import rules; from gainlora.__main__ import main\n"
    code += "main(['--help']); main(['run', '--help']); rules.methods(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    heavy = {"torch", "transformers", "mlflow", "prefect", "rich", "pandas", "matplotlib", "jinja2", "dvc", "scipy"}
    assert not heavy & {*done.stdout.splitlines()[-1].split()}


USAGE = [
    ["nonsense"], ["run"], ["run", "tiny", "more"], ["run", "tiny", "--seed", "x"], ["run", "tiny", "--set"],
    ["run", "tiny", "--set", "seed"], ["run", "tiny", "--set", "=1"], ["run", "tiny", "--set", "seed=["],
    ["run", "tiny", "--set", "seed={a: 1, a: 2}"], ["run", "tiny", "--set", "seed=" + "[" * 500],
    ["run", "tiny", "--nonsense"], ["run", "tiny", "--seed", "1", "--seed", "2"], ["run", "tiny", "--queue", "--queue"],
    ["compare"], ["compare", "tiny", "--methods"], ["fetch"], ["fetch", "nonsense"], ["fetch", "embedded", "--from"],
    ["sweep", "tiny", "--seeds", "a"], ["sweep", "tiny", "--jobs", "0"], ["forget", "x"], ["promote", "x"],
    ["results"], ["predict"], ["predict", "x"], ["predict", "x", "y", "z"], ["predict", "x", "y", "--file", "z"],
    ["predict", "x", "y", "--batch-size", "many"], ["predict", "x", "y", "--batch-size", "0"], ["export", "x"],
    ["merge", "x"], ["push", "x"], ["register"], ["report", "--nonsense"], ["repair"], ["repair", "x", "y"],
    ["repair", "x", "--from-task", "first"], ["rerun"], ["learn"], ["rollback"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", USAGE, ids=lambda words: " ".join(words)[:40])
def test_wrong_usage(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2 and not list(tmp_path.iterdir())
    out, err = capsys.readouterr()
    assert out == "" and "Error: " in err


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["re"], {"report", "results", "repair", "rerun", "register"}),
        (["run", "embed"], {"embedded"}),
        (["run", "embedded", "--method", "gainlora-o"], {"gainlora-olora"}),
        (["run", "embedded", "--model", "llama-3"], {"llama-3-8b"}),
        (["compare", "embedded", "--methods", "seqlora,gainlora-infl"], {"seqlora,gainlora-inflora"}),
        (["run", "embedded", "--set", "train.ep"], {"train.epochs="}),
        (["forget", "lat"], {"latest"}),
    ],
)
def test_the_tab_key(typed, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = " ".join(["gainlora", *typed])
    asked = {"_GAINLORA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(typed))}
    offered = CliRunner().invoke(app, [], env=asked, prog_name="gainlora").output.split()
    assert set(offered) == expected


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "mlflow.exceptions", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert main(["register", "run"]) == 1
    assert capsys.readouterr().err == "error: register needs mlflow: pip install 'gainlora[mlops]'\n"


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A project in which order `tiny` has been learned once, and what that printed."""
    root = tmp_path_factory.mktemp("project")
    tiny_llama(root / "base")
    tiny_params(root, "base", count=2, promote__min_gain=None, promote__max_general_loss=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return root, CliRunner().invoke(app, ["run", "tiny"])


@pytest.fixture
def project(learned, monkeypatch):
    monkeypatch.chdir(learned[0])
    return learned[0]


def run(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_run_prints_a_line_for_each_task_and_nothing_of_other_libraries(learned):
    lines = learned[1].output.splitlines()
    (name,) = [path.parent.name for path in learned[0].glob("runs/*/result.json")]
    assert lines[0] == f"runs/{name}: 2 tasks" and learned[1].exit_code == 0
    lines = [line for line in lines if not line.startswith("note: task")]  # the tiny model may learn nothing
    assert [line.split(" | ")[0] for line in lines[1:3]] == ["task 1/2 task1", "task 2/2 task2"]
    assert lines[3].startswith("AP ") and lines[4].startswith("promoted: ") and len(lines) == 5


def test_the_same_run_again_learns_nothing(project):
    before = {path: path.stat().st_mtime_ns for path in project.glob("runs/*/task_*/*")}
    again = run("run", "tiny")
    assert "finished before" in again[1] and "finished before" in again[2]
    assert before == {path: path.stat().st_mtime_ns for path in project.glob("runs/*/task_*/*")}


def test_a_run_is_listed_reported_and_asked_by_its_names(project):
    head, *rows = run("runs")
    assert head.split() == ["run", "order", "method", "seed", "tasks", "AP", "FT", "state"]
    assert rows[0].split()[1:5] == ["tiny", "gainlora-inflora", "1", "2"] and rows[0].endswith("finished")
    (file,) = run("results", "latest", "--out", "out", "--label", "x")
    assert json.loads(Path(file).read_text())["label"] == "x"
    assert run("report", file, "--out", "page") == ["page/index.html"]
    assert run("predict", "tiny", "w1") == run("predict", "latest", "w1")  # by the beginning of its name


def test_left_out_tasks_are_named(project):
    lines = run("run", "tiny", "--skip-incomplete", "--set", "order.tasks=[task1, gone]", "--method", "seqlora")
    assert "note: 1 of 2 tasks left out, as their files are missing: gone" in lines


def test_logging_of_other_libraries_stays_quiet(project, capfd):
    main(["runs"])
    logging.getLogger("httpx").warning("a line between ours")
    assert "between ours" not in capfd.readouterr().err
