"""dvc.yaml and paper/dvc.yaml, run by the real DVC on stand-ins for the two slow commands."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flows import versions
from flows.by_name import named
from gainlora.learning.run_folder import LEARNING_CODE

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
echo "$@" >> commands.log
case "$1" in
fetch) mkdir -p data/embedded models/smollm2-135m; echo d > data/embedded/train.json; echo m > models/smollm2-135m/m ;;
run) mkdir -p adapters/$2 metrics; echo a > adapters/$2/model.safetensors; echo '{"AP": 1.0}' > metrics/$2.json ;;
esac
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the pipeline in a git repository, with `gainlora` replaced by a script that notes its calls."""
    for name in ("dvc.yaml", "paper/dvc.yaml", "params.yaml", ".dvcignore", ".dvc/config", ".gitignore"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    learning = [part if part.endswith(".py") else f"{part}/a.py" for part in LEARNING_CODE]
    code = (*learning, "data/embedded.py", "data/sources.py", "data/text.py", "model/gate.py")
    for name in code:
        (tmp_path / "gainlora" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "gainlora" / name).write_text("# code\n")
    script = tmp_path / "bin" / "gainlora"
    script.parent.mkdir()
    script.write_text(STAND_IN)
    script.chmod(0o755)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{script.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    return tmp_path


def dvc(*arguments, code=0):
    """Run `dvc`; its output."""
    done = subprocess.run(
        [Path(sys.executable).with_name("dvc"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def commands():
    """What `gainlora` was asked to do since the last call."""
    log = Path("commands.log")
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def set_param(section, option, value):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params[section][option] = value
    Path("params.yaml").write_text(yaml.safe_dump(params))


def test_only_what_decides_the_result_runs_the_order_again(project):
    dvc("repro")
    assert commands() == ["fetch embedded", "run embedded"]

    started = time.monotonic()
    dvc("repro")
    assert commands() == []
    assert time.monotonic() - started < 10

    set_param("report", "decimals", 3)
    set_param("tracking", "experiment", "other")
    set_param("orders", "order1", {"tasks": ["other"]})
    dvc("repro")
    assert commands() == []

    set_param("train", "learning_rate", 5e-4)
    dvc("repro")
    assert commands() == ["run embedded"]

    Path("gainlora/model/gate.py").write_text("# other code\n")
    dvc("repro")
    assert commands() == ["run embedded"]
    assert json.loads(dvc("metrics", "show", "--json"))[""]["data"]["metrics/embedded.json"]["data"] == {"AP": 1.0}


def test_large_orders_run_by_name_only(project):
    missing = dvc("repro", "order1", code=255)
    assert "gainlora fetch cl-benchmark" in missing
    assert commands() == []

    Path("data/CL_Benchmark").mkdir(parents=True)
    Path("data/CL_Benchmark/task.json").write_text("{}")
    dvc("repro", "order1")
    assert commands() == ["run order1"]
    dvc("repro", "order1")
    assert commands() == []
    dvc("repro", "--force", "order1")
    assert commands() == ["run order1"]

    dvc("repro")
    assert commands() == ["fetch embedded", "run embedded"]


def test_a_run_outside_dvc_leaves_a_clean_status(project):
    for arguments in (["fetch", "embedded"], ["run", "embedded"]):
        subprocess.run(["gainlora", *arguments], check=True)
    hashes, changed = versions.data_hashes(Path("data/embedded"))
    assert versions.commit("embedded") is None
    assert "up to date" in dvc("status", "fetch", "embedded")
    commands()
    dvc("repro")
    assert commands() == []

    recorded = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["fetch"]["outs"][0]
    assert hashes == {"data/embedded": recorded["md5"]} and changed == []
    Path("data/embedded/train.json").write_text("changed")
    hashes, changed = versions.data_hashes(Path("data/embedded"))
    assert changed == ["data/embedded"] and hashes["data/embedded"] != recorded["md5"]


def test_a_failed_commit_says_what_to_do(project):
    assert "dvc commit -f fetch embedded" in versions.commit("embedded")  # nothing has been fetched or run


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("dvc repro order1", True),
        ("python /env/bin/dvc repro -f order2 order1", True),
        ("python -m dvc repro dvc.yaml:order1", True),
        ("dvc exp run order1", True),
        ("dvc repro", False),
        ("dvc repro order2", False),
        ("dvc status order1", False),
    ],
)
def test_named_reads_the_command_line(command, expected):
    assert named("order1", command.split()) is expected
